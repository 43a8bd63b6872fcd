"""Runs generator.py, evaluate.py and train.py on damaged input: each run must succeed or end with one sentence.

    python tests/fuzz_scripts.py --count 20000 --seed 0              # input i depends on (seed, i) alone
    python tests/fuzz_scripts.py --first 4711 --count 1              # one input again

The input is a file of weights, an .npz of statistics or of images, a folder of images, or the folder of a training.
The exit code is 1 after another exception, a message of several lines, a run over 60 s, a changed input file or a
half-written output. The folder of the failing run stays.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import io
import os
import shutil
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from fuzz_preprocess import damage, damaged_file
from helpers import random_inception, run_training
from PIL import Image

import evaluate
import generator
import network
import preprocess
from support.cli import HelpFormatter, int_at_least, run
from support.files import UserError
from support.weights import load_tensors

MAX_SECONDS = 60
STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")  # the layers of Inception-v3 up to 64 features


def make_good(folder: Path) -> None:
    """Undamaged input of every kind: faces in data/64, weights, .npz files and a finished training in run."""
    data = folder / "data"
    preprocess.main(["--demo", "6", "--dataroot", str(data), "--sizes", "64", "--workers", "0"])
    for name in ("a", "b"):  # the split by hash leaves too few for a test set
        shutil.copytree(data / "64" / "train", data / "64" / "test" / name)
    run_training(data, folder / "run", "--batch-size", 4, "--epochs", 1)
    torch.save(network.Generator(8, 4).state_dict(), folder / "generator.params")
    stem = {k: v for k, v in random_inception(tf2015=True).state_dict().items() if k.startswith(STEM)}
    torch.save(stem, folder / "inception.pth")
    images = np.stack([np.asarray(Image.open(path)) for path in sorted((data / "64" / "train").glob("*.png"))[:3]])
    np.savez(folder / "images.npz", images)
    measure(folder, "--images", folder / "images.npz", "--real", data / "64" / "test", "--save-stats",
            folder / "statistics.npz", "--no-floor")


def measure(good: Path, *flags) -> None:
    weights = [] if "--weights" in flags else ["--weights", good / "inception.pth"]
    common = ["--inception", "tf2015", "--dims", "64", "--device", "cpu", "--dataroot", good / "data"]
    evaluate.main([str(flag) for flag in (*common, *weights, *flags)])


# ---------------------------------------------------------------------------------------------- damage


def odd_tensor(rng: np.random.Generator, tensor: torch.Tensor) -> object:
    """Something else in the place of `tensor`."""
    tensor = tensor if tensor.ndim else tensor[None]
    makers = (
        lambda: None, lambda: 3, lambda: "text", lambda: [tensor], lambda: {"weight": tensor}, lambda: tensor[..., :1],
        lambda: tensor * float("nan"), lambda: tensor + float("inf"), lambda: tensor.bool(), lambda: tensor.long(),
        lambda: tensor.to(torch.complex64), lambda: tensor.double(), lambda: tensor.bfloat16(), lambda: torch.zeros(0),
        lambda: torch.tensor(1.0), lambda: tensor.to_sparse(), lambda: torch.zeros(1).expand(2**40),
        lambda: tensor[None], lambda: torch.nn.Parameter(tensor, False), lambda: tensor.transpose(0, -1),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8), lambda: tensor.to("meta"),
    )
    try:
        return makers[rng.integers(len(makers))]()
    except RuntimeError:  # a tensor that is odd already, such as a quantized one, has no such form
        return torch.zeros(0)


def odd_array(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """Something else in the place of `array`."""
    makers = (
        lambda: array.astype(np.float32), lambda: array.astype(str), lambda: array.astype(object), lambda: array[None],
        lambda: array.astype(np.complex64), lambda: array[:0] if array.ndim else array, lambda: np.array("text"),
        lambda: array * np.float64("nan"), lambda: -array, lambda: array.T[:3] if array.ndim else array,
        lambda: np.array(-1), lambda: np.array(2.5), lambda: np.array(10**12), lambda: np.zeros((0, 0)),
        lambda: np.ones((3, 5, 7, 2), np.uint8), lambda: array.astype(np.uint8), lambda: array.astype(bool),
    )
    try:
        return makers[rng.integers(len(makers))]()
    except (TypeError, ValueError):  # a string has no such type
        return np.array(0)


def edit(rng: np.random.Generator, content: dict, odd) -> dict:
    """`content` with entries that are missing, added, renamed or replaced, perhaps below a key or with a prefix."""
    content = dict(content)
    for _ in range(rng.integers(1, 4)):
        if not content:
            break
        key = list(content)[rng.integers(len(content))]
        action = rng.integers(5)
        if action == 0:
            del content[key]
        elif action == 1:
            content[f"{key}x"] = content.pop(key)
        elif action == 2 and isinstance(content[key], dict):
            content[key] = edit(rng, content[key], odd)
        elif isinstance(content[key], (torch.Tensor, np.ndarray)):
            content[key] = odd(rng, content[key])
        else:
            content[key] = [None, -1, "text", {}, [1], 2**70, float("nan")][rng.integers(7)]
    return content


def damage_bytes(rng: np.random.Generator, path: Path) -> None:
    data = bytearray(path.read_bytes() or b"text")
    damage(rng, data)
    path.write_bytes(data)


def damage_weights(rng: np.random.Generator, path: Path) -> None:
    """Edit what torch.save wrote to `path`, or damage its bytes, or both."""
    torch._utils._sparse_tensors_to_validate.clear()  # a load that failed leaves its tensors there for the next one
    if rng.random() < 0.7:
        content = edit(rng, torch.load(path, weights_only=True), odd_tensor)
        wrapped = [content, {"netG": content}, {f"module.{key}": value for key, value in content.items()},
                   {"a": content, "b": content}, list(content)][rng.choice(5, p=[0.6, 0.1, 0.1, 0.1, 0.1])]
        torch.save(wrapped, path, _use_new_zipfile_serialization=bool(rng.random() < 0.8))
    if rng.random() < 0.4:
        damage_bytes(rng, path)


def damage_npz(rng: np.random.Generator, path: Path) -> None:
    """Edit the arrays in the .npz `path`, or damage its bytes, or both."""
    if rng.random() < 0.7:
        with np.load(path) as content:
            arrays = edit(rng, dict(content), odd_array)
        (np.savez, np.savez_compressed)[rng.integers(2)](path, **arrays)
    if rng.random() < 0.4:
        damage_bytes(rng, path)


def damage_folder(rng: np.random.Generator, folder: Path) -> None:
    """Add things to a folder of images, and damage some of the images."""
    for path in sorted(folder.rglob("*.png")):
        if rng.random() < 0.02:
            damage_bytes(rng, path)
    names = ("z.png", "a.jpg", "._a.png", ".hidden.png", "line\nbreak.png", os.fsdecode(b"caf\xe9.png"), "é.png")
    for _ in range(rng.integers(0, 3)):
        path = folder / names[rng.integers(len(names))]
        if path.exists() or path.is_symlink():
            continue
        makers = (
            lambda p: p.touch(), lambda p: p.mkdir(), lambda p: os.mkfifo(p), lambda p: p.symlink_to("nowhere"),
            lambda p: p.symlink_to("."), lambda p: p.write_bytes(damaged_file(0, int(rng.integers(10**6)))[3]),
            lambda p: Image.new("RGB", (64, 63)).save(p, "PNG"), lambda p: Image.new("RGB", (8, 8)).save(p, "PNG"),
            lambda p: Image.new("L", (64, 64)).save(p, "PNG"), lambda p: Image.new("RGB", (64, 64)).save(p, "PNG"),
        )
        makers[rng.integers(len(makers))](path)


def damage_training(rng: np.random.Generator, outdir: Path) -> None:
    """Damage one to three files of a finished training."""
    files = sorted(path for path in outdir.rglob("*") if path.is_file())
    for path in rng.choice(files, rng.integers(1, 4), replace=False):
        if path.suffix == ".pt" and path.is_file():
            damage_weights(rng, path)
        elif rng.random() < 0.2:
            path.unlink(missing_ok=True)
        elif path.is_file():
            damage_bytes(rng, path)


# ---------------------------------------------------------------------------------------------- runs


def copy(good: Path, name: str, folder: Path) -> Path:
    source, target = good / name, folder / "in" / Path(name).name
    target.parent.mkdir()
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return target


def draw_faces(rng: np.random.Generator, good: Path, folder: Path) -> None:
    path = copy(good, ["generator.params", "run/generator.params", "run/checkpoint.pt"][rng.integers(3)], folder)
    damage_weights(rng, path)
    yield
    generator.main(["--params", str(path), "--seeds", "0-2", "--outdir", str(folder / "out"), "--device", "cpu"])


def use_inception(rng: np.random.Generator, good: Path, folder: Path) -> None:
    path = copy(good, "inception.pth", folder)
    damage_weights(rng, path)
    yield
    measure(good, "--images", good / "images.npz", "--no-floor", "--weights", path)


def compare_npz(rng: np.random.Generator, good: Path, folder: Path) -> None:
    path = copy(good, ["statistics.npz", "images.npz"][rng.integers(2)], folder)
    damage_npz(rng, path)
    sides = [path, [good / "statistics.npz", good / "images.npz"][rng.integers(2)]]
    fake, real = sides if rng.random() < 0.5 else sides[::-1]
    yield
    measure(good, "--images", fake, "--real", real, "--save-stats", folder / "out.npz", "--json", folder / "out.json")


def compare_folders(rng: np.random.Generator, good: Path, folder: Path) -> None:
    path = copy(good, "data/64", folder)
    damage_folder(rng, path / "train")
    damage_folder(rng, path / "test")
    yield
    flags = ["--images", path / "train", "--real", path / "test", "--neighbours", folder / "out.png"]
    measure(good, *flags, "--dataroot", folder)


def train_on_folder(rng: np.random.Generator, good: Path, folder: Path) -> None:
    path = copy(good, "data/64", folder)
    damage_folder(rng, path / "train")
    yield
    run_training(folder / "in", folder / "out", "--batch-size", 4, "--epochs", 1)


def resume_training(rng: np.random.Generator, good: Path, folder: Path) -> None:
    path = copy(good, "run", folder).rename(folder / "out")
    damage_training(rng, path)
    yield
    run_training(good / "data", path, "--batch-size", 4, "--epochs", 2, "--resume")


RUNS = {draw_faces: 0.4, use_inception: 0.2, compare_npz: 0.3, compare_folders: 0.05, train_on_folder: 0.03,
        resume_training: 0.02}


def hashes(folder: Path) -> dict[Path, str]:
    """SHA-256 of each regular file below `folder`."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def whole_checkpoints(folder: Path) -> int:
    """Number of checkpoints below `folder` that can be read."""
    count = 0
    for path in folder.rglob("*.pt"):
        with contextlib.suppress(UserError):
            count += len(load_tensors(path, "")) > 0
    return count


def run_one(number: int, seed: int, good: Path, folder: Path) -> tuple[str, str]:
    """Run input `number`. Returns (script, outcome). Raises AssertionError for what must not happen."""
    rng = np.random.default_rng((seed, number))
    case = list(RUNS)[rng.choice(len(RUNS), p=list(RUNS.values()))]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    steps = case(rng, good, folder)
    next(steps)  # makes the input
    before = hashes(folder / "in") if (folder / "in").is_dir() else {}
    checkpoints = whole_checkpoints(folder)
    outcome = "done"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            next(steps, None)
    except UserError as error:
        outcome = "refused"
        assert str(error).strip() and "\n" not in str(error), f"a message of several lines: {error}"
    except SystemExit as end:
        assert end.code, "exit without a code"
        outcome = "refused"
    except BaseException:
        raise AssertionError(traceback.format_exc()) from None
    assert hashes(folder / "in") == before, "an input file has changed"
    assert whole_checkpoints(folder) >= checkpoints, "a checkpoint was lost"
    leftovers = [str(path) for path in folder.rglob("*.tmp")]
    assert not leftovers, f"half-written files: {leftovers}"
    return case.__name__, outcome


def fuzz(count: int, seed: int, folder: Path, first: int = 0, progress: bool = False) -> Counter:
    """Run inputs `first` to `first + count`. Returns {(run, "done" or "refused"): number}."""
    good, counts, start = folder / "good", Counter(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_good(good)
    untouched = hashes(good)
    for done, number in enumerate(range(first, first + count), 1):
        faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                counts[run_one(number, seed, good, folder / "run")] += 1
        except AssertionError as error:
            raise AssertionError(f"input {number}: {error}") from None
        finally:
            faulthandler.cancel_dump_traceback_later()
        if progress and done % 500 == 0:
            print(f"{done:,} inputs, {done / (time.perf_counter() - start):.1f}/s", flush=True)
    assert untouched.items() <= hashes(good).items(), "an undamaged file has changed"
    shutil.rmtree(folder)
    return counts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--count", type=int_at_least(1), default=500, help="inputs")
    parser.add_argument("--first", type=int_at_least(0), default=0, help="number of the first input")
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="seed of the inputs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        counts = fuzz(args.count, args.seed, folder, args.first, progress=True)
    except AssertionError as error:
        print(f"error: {error}; the files are in {folder}")
        raise SystemExit(1) from None
    for case in RUNS:
        done, refused = (counts[case.__name__, outcome] for outcome in ("done", "refused"))
        print(f"{case.__name__:18}{done:8,} done {refused:8,} refused with one sentence")


if __name__ == "__main__":
    run(main)
