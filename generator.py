"""generator.params -> faces: faces/00000007.png is what seed 7 draws.

    python generator.py                                        # 64 faces of your training, or of a pretrained generator
    python generator.py --params runs/128/generator.params --seeds 0-9999 --outdir fakes
    python generator.py --seeds 3,14,15 --grid --interpolate   # also one picture of all, and a morph between them
    torchrun --nproc-per-node 4 -- generator.py --seeds 0-9999 # four GPUs share the faces

Image size and widths follow from the weights. Weights of the PyTorch DCGAN tutorial (netG_epoch_N.pth) work too,
and so does any checkpoint that holds one generator.
"""

if __name__ == "__main__":  # before the imports below, which take seconds and need packages
    from support.startup import prepare
    prepare()

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from dataloader import to_uint8
from network import Generator
from support import distributed
from support.cli import HelpFormatter, count_cores, int_at_least, run
from support.devices import DTYPES, explain_out_of_memory
from support.files import OVERWRITE_HELP, UserError, atomic_write, printable, refuse_existing
from support.images import encode_png, image_grid, save_animation, save_image
from support.seeding import latents
from support.weights import add_counters, check_tensors, find_networks, load_tensors

FRAMES = 24  # of the morph from one seed to the next
TRAINED = Path("runs/64/generator.params")
PRETRAINED = Path(__file__).resolve().parent / "pretrained" / "generator_64.params"
REMEDY = "pass the generator.params of a training to --params"


def default_params() -> Path:
    """The generator that train.py made here. If there is none, the pretrained one, with a note on standard error."""
    if TRAINED.exists() or not PRETRAINED.exists():
        return TRAINED
    if distributed.is_first_rank():
        print(f"note: there is no {TRAINED} yet; this is the pretrained generator, {PRETRAINED}", file=sys.stderr)
    return PRETRAINED


def load_generator(path: str | Path, device: str | torch.device = "cpu", precision: str = "fp32") -> Generator:
    """The generator in `path`, in eval mode, its tensors of DTYPES[precision]. Raises UserError that names the file."""
    content = load_tensors(path, "make one with `python train.py`, or pass another to --params")
    return generator_from_state_dict(content, path).to(device, DTYPES[precision], memory_format=torch.channels_last)


def generator_from_state_dict(content: dict, path: str | Path) -> Generator:
    """Build the one Generator that `content` holds. Its sizes follow from the shapes of the weights alone.

    Reads weights of this repository and of the DCGAN tutorial in any floating-point type. `content` is a state dict,
    with any prefix before its names, or a dictionary that holds one. Raises UserError, which names `path`, for
    anything else.
    """
    state = find_generator(content, path)
    kernels = kernels_of(state)
    nz, ngf, image_size = kernels[0].shape[0], kernels[-1].shape[0], 2 ** (len(kernels) + 1)
    with torch.device("meta"):  # takes no memory before the shapes have been compared
        netG = Generator(nz, ngf, image_size)
    expected = netG.state_dict()
    state = add_counters(state, expected)
    check_tensors(state, expected, path, "a DCGAN generator", REMEDY)
    extra = [name for name in state if name not in expected]
    if extra:
        raise UserError(f"{path} does not hold a DCGAN generator (see {printable(extra[0])}); {REMEDY}")
    netG.load_state_dict({name: t.to(expected[name].dtype) for name, t in state.items()}, assign=True)
    return netG.eval().requires_grad_(False)


def find_generator(content: dict, path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of the one generator in `content`, or of the EMA generator of a checkpoint of train.py."""
    networks = find_networks(content, "main.0.weight")
    networks = {name: state for name, state in networks.items() if kernels_of(state)}
    generators = {name: state for name, state in networks.items() if not is_discriminator(kernels_of(state))}
    if generators.keys() == {"netG", "average"}:
        print(f"note: {path} is a checkpoint; this is its EMA generator, the one of generator.params", file=sys.stderr)
        return generators["average"]
    if len(generators) > 1:
        names = printable(", ".join(name or "one without a prefix" for name in generators))
        raise UserError(f"{path} holds {len(generators)} generators ({names}); save one of them alone, and pass that")
    if not generators:
        if networks:
            raise UserError(f"{path} holds a discriminator, not a generator; {REMEDY}")
        keys = printable(", ".join(map(str, list(content)[:6])))[:200] or "none"
        raise UserError(f"{path} does not hold a DCGAN generator (its keys: {keys}); {REMEDY}")
    [state] = generators.values()
    channels = kernels_of(state)[-1].shape[1]
    if channels != 3:
        raise UserError(f"{path} holds a generator that draws {channels} channel{'s'[channels == 1:]}, not 3; {REMEDY}")
    return state


def kernels_of(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The 4x4 kernels of a DCGAN's convolutions from first to last. Empty where `state` is no DCGAN."""
    layers = {name.split(".")[1]: t for name, t in state.items() if re.fullmatch(r"main\.[0-9]{1,3}\.weight", name)}
    kernels = [layers[i] for i in sorted(layers, key=int) if layers[i].ndim == 4]
    whole = 3 <= len(kernels) <= 10 and all(k.shape[2:] == (4, 4) and k.numel() for k in kernels)
    return kernels if whole else []


def is_discriminator(kernels: list[torch.Tensor]) -> bool:
    """Whether each kernel (out,in,4,4) takes the channels that the one before gives, and the last gives one."""
    return kernels[-1].shape[0] == 1 and all(a.shape[0] == b.shape[1] for a, b in zip(kernels, kernels[1:]))


@torch.inference_mode()
def draw(netG: Generator, z: torch.Tensor) -> torch.Tensor:
    """Images uint8 (N,3,S,S), on the CPU, of latents (N,nz,1,1). Raises UserError when the device's memory is full."""
    with explain_out_of_memory("lower --batch-size"):
        return to_uint8(netG(z.to(next(netG.parameters())))).cpu().contiguous()


def sample(netG: Generator, seeds: Sequence[int], batch_size: int = 128) -> Iterator[torch.Tensor]:
    """Images uint8 (n,3,S,S), on the CPU, of `seeds` in their order, `batch_size` at a time."""
    for start in range(0, len(seeds), batch_size):
        yield draw(netG, latents(seeds[start : start + batch_size], netG.nz))


def save_faces(batches: Iterable[torch.Tensor], seeds: Sequence[int], outdir: Path) -> None:
    """One PNG a seed. One thread a core encodes, and this thread alone writes: writers would wait for the folder."""
    remaining = iter(seeds)
    bar = tqdm(total=len(seeds), desc="faces", unit="img", disable=None if distributed.is_first_rank() else True)
    with ThreadPoolExecutor(count_cores()) as pool, bar:
        for images in batches:  # encoding does not overlap with drawing, which uses all cores of a CPU
            for png, seed in zip(pool.map(encode_png, images), remaining):
                with atomic_write(face_path(outdir, seed)) as file:
                    file.write(png)
            bar.update(len(images))


def face_path(outdir: Path, seed: int) -> Path:
    return outdir / f"{seed:08d}.png"


def path_next_to(outdir: Path, ending: str) -> Path:
    """faces_grid.png for faces: pictures of several faces lie next to the folder, which holds nothing but faces."""
    named = outdir if outdir.name not in ("", "..") else outdir.resolve()
    if not named.name:
        raise UserError(f"there is no place next to --outdir {outdir} for a picture of all faces; choose another")
    return named.with_name(named.name + ending)


def interpolate(z: torch.Tensor, frames: int = FRAMES) -> torch.Tensor:
    """Latents (N*frames,nz,1,1) on a closed path through `z` (N,nz,1,1), along great circles.

    The latents of a normal distribution in many dimensions have nearly equal lengths. Great circles keep this length,
    while straight lines would pass nearer to the origin (White, "Sampling Generative Networks", 2016).
    """
    path = []
    for a, b in zip(z, z.roll(-1, 0)):
        angle = torch.acos((torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())).clamp(-0.9999, 0.9999))
        for t in torch.arange(frames) / frames:
            path.append((torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle))
    return torch.stack(path)


def parse_seeds(text: str) -> list[int]:
    """An argparse type: `0-63`, `7` or `1,5,10-12` as a list of seeds, each once."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + 10_000_000:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds such as 0-63 or 1,5,10-12")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--params", type=Path, help=f"weights of the generator (default: {TRAINED}, else the pretrained ones)")
    add = parser.add_argument_group("pictures").add_argument
    add("--seeds", type=parse_seeds, default="0-63", help="faces to draw, such as 0-63 or 1,5,10-12")
    add("--outdir", type=Path, default=Path("faces"), help="folder for the pictures")
    add("--grid", action="store_true", help="also draw all faces in one picture, <outdir>_grid.png")
    add("--interpolate", action="store_true", help="also draw a morph of 8 seeds, <outdir>_interpolation.gif")
    add("--overwrite", action="store_true", help=OVERWRITE_HELP)
    add = parser.add_argument_group("hardware").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--precision", choices=DTYPES, default="fp32", help="bf16 is faster on hardware with bf16 support")
    add("--batch-size", type=int_at_least(1), default=128, help="faces to draw at a time")
    return parser.parse_args(argv)


def check_targets(args: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """The paths of the grid and of the interpolation, each None where its flag is missing.

    Raises UserError when a picture, or a face, would be overwritten without --overwrite.
    """
    grid = path_next_to(args.outdir, "_grid.png") if args.grid else None
    animation = path_next_to(args.outdir, "_interpolation.gif") if args.interpolate else None
    pictures = [*(face_path(args.outdir, seed) for seed in args.seeds), *filter(None, (grid, animation))]
    refuse_existing(pictures, args.overwrite, "--outdir")
    return grid, animation


def make_outdir(outdir: Path) -> None:
    try:
        outdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --outdir {outdir} ({error.strerror}); choose another") from None


def write_pictures(args: argparse.Namespace, netG: Generator, grid: Path | None, animation: Path | None) -> None:
    """Everything that the flags ask for. The processes of torchrun share the faces, and the first writes the rest."""
    seeds = distributed.my_share(args.seeds)
    batches = sample(netG, seeds, args.batch_size)
    if grid:
        batches = list(batches)
        shares = distributed.gather(batches)
        if distributed.is_first_rank():
            faces = torch.cat([batch for share in shares for batch in share])
            save_image(image_grid(faces, max(8, round(len(faces) ** 0.5))), grid)
    save_faces(batches, seeds, args.outdir)
    if animation and distributed.is_first_rank():
        path = interpolate(latents(args.seeds[:8], netG.nz))
        frames = [image_grid(face[None]) for z in path.split(args.batch_size) for face in draw(netG, z)]
        save_animation(frames, animation)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with distributed.joined_ranks(args.device) as device:
        grid, animation = check_targets(args)
        args.params = args.params or default_params()
        netG = load_generator(args.params, device, args.precision)
        make_outdir(args.outdir)
        distributed.wait_for_ranks()  # no process writes before all have looked for existing pictures
        write_pictures(args, netG, grid, animation)
        distributed.wait_for_ranks()
        if not distributed.is_first_rank():
            return
    size = f"{netG.image_size}x{netG.image_size}"
    pictures = (f", {what} in {path}" for what, path in (("grid", grid), ("interpolation", animation)) if path)
    print(f"{len(args.seeds)} faces of {size} from {args.params} in {args.outdir}{''.join(pictures)}")


if __name__ == "__main__":
    run(main)
