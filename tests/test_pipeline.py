"""The whole pipeline as a user runs it: photos, crops, training, faces, FID, each by its own command."""

import ast

import torch
from conftest import ROOT, random_inception
from PIL import Image

from support import demo_faces


def test_photos_to_fid(tmp_path, run_script):
    (tmp_path / "my photos").mkdir()
    for i in range(40):
        demo_faces.draw_face(1, i).save(tmp_path / "my photos" / f"é {i}.jpg")
    torch.save(random_inception(tf2015=True).state_dict(), tmp_path / "inception.pth")

    def step(script, *arguments):
        done = run_script(script, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "40 written" in step("preprocess.py", "my photos")
    small = ("--batch-size", "8", "--ngf", "4", "--ndf", "4", "--epochs", "1", "--device", "cpu")
    for size in (64, 128):
        assert "next:" in step("train.py", "--image-size", size, *small)
        params = f"runs/{size}/generator.params"
        step("generator.py", "--params", params, "--outdir", f"faces {size}", "--seeds", "0-9", "--grid")
        with Image.open(tmp_path / f"faces {size}" / "00000009.png") as face:
            assert face.size == (size, size)
    measured = ("--inception", "tf2015", "--weights", "inception.pth", "--dims", "64", "--num", "10")
    assert step("evaluate.py", *measured).splitlines()[-1].startswith("Fréchet Inception Distance (FID): ")


def test_help_of_every_script(run_script):
    for script in ("preprocess.py", "train.py", "generator.py", "evaluate.py"):
        done = run_script(script, "--help")
        assert done.returncode == 0 and f"python {script}" in done.stdout


SCRIPTS = ["preprocess", "dataloader", "network", "network_128", "generator", "evaluate", "train"]


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_imports_run_one_way():
    """A script imports only the scripts to its left, and support/ imports none."""
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)
    for place, name in enumerate(SCRIPTS):
        for module in set(imported_modules(ROOT / f"{name}.py")) & set(SCRIPTS):
            assert SCRIPTS.index(module) < place, f"{name}.py imports {module}"
    for path in (ROOT / "support").glob("*.py"):
        assert not set(imported_modules(path)) & set(SCRIPTS), path
