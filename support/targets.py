"""Where generator.py writes. UserErrors say what is in the way. Imports no torch.

    paths, grid, animation = face_targets(args, args.seeds)
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from support.files import UserError, check_outputs, printable, refuse_existing

LATENTS_REMEDY = "make one with --project"


def face_targets(args: argparse.Namespace, names: Iterable[int | str]) -> tuple[list[Path], Path | None, Path | None]:
    """Paths of the faces of these seeds or names, of the grid and of the morph, None where a flag is missing."""
    paths = [args.outdir / (f"{name:08d}.png" if isinstance(name, int) else f"{name}.png") for name in names]
    grid = path_next_to(args.outdir, "_grid.png") if args.grid else None
    animation = path_next_to(args.outdir, "_interpolation.gif") if args.interpolate else None
    refuse_existing([*paths, *filter(None, (grid, animation))], args.overwrite, "--outdir")
    return paths, grid, animation


def arithmetic_target(args: argparse.Namespace) -> Path:
    """Path of the picture of a sum."""
    path = path_next_to(args.outdir, "_arithmetic.png")
    refuse_existing([path], args.overwrite, "--outdir")
    return path


def page_target(args: argparse.Namespace) -> Path:
    """Path of the HTML page."""
    check_outputs({"--page": args.page}, args.overwrite, [args.params, *(args.latents or ())])
    return args.page


def projection_targets(args: argparse.Namespace) -> list[list[Path]]:
    """Paths of the latents and of the one or two pictures of each photo, which must exist."""
    for photo in filter(None, (*args.project, args.mask)):
        if not photo.exists():
            raise UserError(f"{printable(photo)} cannot be read (it does not exist); give an image")
    endings = (".latents", "_projected.png", *["_completed.png"] * bool(args.mask))
    targets = [[args.outdir / f"{path.stem}{ending}" for ending in endings] for path in args.project]
    if len({target[0] for target in targets}) < len(targets):
        raise UserError("--project: two photos have the same name without its ending; rename one")
    refuse_existing([path for paths in targets for path in paths], args.overwrite, "--outdir")
    return targets


def path_next_to(outdir: Path, ending: str) -> Path:
    """faces_grid.png for faces: pictures of several faces lie next to the folder, which holds nothing but faces."""
    named = outdir if outdir.name not in ("", "..") else outdir.resolve()
    if not named.name:
        raise UserError(f"there is no place next to --outdir {outdir} for a picture of all faces; choose another")
    return named.with_name(named.name + ending)
