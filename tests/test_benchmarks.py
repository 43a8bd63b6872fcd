"""The benchmarks run: each stage once, small. Their numbers mean nothing here."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_python

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
import memorisation

import generator


@pytest.mark.parametrize("stages", [["input", "preprocess"], ["generation", "start"]])
def test_speed(tmp_path, stages):
    flags = ["--count", "256", "--rounds", "1", "--faces", "64", "--celeba", "0", "--batch-size", "16"]
    flags += ["--device", "cpu", "--json", tmp_path / "speed.json", "--markdown", tmp_path / "speed.md"]
    done = run_python(ROOT / "benchmarks" / "speed.py", *flags, "--only", *stages, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "speed.json").read_text())["results"]
    assert len(results) >= 3 and "| " in (tmp_path / "speed.md").read_text()


def test_gpu_trains_and_keeps_networks_in_parts(dataroot, tmp_path, monkeypatch):
    small = "--epochs 1 --ngf 4 --ndf 4 --nz 8 --batch-size 8"
    monkeypatch.setattr(gpu, "TRAININGS", {"small": (120, gpu.REPORT, "small", small)})
    monkeypatch.setattr(gpu, "PART", 20_000)
    flags = ["--dataroot", dataroot, "--out", tmp_path / "out", "--work", tmp_path / "work", "--device", "cpu"]
    gpu.main([*map(str, flags), "--only", "small"])
    result = json.loads((tmp_path / "out" / "results.json").read_text())["small"]
    assert result["exit"] == 0 and result["epoch"] == 1 and result["images_per_sec"] > 0
    parts = sorted((tmp_path / "out").glob("small.pt.*"), key=lambda path: int(path.suffix[1:]))
    assert len(parts) > 1 and all(path.stat().st_size <= 20_000 for path in parts)
    (tmp_path / "small.pt").write_bytes(b"".join(path.read_bytes() for path in parts))
    halves = generator.load_generator(tmp_path / "small.pt").state_dict()
    whole = generator.load_generator(tmp_path / "work" / "small" / "generator.params").state_dict()
    assert all(torch.equal(halves[name], tensor.half().to(tensor.dtype)) for name, tensor in whole.items())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_step_that_is_too_slow_leaves_no_process(tmp_path):
    """Its child ignores SIGTERM and would keep the GPU."""
    child = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); "
    child += "time.sleep(100)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.perf_counter()
    assert gpu.run_python(["-c", program], 5, tmp_path / "log") == "too slow"
    stat = Path("/proc") / (tmp_path / "log").read_text().strip() / "stat"
    while stat.exists() and stat.read_text().split()[2] != "Z":  # the system takes a moment to end it
        assert time.perf_counter() - begin < 60
        time.sleep(0.1)


def test_memorisation_tells_copies_from_new_faces(dataroot, trained, weights, tmp_path):
    random = torch.Generator().manual_seed(0)
    train, valid, new = torch.randn(3, 400, 8, generator=random)
    copies = memorisation.compare(train + 0.01, train, valid)
    assert copies["share_nearer_to_train"] == 1 and copies["to_train"] < 0.1 < copies["to_valid"]
    assert 0.4 < memorisation.compare(new, train, valid)["share_nearer_to_train"] < 0.6

    shutil.copytree(dataroot / "64", tmp_path / "64")
    shutil.copytree(dataroot / "64" / "test", tmp_path / "64" / "valid", dirs_exist_ok=True)
    flags = ["--params", trained / "generator.params", "--dataroot", tmp_path, "--json", tmp_path / "result.json"]
    flags += ["--inception", "tf2015", "--dims", "64", "--weights", weights, "--device", "cpu"]
    memorisation.main([*map(str, flags)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["test"]["to_valid"] == 0 == result["test"]["share_nearer_to_train"]
    assert result["generated"]["n"] == result["n_valid"]
