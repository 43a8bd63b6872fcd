"""The HTML page that generator.py --page writes: what is in it, and what a browser draws with it."""

import json
import os
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from helpers import PROGRAMS
from torch import nn

import generator
import network
from support.files import UserError
from support.latent_space import interpolate
from support.seeding import latents
from support.weights import save_tensors

BROWSERS = {
    "chromium": ["chromium", "chromium-browser", "google-chrome"],
    "firefox": ["firefox", "firefox-esr"],
}
# What the page must not hold: addresses, and what could load or send something.
OUTSIDE = r"https?:|//[\w.]+/|\bsrc=|url\(|@import|\bimport\b|importScripts|fetch\(|XMLHttpRequest|WebSocket|sendBeacon"


def write_weights(path, nz=16, ngf=8, image_size=64):
    """Random weights with which faces of different seeds differ. Their BatchNorm statistics are not 0 and 1."""
    torch.manual_seed(0)
    netG = network.Generator(nz, ngf, image_size)
    for module in netG.modules():
        if isinstance(module, nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0, 0.2)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    with torch.no_grad():
        for step in range(20):
            netG(latents(range(64 * step, 64 * step + 64), nz))
    torch.save(netG.state_dict(), path)
    return path


def write_page(folder, *flags, **sizes):
    """The text of the page of random weights."""
    params = write_weights(folder / "g.params", **sizes)
    generator.main(["--params", str(params), "--page", str(folder / "faces.html"), *map(str, flags)])
    return (folder / "faces.html").read_text(encoding="utf-8")


def see(browser, page, tmp_path):
    """Open `page` with check_page.js in its head in a browser, in a frame 360 pixels wide; returns what the script posts."""
    reports = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            reports.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        script = f"<script>const ADDRESS = '{address}';\n{(PROGRAMS / 'check_page.js').read_text()}</script>"
        page = page.replace("default-src 'none'", f"default-src 'none'; connect-src {address}")
        path = tmp_path / "checked.html"
        path.write_text(page.replace("<title>", f"{script}<title>"), encoding="utf-8")
        (tmp_path / "profile").mkdir()
        frame = tmp_path / "frame.html"  # a window of Chromium is at least 500 pixels wide
        frame.write_text('<!DOCTYPE html><iframe src="checked.html" width="360" height="740" style="border: 0">')
        flags = [f"--user-data-dir={tmp_path / 'profile'}", "--no-sandbox"]
        if "firefox" in browser:
            flags = ["--no-remote", "--profile", tmp_path / "profile"]
        environment = os.environ | {"HOME": str(tmp_path)}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([browser, "--headless", *flags, frame.as_uri()], env=environment, **pipes) as process:
            try:
                server.timeout = 60
                server.handle_request()
            finally:
                process.kill()
    assert reports, "the browser reported nothing"
    return reports[0]


@pytest.mark.parametrize("browser", BROWSERS)
def test_a_browser_draws_the_faces_of_generator(browser, tmp_path):
    program = next(filter(None, map(shutil.which, BROWSERS[browser])), None)
    if program is None:
        pytest.skip(f"needs {browser}")
    seen = see(program, write_page(tmp_path), tmp_path)
    netG = generator.load_generator(tmp_path / "g.params")

    def assert_drawn(pixels, z):
        faces = generator.draw(netG, z).permute(0, 2, 3, 1).int().numpy()
        seen = np.array(pixels).reshape(len(z), 64, 64, 4)
        assert (seen[..., 3] == 255).all()
        assert abs(seen[..., :3] - faces).max() <= 1

    assert seen["errors"] == []
    assert_drawn(seen["first"], latents(range(16), 16))
    assert seen["first_drawings"] == 65  # each face of the grid and the large one
    assert seen["names"] == [f"seed {seed}" for seed in range(64)]
    ends = latents([3, 5], 16)
    assert_drawn(seen["morph"], torch.stack([ends[0], interpolate(ends, 2)[1], ends[1]]))
    assert seen["new"] != seen["first"] and seen["like"] != seen["new"]
    assert seen["new_drawings"] <= 66  # 64, the one that was being drawn, and none that waited
    assert seen["first_again"] == seen["first"]
    assert np.array(seen["linked"]).std(0).mean() > 10
    assert seen["window_width"] == 360 and seen["content_width"] == seen["visible_width"]
