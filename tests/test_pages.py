"""README.md and docs/: their commands parse and run, their links lead somewhere, their numbers were measured."""

import importlib
import importlib.util
import json
import re
import shlex
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, random_inception

import evaluate
import preprocess
from support.demo_faces import draw_face

PAGES = [ROOT / "README.md", ROOT / "pretrained" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_PROGRAMS = {"pip", "ruff", "pytest", ".", "git", "cd"}
SMALL = {
    "train.py": "--epochs 1 --ngf 4 --ndf 4 --nz 8 --batch-size 8 --device cpu",
    "generator.py": "--device cpu",
    "evaluate.py": "--inception tf2015 --weights inception.pth --dims 64 --num 8 --device cpu",
}


def fenced_commands(text):
    """The shell commands in the blocks of a page, as lists of words, without comments."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&", re.sub(r"(^|\s)#\s.*", "", line)):
                if command.strip():
                    yield shlex.split(command)


def headings(path):
    """The anchors of a page's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_parse(page, monkeypatch):
    """As if all files were there that the commands read."""
    monkeypatch.setattr(Path, "exists", lambda path: True)
    for words in fenced_commands(page.read_text(encoding="utf-8")):
        script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if script is None:
            assert words[0] in OTHER_PROGRAMS or words[:3] == ["python", "-m", "venv"], words
        elif "/" in words[script]:
            program, flags = (ROOT / words[script]).read_text(encoding="utf-8"), words[script + 1 :]
            names = [word for word in flags if re.fullmatch(r"--[\w-]+", word)]  # not "--ngf 32 --ndf 32"
            assert all(f'"{name}"' in program for name in names), words
        else:
            importlib.import_module(words[script].removesuffix(".py")).parse_args(words[script + 1 :])


def test_the_install_block_leaves_the_kind_of_build_to_pip():
    """Somebody with a GPU who copies all of it gets the CUDA build."""
    section = re.search(r"## Install\n(.*?)\n## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    installs = [words for words in fenced_commands(section) if words[0] == "pip"]
    assert installs == [["pip", "install", "-r", "requirements.txt"]]
    assert "--index-url" not in (ROOT / "requirements.txt").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_tables(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not link.startswith(("http://", "https://")):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in headings(target), link
    for line in text.splitlines():
        if line.startswith("|"):
            for cell in line.strip("|").split("|"):
                assert len(re.sub(r"\]\([^)]*\)", "]", cell).strip()) <= 60, cell


def results_row(result):
    """The cells of a result of evaluate.py in README's quality tables."""
    measured = (result["fid"], 4), (1000 * result["kid"], 3), (result["precision"], 3), (result["recall"], 3)
    return [f"{value:.{decimals}f}" for value, decimals in measured]


def test_each_row_of_the_results_was_measured_and_a_table_is_of_one_commit():
    """A row of README's quality tables is one file in docs/results, rounded."""
    files = [json.loads(path.read_text()) for path in (ROOT / "docs" / "results").glob("*.json")]
    files = [file for file in files if file.keys() >= {"fid", "kid", "precision", "recall", "git_commit"}]
    section = re.search(r"## Results\n(.*?)\n## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert tables
    for table in tables:
        rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()[2:]]
        commits = [{file["git_commit"] for file in files if results_row(file) == row} for row in rows]
        assert set.intersection(*commits), table


def test_help_texts_are_up_to_date():
    def normal(text):
        return " ".join(text.split()).replace(" (default: False)", "")  # which Python 3.10 adds to --no- flags

    spec = importlib.util.spec_from_file_location("write_help", ROOT / "docs" / "write_help.py")
    write_help = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(write_help)
    for script in write_help.SCRIPTS:
        written = (ROOT / "docs" / f"{script}-help.txt").read_text(encoding="utf-8")
        assert normal(write_help.help_text(script)) == normal(written), "run: python docs/write_help.py"


def test_commands_of_the_readme_run_in_their_order(tmp_path, monkeypatch, capsys):
    """From "Quick start" to "Your own photos", in one folder, with small networks and drawn photos."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"## Quick start\n(.*?)\n## Play", readme, re.DOTALL)[1]
    (tmp_path / "my_photos").mkdir()
    with zipfile.ZipFile(tmp_path / "img_align_celeba.zip", "w") as archive:
        for number in range(24):
            photo = tmp_path / "my_photos" / f"{number:06d}.jpg"
            draw_face(0, number).save(photo)
            archive.write(photo, f"img_align_celeba/{photo.name}")
    lines = (f"{number:06d}.jpg {2 * (number % 3 == 0)}\n" for number in range(24))
    (tmp_path / "list_eval_partition.txt").write_text("".join(lines))
    torch.save(random_inception(tf2015=True).state_dict(), tmp_path / "inception.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preprocess, "draw_demo", partial(preprocess.draw_demo, number=40))  # 2,000 take 20 s
    ran = []
    for program, *words in fenced_commands(section):
        if program == "python":
            script = importlib.import_module(words[0].removesuffix(".py"))
            words = [str(ROOT / word) if word.startswith("pretrained/") else word for word in words]
            flags = "--epochs 1 --batch-size 8 --device cpu" if "--init" in words else SMALL.get(words[0], "")
            script.main([*words[1:], *flags.split()])
            ran.append(words[0].removesuffix(".py"))
            if script is evaluate:
                assert capsys.readouterr().out.splitlines()[-1].startswith("Fréchet Inception Distance (FID): ")
    celeba = ["preprocess", "train", "train", "generator", "evaluate"]
    assert ran == ["generator", "train", *celeba, "preprocess", "train", "generator"]
    for name in ("faces_grid.png", "runs/demo/generator.params", "runs/best/training.gif", "my_faces_grid.png"):
        assert (tmp_path / name).is_file(), name
