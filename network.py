"""The DCGAN for 64x64 faces: z (N,nz,1,1) -> images (N,3,64,64) -> real or fake (N,1,1,1).

    from network import Generator, Discriminator, latents
    images = Generator()(latents(range(16)))        # float32 in [-1,1]

Architecture and initial weights: Radford, Metz, Chintala, "Unsupervised Representation Learning with Deep
Convolutional Generative Adversarial Networks", 2016. Parameter names (`main.0.weight` ...) are those of the
PyTorch DCGAN tutorial, so that its weights load here.
"""

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: its default arguments would keep that, and its threads, for good
from torch import nn
from torch.nn.functional import linear, pad

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by the names that --precision has


class Generator(nn.Module):
    """Turns latents (N,nz,1,1), drawn from N(0,1), into images (N,3,image_size,image_size) in [-1,1].

    `ngf` is the number of channels before the last layer; every block further from the image has twice as many.
    `image_size` is a power of two; 64 gives four blocks, each size above it one more.
    """

    def __init__(self, nz: int = 100, ngf: int = 64, image_size: int = 64):
        super().__init__()
        self.nz, self.ngf, self.image_size = nz, ngf, image_size
        channels = [ngf * 2**i for i in reversed(range(count_blocks(image_size)))]
        layers = []
        for i, (previous, out) in enumerate(zip([nz, *channels], channels)):
            # The first block sees a 1x1 map and makes it 4x4; the others double it.
            block = (ConvTransposeFrom1x1, ConvTransposeFrom4x4, nn.ConvTranspose2d)[min(i, 2)]
            stride, padding = (1, 0) if i == 0 else (2, 1)
            layers += [block(previous, out, 4, stride, padding, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(ngf, 3, 4, 2, 1, bias=False), nn.Tanh())
        self.apply(init_weights)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z)


class Discriminator(nn.Module):
    """Gives images (N,3,image_size,image_size) in [-1,1] a probability (N,1,1,1), float32, of being real.

    `ndf` is the number of channels of the first block; every further block halves the map and doubles them.
    With `group_norm`, each image is normalised by itself, 16 channels at a time (Wu and He, "Group Normalization",
    2018): BatchNorm sees real images and fakes apart, and takes from both what their means and spreads tell.
    """

    def __init__(self, ndf: int = 64, image_size: int = 64, group_norm: bool = False):
        super().__init__()
        channels = [ndf * 2**i for i in range(count_blocks(image_size))]
        layers = []
        for previous, out in zip([3, *channels], channels):
            conv = ConvTo4x4 if out == channels[-1] else nn.Conv2d
            norm = nn.GroupNorm(out // math.gcd(out, 16), out) if group_norm else nn.BatchNorm2d(out)
            layers += [conv(previous, out, 4, 2, 1, bias=False), norm, nn.LeakyReLU(0.2, inplace=True)]
        del layers[1]  # no norm in the first block: it makes training oscillate (DCGAN paper, section 3)
        self.main = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 4, 1, 0, bias=False), nn.Sigmoid())
        self.apply(init_weights)

    def forward(self, images: torch.Tensor, logits: bool = False) -> torch.Tensor:
        """With `logits`, what the sigmoid is taken of: a loss of it keeps a gradient where a probability is 0 or 1."""
        scores = self.main[:-1](images).float()  # in bf16 a probability above 0.998 would round to 1
        return scores if logits else self.main[-1](scores)


# At a map of 4x4, a CPU's convolutions leave most of its matrix units idle: here they are matrix products, with a row
# for each pixel of each image. benchmarks/speed.md says what that is worth.


class ConvTransposeFrom1x1(nn.ConvTranspose2d):
    """ConvTranspose2d(B, C, 4), of a map of one pixel: (N,B,1,1) -> (N,C,4,4)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x.flatten(1) @ self.weight.permute(0, 2, 3, 1).flatten(1)
        return pixels.unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)


class ConvTransposeFrom4x4(nn.ConvTranspose2d):
    """ConvTranspose2d(B, C, 4, 2, 1), as fast as can be for small maps: (N,B,H,W) -> (N,C,2H,2W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cpu:
            return super().forward(x)
        # (N,H,W,4,4,C): each pixel draws 4x4 of them, from the one above and left of its own 2x2 on.
        drawn = (x.permute(0, 2, 3, 1) @ self.weight.permute(0, 2, 3, 1).flatten(1)).unflatten(3, (4, 4, -1))
        rows = add_overlaps(drawn, 1, 3)  # (N,H,2,W,4,C)
        return add_overlaps(rows, 3, 4).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class ConvTo4x4(nn.Conv2d):
    """Conv2d(B, C, 4, 2, 1), as fast as can be for small maps: (N,B,H,W) -> (N,C,H/2,W/2)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cpu:
            return super().forward(x)
        squares = x.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (N,H/2,2,W/2,2,B)
        columns = add_neighbours(squares, 3, 4)  # (N,H/2,2,W/2,4,B)
        seen = add_neighbours(columns, 1, 3)  # (N,H/2,W/2,4,4,B): the 4x4 that each pixel of the result sees
        return linear(seen.flatten(3), self.weight.permute(0, 2, 3, 1).flatten(1)).permute(0, 3, 1, 2)


def add_neighbours(pairs: torch.Tensor, along: int, which: int) -> torch.Tensor:
    """The two pixels after dim `along` become four, dim `which`: between one of the pair before and one of that after.

    Beyond the border there are zeros. What add_overlaps does, backwards.
    """
    first, second = pairs.unbind(along + 1)
    others = [0, 0] * (first.dim() - 1 - along)
    above, below = pad(second, [*others, 1, -1]), pad(first, [*others, -1, 1])
    return torch.stack((above, first, second, below), which)


def add_overlaps(drawn: torch.Tensor, along: int, which: int) -> torch.Tensor:
    """Dim `which`, the four pixels that each of dim `along` draws, becomes the two that are its own, after `along`.

    The first of the four falls on the second one of the neighbour before, the last on the first of the one after.
    """
    above, first, second, below = drawn.unbind(which)
    others = [0, 0] * (first.dim() - 1 - along)
    first, second = first + pad(below, [*others, 1, -1]), second + pad(above, [*others, -1, 1])
    return torch.stack((first, second), along + 1)


def count_blocks(image_size: int) -> int:
    """Blocks between a 4x4 map and the layer at the image: 4 for 64x64, 5 for 128x128."""
    blocks = image_size.bit_length() - 3
    if blocks < 1 or image_size != 2 ** (blocks + 2):
        raise ValueError(f"image_size must be a power of two of 8 or more, not {image_size}")
    return blocks


def init_weights(module: nn.Module) -> None:
    """Draws convolutions from N(0, 0.02) and BatchNorm scales from N(1, 0.02), as the DCGAN paper does."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def latents(seeds: Iterable[int], nz: int = 100) -> torch.Tensor:
    """Latents (N,nz,1,1), float32, from N(0,1): one generator per seed, so seed 7 is the same face in any batch."""
    rows = [torch.randn(nz, 1, 1, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """Random numbers of training step `step`, a function of the arguments: a resumed training has them again."""
    mixed = np.random.SeedSequence((seed, step, stream)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))


def step_latents(seed: int, step: int, n: int, nz: int = 100) -> torch.Tensor:
    """The latents (n,nz,1,1) of training step `step`."""
    return torch.randn(n, nz, 1, 1, generator=step_generator(seed, step))


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU. Raises SystemExit when the device is not on this machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # meta, of which there is none on any machine, fails only here
    except (RuntimeError, AssertionError, NotImplementedError):
        raise SystemExit(f"error: --device {name} is not on this machine; use --device auto or cpu") from None
    return device


def join_ranks(name: str) -> torch.device:
    """The device `name` of this process, alone or among those that torchrun started, which it joins.

    They talk over NCCL about tensors on CUDA and over gloo about all others. Raises SystemExit as pick_device does.
    """
    device, several = pick_device(name), int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # NCCL and CUDA graphs go by the current one
    if several:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def rank_and_world_size() -> tuple[int, int]:
    """Number of this process and of all of them; (0, 1) alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def check_tensors(state: dict, expected: dict, path: str | Path, what: str, remedy: str) -> None:
    """Raises SystemExit unless `state`, read from `path`, has each tensor of `expected`: of its shape, and finite."""
    for name, wanted in expected.items():
        tensor = state.get(name)
        if not isinstance(tensor, torch.Tensor):
            raise SystemExit(f"error: {path} does not hold {what} (see {name}); {remedy}")
        if tensor.shape != wanted.shape:
            shapes = f"its shape is {tuple(tensor.shape)}, not {tuple(wanted.shape)}"
            raise SystemExit(f"error: {path} does not hold {what} (see {name}: {shapes}); {remedy}")
        if not tensor.isfinite().all():
            raise SystemExit(f"error: {path}: {name} holds NaN or infinite values; {remedy}")


def nested_tensors(content: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested dictionaries and lists, with the keys that lead to it."""
    pending, seen = [("", content)], set()
    while pending:  # no recursion: a file may hold a dictionary that holds itself
        name, value = pending.pop()
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            pending += [(f"{name}.{key}".lstrip("."), item) for key, item in items]


def load_tensors(path: str | Path, remedy: str) -> dict:
    """Reads a dictionary that torch.save wrote, on the CPU and as data: nothing in the file is run.

    Raises SystemExit with one sentence that ends in `remedy` when the file is missing, damaged, holds anything
    but plain data and tensors, or a tensor that claims more elements than the file has.
    """
    if not Path(path).is_file():
        raise SystemExit(f"error: {path} does not exist; {remedy}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise SystemExit(f"error: {path} cannot be read (permission denied); {remedy}") from None
    except Exception as error:  # torch.load raises some ten kinds, by the byte at which a file is damaged
        raise SystemExit(
            f"error: {path} is damaged or not a PyTorch file of plain tensors ({type(error).__name__}); {remedy}"
        ) from None
    if not isinstance(content, dict):
        raise SystemExit(f"error: {path} holds a {type(content).__name__}, not a dictionary of tensors; {remedy}")
    for name, tensor in nested_tensors(content):
        # A stride of 0 lets a file of a few bytes claim 2**40 elements: refuse it before anything copies it.
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise SystemExit(f"error: {path}: {name} claims {tensor.numel():,} elements it does not hold; {remedy}")
    return content


def generator_from_state_dict(state: dict, path: str | Path) -> Generator:
    """Builds the Generator that `state` belongs to; its sizes follow from the shapes of the weights alone.

    Reads this repository's weights and the DCGAN tutorial's, also with DataParallel's `module.` before each name,
    in any floating-point type. Raises SystemExit, naming `path`, for anything else.
    """
    state = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    remedy = "pass the generator.params of a training to --params"
    kernels = [t for t in state.values() if isinstance(t, torch.Tensor) and t.ndim == 4]
    if len(kernels) < 3 or any(kernel.shape[2:] != (4, 4) for kernel in kernels):
        raise SystemExit(f"error: {path} does not hold a DCGAN generator; {remedy}")
    if kernels[0].shape[1] == 3 and kernels[-1].shape[0] == 1:
        raise SystemExit(f"error: {path} holds a discriminator, not a generator; {remedy}")
    nz, ngf, image_size = kernels[0].shape[0], kernels[-1].shape[0], 2 ** (len(kernels) + 1)
    with torch.device("meta"):  # no memory is taken before the shapes have been compared
        netG = Generator(nz, ngf, image_size)
    expected = netG.state_dict()
    check_tensors(state, expected, path, "a DCGAN generator", remedy)
    extra = [name for name in state if name not in expected]
    if extra:
        raise SystemExit(f"error: {path} does not hold a DCGAN generator (see {extra[0]}); {remedy}")
    netG.load_state_dict({name: t.to(expected[name].dtype) for name, t in state.items()}, assign=True)
    return netG.eval().requires_grad_(False)
