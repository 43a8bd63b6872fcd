"""The HTML page that generator.py --page writes: what is in it, and what a browser draws with it."""

import json
import os
import re
import shutil
import subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PROGRAMS, load
from torch import nn

import generator
import network
from support.files import UserError
from support.latent_space import interpolate
from support.page import TEMPLATE
from support.seeding import latents, step_latents
from support.weights import save_tensors

NAME = "<!--<script>.params"  # would end the page's scripts, if it were not escaped
BROWSERS = {
    "chromium": ["chromium", "chromium-browser", "google-chrome"],
    "firefox": ["firefox", "firefox-esr"],
}
SET_1 = [1.404339, 1.215755, -0.510377, -0.251818]  # the latent of its first face begins so in every browser
# What the page must not hold: addresses, and what could load or send something.
OUTSIDE = r"https?:|//[\w-]+\.|\bsrc=|url\(|\bimport\b|importScripts|fetch\(|XMLHttpRequest|WebSocket|sendBeacon"


def write_page(folder, *flags, nz=16, ngf=8, image_size=64):
    """The text of the page of a generator with random weights. Its faces differ, and so do its channels' statistics."""
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
            netG(step_latents(0, step, 64, nz))
    save_tensors(netG.state_dict(), folder / NAME)
    generator.main(["--params", str(folder / NAME), "--page", str(folder / "faces.html"), *map(str, flags)])
    return (folder / "faces.html").read_text(encoding="ascii")


def test_a_page_holds_everything_and_names_no_address(tmp_path):
    page = write_page(tmp_path)
    template = TEMPLATE.read_text(encoding="ascii")
    weights = sum(t.numel() for t in load(tmp_path / NAME).values() if t.ndim == 4)
    numbers = 64 * 16 + 2 * (64 + 32 + 16 + 8 + 3)  # latents, scales and biases, at most 25 characters each
    assert len(page) < len(template) + 2 * weights * 4 / 3 + 25 * numbers + 2000
    assert not re.search(OUTSIDE, page)
    assert page.count("<script") == template.count("<script") == 3  # none from the name of the generator
    assert json.loads(re.search(r'id="data".*?>(.*)</script>', page)[1])["generator"] == NAME


def test_faces_of_latents_come_first(tmp_path):
    save_tensors({"latents": latents([500, 600], 16)}, tmp_path / "me.latents")
    page = write_page(tmp_path, "--latents", tmp_path / "me.latents")
    data = json.loads(re.search(r'id="data".*?>(.*)</script>', page)[1])
    assert data["names"] == ["me_0", "me_1", *(f"seed {seed}" for seed in range(64))]
    assert torch.equal(torch.tensor(data["latents"]), latents([500, 600, *range(64)], 16).flatten(1))


def test_no_file_is_replaced_without_the_flag(tmp_path):
    flags = ["--params", str(tmp_path / NAME), "--page"]
    write_page(tmp_path)
    (tmp_path / "faces.html").write_text("mine")
    with pytest.raises(UserError, match="faces.html exists; choose another --page, or pass --overwrite"):
        generator.main([*flags, str(tmp_path / "faces.html")])
    with pytest.raises(UserError, match="is an input of the same command"):
        generator.main([*flags, str(tmp_path / NAME), "--overwrite"])
    with pytest.raises(UserError, match="there is no folder .*nowhere for --page"):
        generator.main([*flags, str(tmp_path / "nowhere" / "faces.html")])
    assert (tmp_path / "faces.html").read_text() == "mine"
    generator.main([*flags, str(tmp_path / "faces.html"), "--overwrite"])
    assert (tmp_path / "faces.html").read_text().startswith("<!DOCTYPE html>")


def see(browser, page, tmp_path):
    """Open `page` with check_page.js in its head, in a frame 360 pixels wide; returns what the script posts."""
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
@pytest.mark.parametrize("worker, nz, ngf, size", [(True, 16, 8, 64), (False, 5, 3, 16)])
def test_a_browser_draws_the_faces_of_generator(browser, worker, nz, ngf, size, tmp_path):
    """In a worker, and in the page itself where workers are blocked."""
    programs = [name for name in BROWSERS[browser] if shutil.which(name) and not Path("/snap/bin", name).exists()]
    if not programs:
        pytest.skip(f"needs {browser}, and not as a snap, which cannot read /tmp")
    page = write_page(tmp_path, nz=nz, ngf=ngf, image_size=size)
    seen = see(programs[0], page if worker else page.replace("worker-src blob:", "worker-src 'none'"), tmp_path)
    netG = generator.load_generator(tmp_path / NAME)

    def assert_drawn(pixels, z):
        pixels = np.array(pixels).reshape(len(z), size, size, 4)
        assert (pixels[..., 3] == 255).all()
        difference = abs(pixels[..., :3] - generator.draw(netG, z).permute(0, 2, 3, 1).int().numpy())
        assert difference.max() <= 1 and difference.mean() < 0.1  # the page's weights have half precision

    assert seen["errors"] == ([] if worker else ["worker-src"])
    assert_drawn(seen["first"], latents(range(16), nz))
    assert seen["first_drawings"] == 65  # each face of the grid and the large one
    assert seen["names"] == [f"seed {seed}" for seed in range(64)]
    ends = latents([3, 5], nz)
    assert_drawn(seen["morph"], torch.stack([ends[0], interpolate(ends, 2)[1], ends[1]]))
    assert np.array(seen["new"]).std(0).mean() > 10 and seen["new"] != seen["first"]
    assert seen["new_drawings"] <= 66  # 64 and those that were being drawn, but none that waited
    assert seen["large"] == "seed 3 to seed 5, 30 %"
    assert seen["like"] not in (seen["new"], seen["linked"])
    assert seen["first_again"] == seen["first"]
    assert np.array(seen["linked"]).std(0).mean() > 10 and seen["linked"] != seen["new"]
    assert seen["latent"] == pytest.approx(SET_1, abs=1e-6)
    assert seen["window_width"] == 360 and seen["content_width"] == seen["visible_width"]
