"""generator.params -> faces: faces/00000007.png is what seed 7 draws.

    python generator.py                                        # 64 faces of your training, or of a pretrained generator
    python generator.py --params runs/128/generator.params --seeds 0-9999 --outdir fakes
    python generator.py --seeds 3,14,15 --grid --interpolate   # also one picture of all, and a morph between them
    python generator.py --arithmetic "1,2,3 - 4,5,6 + 7,8,9"   # a sum of the mean faces of three groups of seeds
    python generator.py --project me.jpg you.jpg               # the faces that come nearest to photos -> projections/
    python generator.py --latents projections/me.latents projections/you.latents --interpolate --outdir morph
    python generator.py --page faces.html                      # a page that draws faces in any browser, offline
    torchrun --nproc-per-node 4 -- generator.py --seeds 0-9999 # four GPUs share the faces

Image size and widths follow from the weights. Weights of the PyTorch DCGAN tutorial (netG_epoch_N.pth) work too,
and so does any checkpoint that holds one generator. In Python: generate(load_generator("generator.params"), [7]).
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

from support.cli import HelpFormatter, existing_path, int_at_least, parse_seeds, parse_terms, prepare, run, user_path
from support.files import OVERWRITE_HELP, PARAMS_REMEDY, PRETRAINED, TRAINED, UserError

MANY = 1000  # faces that processes write
REMEDY = "pass the generator.params of a training to --params"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    params = existing_path(PARAMS_REMEDY)
    image = existing_path("give an image")
    latent_file = existing_path("make one with --project")
    add = parser.add_argument_group("model").add_argument
    add("--params", type=params, help=f"weights of the generator (default: {TRAINED}, else the pretrained ones)")
    group = parser.add_argument_group("what to draw (one of these)").add_mutually_exclusive_group()
    add = group.add_argument
    add("--seeds", type=parse_seeds, default="0-63", help="faces to draw, such as 0-63 or 1,5,10-12")
    add("--latents", type=latent_file, nargs="+", metavar="FILE", help="faces of latents that --project found")
    add("--arithmetic", type=parse_terms, metavar="SUM", help="sum of mean faces of seeds: <outdir>_arithmetic.png")
    add("--project", type=image, nargs="+", metavar="PHOTO", help="find the faces that come nearest to photos")
    add = parser.add_argument_group("pictures").add_argument
    add("--mask", type=image, help="for --project: fill the part of each photo where this image is white")
    add("--grid", action="store_true", help="also draw all faces in one picture, <outdir>_grid.png")
    add("--interpolate", action="store_true", help="also draw a morph of 8 faces, <outdir>_interpolation.gif")
    add("--page", type=user_path, metavar="FILE", help="instead write a web page that draws these faces and new ones")
    add("--outdir", type=user_path, help="folder for the pictures (default: faces; projections for --project)")
    add("--overwrite", action="store_true", help=OVERWRITE_HELP)
    add = parser.add_argument_group("hardware").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is faster on hardware with bf16 support")
    add("--batch-size", type=int_at_least(1), default=128, help="faces to draw at a time")
    args = parser.parse_args(argv)
    if args.mask and not args.project:
        parser.error("--mask goes with --project")
    if (args.grid or args.interpolate or args.page) and (args.project or args.arithmetic):
        parser.error("--grid, --interpolate and --page go with --seeds or --latents")
    if args.page and (args.grid or args.interpolate or args.outdir):
        parser.error("--page writes one file alone; leave out --grid, --interpolate and --outdir")
    args.outdir = args.outdir or Path("projections" if args.project else "faces")
    return args


if __name__ == "__main__":  # answers --help and refuses mistyped flags before the imports below, which take seconds
    prepare(parse_args)

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataloader import to_float, to_uint8
from network import Generator
from support import distributed
from support.devices import DTYPES, explain_out_of_memory, full_float32, memory_format
from support.files import atomic_write, make_outdir, note_weights, path_next_to, printable, refuse_existing
from support.images import encode_png, image_grid, save_animation, save_image, side_by_side, to_pil
from support.latent_space import arithmetic, interpolate, mean_latent, neighbours, read_latents
from support.page import draw_page
from support.projection import ITERATIONS, complete, project, psnr, read_photo
from support.seeding import latents
from support.weights import add_counters, check_tensors, find_generator, generator_sizes, load_tensors, save_tensors
from support.workers import count_cores, iterate_in_processes


def choose_params(params: Path | None) -> Path:
    """`params`, else the generator that train.py made here, else the pretrained one, with a note on standard error."""
    if params or TRAINED.exists() or not PRETRAINED.exists():
        return params or TRAINED
    if distributed.is_first_rank():
        print(f"note: there is no {TRAINED} yet; this is the pretrained generator, {PRETRAINED}", file=sys.stderr)
    return PRETRAINED


def load_generator(path: str | Path, device: str | torch.device = "cpu", precision: str = "fp32") -> Generator:
    """The generator in `path`, in eval mode, its tensors of DTYPES[precision]. Raises UserError that names the file."""
    content = load_tensors(path, PARAMS_REMEDY)
    layout = memory_format(torch.device(device), precision)
    return generator_from_state_dict(content, path).to(device, DTYPES[precision], memory_format=layout)


def generator_from_state_dict(content: dict, path: str | Path) -> Generator:
    """Build the one Generator that `content` holds. Its sizes follow from the shapes of the weights alone.

    Reads weights of this repository and of the DCGAN tutorial in any floating-point type. `content` is a state dict,
    with any prefix before its names, or a dictionary that holds one. Raises UserError, which names `path`, for
    anything else.
    """
    state = find_generator(content, path, REMEDY)
    with torch.device("meta"):  # takes no memory before the shapes have been compared
        netG = Generator(**generator_sizes(state))
    expected = netG.state_dict()
    state = add_counters(state, expected)
    check_tensors(state, expected, path, "a DCGAN generator", REMEDY)
    extra = [name for name in state if name not in expected]
    if extra:
        raise UserError(f"{path} does not hold a DCGAN generator (see {printable(extra[0])}); {REMEDY}")
    netG.load_state_dict({name: t.to(expected[name].dtype) for name, t in state.items()}, assign=True)
    return netG.eval().requires_grad_(False)


@torch.inference_mode()
def draw(netG: Generator, z: torch.Tensor) -> torch.Tensor:
    """Images uint8 (N,3,S,S), on the CPU, of latents (N,nz,1,1). Raises UserError when the device's memory is full."""
    with explain_out_of_memory("lower --batch-size"):
        return to_uint8(netG(z.to(next(netG.parameters())))).cpu().contiguous()


def sample(netG: Generator, seeds: Sequence[int], batch_size: int = 128) -> Iterator[torch.Tensor]:
    """Images uint8 (n,3,S,S), on the CPU, of `seeds` in their order, `batch_size` at a time."""
    for start in range(0, len(seeds), batch_size):
        yield draw(netG, latents(seeds[start : start + batch_size], netG.nz))


def generate(netG: Generator, seeds: Sequence[int]) -> list[Image.Image]:
    """The faces of `seeds` as PIL images."""
    return [to_pil(face) for faces in sample(netG, seeds) for face in faces]


def write_pngs(faces: tuple[np.ndarray, Sequence[Path]]) -> int:
    """One PNG for each of the pixels uint8 (N,H,W,3) at its path. Returns N."""
    for pixels, path in zip(*faces):
        with atomic_write(path) as file:
            file.write(encode_png(pixels))
    return len(faces[1])


def save_faces(batches: Iterable[torch.Tensor], paths: Sequence[Path], workers: int = 0) -> None:
    """One PNG a face, written by `workers` processes while this one draws."""
    remaining = iter(paths)
    faces = ((images.permute(0, 2, 3, 1).numpy(), list(islice(remaining, len(images)))) for images in batches)
    remedy = "free some memory and run the same command again with --overwrite"
    written = iterate_in_processes(write_pngs, faces, workers, remedy, ahead=2 * workers)
    hidden = None if distributed.is_first_rank() else True
    with closing(written), tqdm(total=len(paths), desc="faces", unit="img", disable=hidden) as bar:
        for number in written:
            bar.update(number)


def draw_faces(args: argparse.Namespace, netG: Generator) -> str:
    """The faces of --seeds or --latents, --grid and --interpolate. The processes of torchrun share the faces."""
    named = read_latents(args.latents or (), netG.nz)
    paths = [args.outdir / f"{name}.png" for name in named or (f"{seed:08d}" for seed in args.seeds)]
    grid = path_next_to(args.outdir, "_grid.png") if args.grid else None
    animation = path_next_to(args.outdir, "_interpolation.gif") if args.interpolate else None
    make_outdir(args.outdir, [*paths, *filter(None, (grid, animation))], args.overwrite)
    distributed.wait_for_ranks()  # no process writes before all have looked for existing pictures
    if distributed.is_first_rank():
        note_weights(args.outdir, args.params, paths)
    if named:
        z = torch.stack(list(named.values()))
        batches = map(partial(draw, netG), distributed.my_share(z).split(args.batch_size))
    else:
        batches = sample(netG, distributed.my_share(args.seeds), args.batch_size)
    if grid:
        batches = list(batches)
        shares = distributed.gather(batches)
        if distributed.is_first_rank():
            faces = torch.cat([batch for share in shares for batch in share])
            save_image(image_grid(faces, max(8, round(len(faces) ** 0.5))), grid)
    workers = count_cores() if len(paths) >= MANY else 0
    save_faces(batches, distributed.my_share(paths), workers // distributed.rank_and_world_size()[1])
    if animation and distributed.is_first_rank():
        path = interpolate(z[:8] if named else latents(args.seeds[:8], netG.nz))
        frames = [image_grid(face[None]) for part in path.split(args.batch_size) for face in draw(netG, part)]
        save_animation(frames, animation)
    pictures = (f", {what} in {path}" for what, path in (("grid", grid), ("interpolation", animation)) if path)
    size = f"{netG.image_size}x{netG.image_size}"
    return f"{len(paths)} faces of {size} from {args.params} in {args.outdir}{''.join(pictures)}"


def draw_arithmetic(args: argparse.Namespace, netG: Generator) -> str:
    """A row for each group: its faces and their mean face. On the right, the sum in the middle of eight neighbours."""
    path = path_next_to(args.outdir, "_arithmetic.png")
    refuse_existing([path], args.overwrite, "--outdir")
    groups = [(sign, latents(seeds, netG.nz)) for sign, seeds in args.arithmetic]
    z = arithmetic(groups)
    if not z.isfinite().all():
        raise UserError("the groups of --arithmetic cancel each other; give others")
    columns = max(len(group) for _, group in groups)
    rows = []
    for _, group in groups:
        faces = draw(netG, torch.cat([group, mean_latent(group)]))
        white = torch.full_like(faces[:1], 255).expand(columns - len(group), -1, -1, -1)
        rows += [faces[:-1], white, faces[-1:]]
    around = neighbours(z)
    nine = draw(netG, torch.cat([around[:4], z, around[4:]]))
    save_image(side_by_side(image_grid(torch.cat(rows), columns + 1), image_grid(nine, 3)), path)
    return f"sum of {len(groups)} groups of faces in {path}"


@full_float32()
def project_photos(args: argparse.Namespace, netG: Generator) -> str:
    """Writes <name>.latents and <name>_projected.png (photo, face, difference); --mask adds <name>_completed.png."""
    endings = [".latents", "_projected.png"] + ["_completed.png"] * bool(args.mask)
    targets = [[args.outdir / f"{path.stem}{ending}" for ending in endings] for path in args.project]
    if len({target[0] for target in targets}) < len(targets):
        raise UserError("--project: two photos have the same name without its ending; rename one")
    photos = [read_photo(path, netG.image_size, args.mask) for path in args.project]
    make_outdir(args.outdir, [path for paths in targets for path in paths], args.overwrite)
    lines = []
    with tqdm(total=len(photos) * ITERATIONS, desc="project", disable=None) as bar:
        for path, (photo, hole), (latents_path, projected, *completed) in zip(args.project, photos, targets):
            z = project(netG, to_float(photo), ~hole, bar.update)
            face = draw(netG, z)[0]
            difference = (photo.int() - face.int()).abs().to(torch.uint8)
            save_tensors({"latents": z}, latents_path)
            save_image(image_grid(torch.stack([photo, face, difference])), projected)
            if completed:
                save_image(to_pil(complete(photo, face, hole)), completed[0])
            files = ", ".join(map(str, (latents_path, projected, *completed)))
            lines.append(f"{path}: {files}, PSNR {psnr(photo[:, ~hole], face[:, ~hole]):.1f} dB")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with distributed.joined_ranks(args.device) as device:
        args.params = choose_params(args.params)
        netG = load_generator(args.params, device, args.precision)
        if not (args.arithmetic or args.project or args.page):
            message = draw_faces(args, netG)
            distributed.wait_for_ranks()
        elif distributed.is_first_rank():
            message = (draw_page if args.page else draw_arithmetic if args.arithmetic else project_photos)(args, netG)
        if distributed.is_first_rank():
            print(message)


if __name__ == "__main__":
    run(main)
