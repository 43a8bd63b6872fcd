"""Packages that are missing or too old: one sentence, before a script imports them."""

import sys

import pytest
from helpers import ROOT, run_python

from support.cli import major_and_minor, require_packages
from support.files import UserError

MINIMUM = dict(line.split(">=") for line in (ROOT / "requirements.txt").read_text().splitlines())


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Installs packages of given versions: metadata alone, found before the real packages. None: no version."""

    def install(**versions):
        for name, version in versions.items():
            folder = tmp_path / "site" / f"{name}-0.dist-info"
            folder.mkdir(parents=True)
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
        return str(tmp_path / "site")

    return install


@pytest.mark.parametrize("script", ["preprocess.py", "generator.py", "evaluate.py", "train.py"])
def test_scripts_without_packages_say_which_are_missing(tmp_path, refused, script):
    """`python -S` hides all packages that pip has installed."""
    names = ["pillow", "numpy", "tqdm"] if script == "preprocess.py" else MINIMUM
    done = run_python("-S", ROOT / script, cwd=tmp_path, PYTHONPATH="")
    needed = (f"{name} {MINIMUM[name]} or newer (not installed)" for name in names)
    refused(done, *needed, "pip install -r requirements.txt")


def test_a_script_with_an_old_torch_says_so(tmp_path, packages, refused):
    done = run_python(ROOT / "train.py", cwd=tmp_path, PYTHONPATH=packages(torch="2.3.1+cu121"))
    refused(done, f"needs torch {MINIMUM['torch']} or newer (this is 2.3.1+cu121): pip install -r requirements.txt")


@pytest.mark.parametrize("version", ["2.6.0", "2.11.0a0+145a3a7.nv26", "3.0", "2.14.1+cpu"])
def test_new_packages_are_accepted(packages, version):
    packages(torch=version)
    require_packages()


def test_only_the_named_packages_are_required(packages):
    packages(torch="2.5.1", numpy="1.25.4")
    with pytest.raises(UserError, match=r"^needs numpy 1.26 or newer \(this is 1.25.4\): pip"):
        require_packages("pillow", "numpy")


def test_major_and_minor():
    assert major_and_minor("11") == [11, 0] and major_and_minor("2.11.0a0+git") == [2, 11]
