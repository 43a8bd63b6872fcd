"""log.jsonl, the log of a training: losses, D(x), D(G(z)) and speed, and the pictures of a finished training.

    log = TrainingLog(outdir, state.step, len(dataset), batch_size, signals, score=None)
    log.add_row(state, steps=20)
    rows = read_log(Path("runs/64/log.jsonl"))
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image
from tqdm import tqdm

from support.checkpoint import TrainState
from support.distributed import gather, is_first_rank
from support.files import atomic_write, name_last_checkpoint
from support.images import save_animation, save_plot
from support.weights import save_tensors

WRITE_EVERY = 30  # seconds between checkpoints on a GPU, where an epoch may take less than a second
MAX_FRAMES = 60  # of training.gif
MAX_WIDTH = 512  # in pixels, of training.gif
FIELDS = {"step", "epoch", "images_seen", "loss_d", "loss_g", "d_real", "d_fake", "images_per_sec"}  # of each row


class Throughput:
    """Training speed in images per second, measured between calls and without pauses."""

    def __init__(self, step: int):
        self.step = step
        self.start = time.perf_counter()

    def images_per_sec(self, step: int, batch_size: int) -> float:
        """Speed since the last call, or since this object was made."""
        now = time.perf_counter()
        speed = (step - self.step) * batch_size / (now - self.start)
        self.step = step
        self.start = now
        return speed


class TrainingLog:
    """log.jsonl, speed, FID and the signals of a training. Each process has one, and only the first writes the file.

    `score` gives the FID of a generator, for --eval-every. `signals` receives the numbers of the signals to stop at.
    """

    def __init__(
        self, outdir: Path, step: int, images: int, batch_size: int, signals: list[int], score: Callable | None
    ):
        self.outdir = outdir
        self.batch_size = batch_size
        self.steps_per_epoch = images // batch_size
        self.signals = signals
        self.score = score
        self.file = continue_log(outdir / "log.jsonl", step) if is_first_rank() else None
        self.throughput = Throughput(step)
        self.epoch_throughput = Throughput(step)
        self.last_write = time.perf_counter()

    def is_time_to_write(self, device: torch.device) -> bool:
        """Whether an epoch ends with files: always, but on a GPU only WRITE_EVERY seconds after the last time."""
        now = time.perf_counter()
        due = gather(device.type != "cuda" or now - self.last_write > WRITE_EVERY)[0]  # all processes do the same
        if due:
            self.last_write = now
        return due

    def add_row(self, state: TrainState, steps: int, fid: float | None = None) -> dict:
        """Append a row, means over the last `steps`, and return what a progress bar shows of it. Warns when D has won.

        At the end of an epoch, the row has the speed of the epoch with all that was written since its beginning.
        Raises UserError when a loss is NaN or infinite.
        """
        state.refuse_divergence(self.outdir)
        loss_d, loss_g, d_real, d_fake = (round(mean, 6) for mean in (state.totals / steps).tolist())
        state.totals.zero_()
        row = {"step": state.step, "epoch": -(-state.step // self.steps_per_epoch)}
        row |= {"images_seen": state.step * self.batch_size}
        shown = {"loss_d": loss_d, "loss_g": loss_g, "d_real": d_real, "d_fake": d_fake}
        shown["images_per_sec"] = round(self.throughput.images_per_sec(state.step, self.batch_size), 1)
        if state.step % self.steps_per_epoch == 0:
            speed = self.epoch_throughput.images_per_sec(state.step, self.batch_size)
            shown["epoch_images_per_sec"] = round(speed, 1)
        if fid is not None:
            shown["fid"] = round(fid, 4)
        if self.file:
            self.warn(state.step, loss_d)
            self.file.write(json.dumps(row | shown) + "\n")
            self.file.flush()
        return {name: f"{value:.3g}" for name, value in shown.items()}

    def warn(self, step: int, loss_d: float) -> None:
        """Warn when D has won."""
        if loss_d < 1e-3:
            tqdm.write(
                f"warning: D has won at step {step} (loss {loss_d:.1e}): G learns next to nothing; if this "
                f"lasts, start again with a smaller --ndf or --lr ({name_last_checkpoint(self.outdir)})",
                file=sys.stderr,
            )

    def measure_fid(self, state: TrainState) -> float:
        """The FID of the EMA weights. They become generator_best.params if no earlier FID in the log is lower."""
        before = time.perf_counter()
        fid = self.score(state.netG_ema)
        for throughput in (self.throughput, self.epoch_throughput):
            throughput.start += time.perf_counter() - before
        best = min([row["fid"] for row in read_log(self.outdir / "log.jsonl", state.step) if "fid" in row], default=fid)
        if fid <= best and self.file:
            save_tensors(state.netG_ema.state_dict(), self.outdir / "generator_best.params")
        return fid

    def close(self) -> None:
        if self.file:
            self.file.close()


def read_log(path: Path, last_step: int = sys.maxsize) -> list[dict]:
    """The rows of log.jsonl up to `last_step`, without damaged ones. A killed training may leave half a row."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError, OverflowError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and row.keys() >= FIELDS and all(map(math.isfinite, row.values())):
                rows.append(row)
    return [row for row in rows if row["step"] <= last_step]


def continue_log(path: Path, step: int) -> TextIO:
    """The file, open for further rows, without the rows that a killed training wrote after `step`."""
    rows = read_log(path, step)
    with atomic_write(path, durable=True) as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    return path.open("a")


def save_summary(outdir: Path) -> None:
    """Draw losses.png, fid.png where FIDs were measured, and training.gif of a finished training."""
    rows = read_log(outdir / "log.jsonl")
    if rows:
        save_plot(rows, {"loss_d": "#1f77b4", "loss_g": "#d62728"}, outdir / "losses.png")
    measured = [row for row in rows if "fid" in row]
    if measured:
        save_plot(measured, {"fid": "#2ca02c"}, outdir / "fid.png")
    paths = sorted((outdir / "samples").glob("epoch_*.png"), key=lambda path: (len(path.name), path.name))
    chosen = sorted({round(i * (len(paths) - 1) / (MAX_FRAMES - 1)) for i in range(MAX_FRAMES)}) if paths else []
    grids = []
    for i in tqdm(chosen, "training.gif", leave=False, disable=None):
        with suppress(Exception):  # decoders raise any kind; the animation leaves out a damaged picture
            grid = Image.open(paths[i]).convert("RGB")
            grid.thumbnail((MAX_WIDTH, MAX_WIDTH))
            grids.append(grid)
    if grids:
        save_animation(grids, outdir / "training.gif", milliseconds=400)


def next_commands(outdir: Path, dataroot: Path) -> str:
    """What to run after the training in `outdir`. The commands are quoted for a shell."""
    params, samples = outdir / "generator.params", outdir / "samples"
    draw = ["python", "generator.py", "--params", str(params), "--grid", "--interpolate"]
    draw += ["--outdir", str(outdir / "faces")]  # faces/ may hold those of another generator
    measure = ["python", "evaluate.py", "--params", str(params), "--dataroot", str(dataroot)]
    return f"\ntrained: {params}; look at {samples}; next:\n  {shlex.join(draw)}\n  {shlex.join(measure)}"
