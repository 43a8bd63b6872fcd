"""Output, signals and printed commands of the scripts: support/cli.py."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import PROGRAMS, ROOT, run_python, start, wait_for
from PIL import Image

import evaluate
import generator
import network
import preprocess
import train
from support.cli import set_up_streams, user_path
from support.training_log import next_commands

posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")


@pytest.fixture
def params(tmp_path):
    """A file of random generator weights."""
    torch.manual_seed(0)
    torch.save(network.Generator(16, 8).state_dict(), tmp_path / "g.params")
    return tmp_path / "g.params"


@pytest.fixture
def shell(tmp_path):
    """Runs a line of bash in an empty folder with $python; returns the finished process."""

    def run(line, **environment):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "python": sys.executable, "root": str(ROOT)} | environment
        return subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )

    return run


# ---------------------------------------------------------------------------------------------- answers without torch


@pytest.fixture
def run_without_torch(tmp_path):
    """Runs a script where `import torch` fails."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "torch.py").write_text("raise ImportError('torch was imported')")
    return lambda script, *flags: run_python(
        ROOT / f"{script}.py", *flags, cwd=tmp_path, PYTHONPATH=str(tmp_path / "hidden")
    )


@pytest.mark.parametrize("script", ["preprocess", "generator", "evaluate", "train"])
def test_help_needs_no_torch(run_without_torch, script):
    done = run_without_torch(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script}.py") and not done.stderr, done.stderr


@pytest.mark.parametrize("command, words", [
    ("preprocess nowhere", "nowhere does not exist"),
    ("generator --params nowhere", "argument --params: nowhere does not exist; make one with `python train.py`"),
    ("generator --project nowhere", "argument --project: nowhere does not exist; give an image"),
    ("evaluate --images nowhere", "argument --images: nowhere does not exist; give a folder of images, or an .npz"),
    ("train --lr fast", "argument --lr"),
])
def test_a_mistyped_path_needs_no_torch(run_without_torch, refused, command, words):
    refused(run_without_torch(*command.split()), words)


@pytest.mark.parametrize("script, flags", [
    (generator, ["--seeds", "5-3"]), (generator, ["--arithmetic", "1+2"]), (generator, ["--latents", "nowhere"]),
    (generator, ["--project", "here", "--mask", "nowhere"]), (evaluate, ["--params", "nowhere"]),
    (evaluate, ["--real", "nowhere"]), (evaluate, ["--weights", "nowhere"]), (evaluate, ["--neighbours", "n.gif"]),
])
def test_flags_that_are_refused_as_they_are_parsed(tmp_path, monkeypatch, capsys, script, flags):
    monkeypatch.chdir(tmp_path)
    Path("here").touch()
    with pytest.raises(SystemExit):
        script.parse_args(flags)
    message = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in message and flags[-2] in message


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """No shell replaces it in `--dataroot=~/faces`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "faces").mkdir()
    args = evaluate.parse_args(["--dataroot=~/data", "--images=~/faces", "--json=~/r.json", "--save-stats=~/s"])
    assert (args.dataroot, args.images) == (tmp_path / "data", tmp_path / "faces")
    assert (args.json, args.save_stats) == (tmp_path / "r.json", tmp_path / "s.npz")
    assert generator.parse_args(["--outdir=~/a"]).outdir == tmp_path / "a"
    assert str(user_path("~no-such-user/x")) == "~no-such-user/x"


# ---------------------------------------------------------------------------------------------- encodings and names


@pytest.mark.parametrize("environment", [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "cp1251"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
])
def test_output_in_an_encoding_without_its_characters(tmp_path, environment):
    program = "from support.cli import run; run(lambda: print('Fr\\xe9chet \\udce9'))"
    done = run_python("-c", program, cwd=ROOT, **environment)
    assert done.returncode == 0 and done.stdout == "Fr\\xe9chet \\udce9\n", done.stderr
    done = run_python(ROOT / "evaluate.py", "--help", cwd=tmp_path, **environment)
    assert done.returncode == 0 and "--inception" in done.stdout, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf8(tmp_path, monkeypatch, run_script, weights, params):
    monkeypatch.chdir(tmp_path)
    set_up_streams()
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name / "64" / "train").mkdir(parents=True)
    for i in range(8):
        Image.effect_noise((64, 64), 50 + i).convert("RGB").save(tmp_path / name / "64" / "train" / f"{name}{i}.png")
    images, params = f"{name}/64/train", params.rename(tmp_path / f"{name}.params").name
    flags = ["--inception", "tf2015", "--weights", weights, "--dims", "64", "--images", images, "--real", images]
    outputs = ["--json", f"{name}.json", "--save-stats", f"{name}.npz", "--dataroot", name]
    small = ["--ngf", "4", "--ndf", "4", "--nz", "8", "--batch-size", "8", "--device", "cpu", "--epochs", "1"]
    for script, command in (
        (evaluate, [*flags, *outputs]),
        (evaluate, [*flags[:-4], "--images", f"{name}.npz", "--real", f"{name}.npz"]),
        (generator, ["--params", params, "--seeds", "0", "--outdir", f"{name}/faces", "--grid"]),
        (generator, ["--params", params, "--page", f"{name}.html"]),
        (train, [*small, "--dataroot", name, "--outdir", f"{name}/run"]),
        (preprocess, [images, "--dataroot", f"{name}/out", "--sizes", "32", "--workers", "0"]),
    ):
        script.main([*map(str, command)])
    for written in (f"{name}.json", f"{name}/faces_grid.png", f"{name}.html", f"{name}/run/generator.params"):
        assert (tmp_path / written).is_file()
    assert len(list((tmp_path / name / "out").rglob("*.png"))) == 8
    done = run_script("generator.py", "--params", f"{name}.none")
    assert done.returncode == 2 and "error: argument --params: caf\\udce9.none does not exist; make" in done.stderr


# ---------------------------------------------------------------------------------------------- closed streams


@posix
@pytest.mark.parametrize("redirection", ["2>&-", ">&-", ">&- 2>&- <&-", "| true", "2>&1 | true"])
def test_closed_streams_do_not_stop_a_script(shell, tmp_path, redirection):
    """Nobody reads what it prints to both streams. It goes on to its end, and exits with 0 and without a traceback."""
    (tmp_path / "program.py").write_text(
        "import sys, time\n"
        "from support.cli import run\n\n"
        "def main():\n"
        "    time.sleep(0.2)  # until the reader has gone\n"
        "    for stream in (sys.stdout, sys.stderr):\n"
        "        print('text', file=stream, flush=True)\n"
        "    open('end', 'w')\n\n"
        "run(main)\n"
    )
    done = shell(f'PYTHONPATH="$root" "$python" program.py {redirection}; code=${{PIPESTATUS[0]}}; ls end; exit $code')
    assert done.returncode == 0 and "Error" not in done.stderr and "end" in done.stdout.split(), done.stderr


@posix
def test_many_lines_into_a_closed_pipe(shell):
    """More than a buffer holds. The program goes on to its end."""
    program = "from support.cli import run; run(lambda: [print('x' * 9999) for _ in range(99)] and open('end', 'w'))"
    done = shell(f'PYTHONPATH="$root" "$python" -c "{program}" | true; ls end; exit ${{PIPESTATUS[0]}}')
    assert done.returncode == 0 and done.stdout == "end\n" and done.stderr == "", done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_to_a_full_disk_is_an_error(shell):
    program = "from support.cli import run; run(lambda: print('result'))"
    done = shell(f'PYTHONPATH="$root" "$python" -c "{program}" > /dev/full')
    assert done.returncode == 1 and done.stderr.startswith("error: cannot write the output: No space left"), done.stderr


# ---------------------------------------------------------------------------------------------- Ctrl-C


def interrupt(tmp_path, happened, *arguments):
    """Sends SIGINT to `python <arguments>` once happened(process); returns its exit code in a shell, and stderr."""
    # A test suite in the background of a shell ignores SIGINT and its children inherit that. A terminal does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: happened(process), process)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    return 128 - process.returncode if process.returncode < 0 else process.returncode, errors


@posix
def test_ctrl_c_in_generator(tmp_path, params):
    """Each face that is there is whole."""
    faces = tmp_path / "faces"
    flags = ["--params", params, "--seeds", "0-99999", "--batch-size", "8"]
    code, errors = interrupt(tmp_path, lambda _: any(faces.glob("*.png")), ROOT / "generator.py", *flags)
    assert (code, errors) == (130, "")
    assert not list(faces.glob(".*")) and list(faces.glob("*.png"))
    for path in faces.glob("*.png"):
        with Image.open(path) as face:
            face.load()


@posix
def test_ctrl_c_in_the_middle_of_a_measurement(tmp_path, params, weights, dataroot):
    """The statistics of the real images, which are finished, stay in the cache. No output is begun."""
    shutil.copytree(dataroot / "64", tmp_path / "data" / "64")
    flags = ["--params", params, "--weights", weights, "--inception", "tf2015", "--dims", "64", "--num", "99999"]
    flags += ["--json", "out.json", "--save-stats", "out.npz"]
    cache = tmp_path / "data" / ".statistics"
    code, errors = interrupt(tmp_path, lambda _: any(cache.glob("*.npz")), ROOT / "evaluate.py", *flags)
    assert (code, errors) == (130, "")
    assert len(list(cache.iterdir())) == 1 and not list(tmp_path.glob("*out*"))


@posix
@pytest.mark.parametrize("script, module", [
    ("preprocess", "PIL"), ("generator", "torch"), ("evaluate", "torch"), ("train", "torch"),
])
def test_ctrl_c_during_the_imports(tmp_path, script, module):
    (tmp_path / "data").mkdir()
    flags = ["--demo"] if script == "train" else []
    done = run_python(PROGRAMS / "interrupt_imports.py", module, ROOT / f"{script}.py", *flags, cwd=tmp_path)
    assert done.returncode == -signal.SIGINT and done.stderr == ""  # which a shell reports as 130


def test_ctrl_c_in_main_exits_with_130(tmp_path):
    done = run_python(PROGRAMS / "interrupt_main.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "")


# ---------------------------------------------------------------------------------------------- SIGHUP and commands


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_closed_terminal_stops_a_training_with_a_checkpoint(dataroot, tmp_path):
    """The terminal and its shell both send SIGHUP. The command that goes on is quoted for a shell."""
    outdir = tmp_path / "my run"
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the suite may run under nohup
    process = start(dataroot, outdir, 1, "--epochs", 500)
    signal.signal(signal.SIGHUP, before)
    wait_for((outdir / "generator.params").exists, process)
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGHUP
    assert f"go on with --resume --outdir '{outdir}'" in message


@posix
def test_nohup_keeps_a_training_running(dataroot, tmp_path):
    """The first signal that the training catches gives its exit code."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = start(dataroot, tmp_path / "run", 1, "--epochs", 500)
    signal.signal(signal.SIGHUP, before)
    wait_for((tmp_path / "run" / "generator.params").exists, process)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert "stopped at" in process.communicate(timeout=60)[1] and process.returncode == 128 + signal.SIGTERM


def test_printed_commands_are_quoted(tmp_path):
    lines = next_commands(Path("my runs/64"), Path("o'data")).splitlines()[2:]
    draw, measure = map(shlex.split, lines)
    assert draw[:4] == ["python", "generator.py", "--params", str(Path("my runs/64/generator.params"))]
    assert draw[-2:] == ["--outdir", str(Path("my runs/64/faces"))]
    assert measure[-2:] == ["--dataroot", "o'data"]
