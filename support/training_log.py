"""log.jsonl, the log of a training: losses, D(x), D(G(z)) and speed, and the pictures of a finished training.

    row = log_row(state, args, epoch=1, steps=20, throughput=throughput, log=file)
    rows = read_log(Path("runs/64/log.jsonl"))
"""

import argparse
import json
import math
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from PIL import Image
from tqdm import tqdm

from support.files import atomic_write, name_last_checkpoint
from support.images import save_animation, save_plot
from support.train_state import Setup, Throughput, TrainState
from support.weights import save_tensors

FIELDS = {"step", "epoch", "images_seen", "loss_d", "loss_g", "d_real", "d_fake", "images_per_sec"}  # of each row


def log_row(
    state: TrainState,
    args: argparse.Namespace,
    epoch: int,
    steps: int,
    throughput: Throughput,
    log: TextIO | None,
    fid: float | None = None,
) -> dict:
    """Append a row, means over the last `steps`, to the file `log` (if any) and return it. Warns when D has won.

    Raises UserError when a loss is NaN or infinite.
    """
    state.refuse_divergence(args.outdir)
    loss_d, loss_g, d_real, d_fake = (round(mean, 6) for mean in (state.totals / steps).tolist())
    state.totals.zero_()
    speed = throughput.images_per_sec(state.step, args.batch_size)
    row = {"step": state.step, "epoch": epoch, "images_seen": state.step * args.batch_size}
    row |= {"loss_d": loss_d, "loss_g": loss_g, "d_real": d_real, "d_fake": d_fake}
    row |= {"images_per_sec": round(speed, 1)} | ({} if fid is None else {"fid": round(fid, 4)})
    if log:
        if loss_d < 1e-3:
            tqdm.write(
                f"warning: D has won at step {state.step} (loss {loss_d:.1e}): G learns next to nothing; if this "
                f"lasts, start again with a smaller --ndf or --lr ({name_last_checkpoint(args.outdir)})",
                file=sys.stderr,
            )
        log.write(json.dumps(row) + "\n")
        log.flush()
    return row


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


def measure_fid(state: TrainState, setup: Setup) -> float:
    """The FID of the EMA weights. They become generator_best.params if no earlier FID in the log is lower."""
    outdir = setup.args.outdir
    with setup.throughput.paused():
        fid = setup.score(state.netG_ema)
    best = min([row["fid"] for row in read_log(outdir / "log.jsonl", state.step) if "fid" in row], default=fid)
    if fid <= best and setup.log:
        save_tensors(state.netG_ema.state_dict(), outdir / "generator_best.params")
    return fid


def save_summary(outdir: Path) -> None:
    """Draw losses.png, fid.png where FIDs were measured, and training.gif of a finished training."""
    rows = read_log(outdir / "log.jsonl")
    if rows:
        save_plot(rows, {"loss_d": "#1f77b4", "loss_g": "#d62728"}, outdir / "losses.png")
    measured = [row for row in rows if "fid" in row]
    if measured:
        save_plot(measured, {"fid": "#2ca02c"}, outdir / "fid.png")
    grids = []
    for path in sorted((outdir / "samples").glob("epoch_*.png")):
        with suppress(Exception):  # decoders raise any kind; the animation leaves out a damaged picture
            grids.append(Image.open(path).convert("RGB"))
    if grids:
        save_animation(grids, outdir / "training.gif", milliseconds=400)


def next_commands(outdir: Path, dataroot: Path) -> str:
    """What to run after the training in `outdir`. The commands are quoted for a shell."""
    params, samples = outdir / "generator.params", outdir / "samples"
    draw = ["python", "generator.py", "--params", str(params), "--grid", "--interpolate"]
    draw += ["--outdir", str(outdir / "faces")]  # faces/ may hold those of another generator
    measure = ["python", "evaluate.py", "--params", str(params), "--dataroot", str(dataroot)]
    return f"\ntrained: {params}; look at {samples}; next:\n  {shlex.join(draw)}\n  {shlex.join(measure)}"
