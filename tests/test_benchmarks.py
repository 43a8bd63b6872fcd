"""The benchmarks run: each stage once, small. Their numbers mean nothing here."""

import json

import pytest
from helpers import ROOT, run_python


@pytest.mark.parametrize("stages", [["input", "preprocess"], ["generation", "start"]])
def test_speed(tmp_path, stages):
    flags = ["--count", "256", "--rounds", "1", "--faces", "64", "--celeba", "0", "--batch-size", "16"]
    flags += ["--device", "cpu", "--json", tmp_path / "speed.json", "--markdown", tmp_path / "speed.md"]
    done = run_python(ROOT / "benchmarks" / "speed.py", *flags, "--only", *stages, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "speed.json").read_text())["results"]
    assert len(results) >= 3 and "| " in (tmp_path / "speed.md").read_text()
