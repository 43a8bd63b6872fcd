"""The latent space of a generator: files of latents, interpolation, arithmetic on faces.

    z = arithmetic([(1, latents([1, 2, 3])), (-1, latents([4, 5, 6])), (1, latents([7, 8, 9]))])
    z = read_latents([Path("projections/me.latents")], nz=100)["me"]
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from support.files import UserError
from support.weights import load_tensors

FRAMES = 24  # of the morph from one latent to the next


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


def mean_latent(z: torch.Tensor) -> torch.Tensor:
    """The mean (1,nz,1,1) of latents (N,nz,1,1), at the length sqrt(nz) that latents of N(0,1) have on average."""
    mean = z.mean(0, keepdim=True)
    return mean * (z.shape[1] ** 0.5 / mean.norm())


def arithmetic(terms: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """The latent (1,nz,1,1) of a sum of groups: `terms` are pairs of a sign (1 or -1) and latents (N,nz,1,1).

    Each group counts as its mean, since single latents are unstable (Radford, Metz, Chintala, 2016, section 6.3.2).
    """
    return mean_latent(sum(sign * mean_latent(z) for sign, z in terms))


def neighbours(z: torch.Tensor, n: int = 8) -> torch.Tensor:
    """Latents (n,nz,1,1) around `z` (1,nz,1,1): uniform noise of +-0.25 is added, as in figure 7 of the DCGAN paper."""
    noise = torch.rand(n, *z.shape[1:], generator=torch.Generator().manual_seed(0))
    return z + (noise - 0.5) / 2


def read_latents(paths: Sequence[Path], nz: int) -> dict[str, torch.Tensor]:
    """{name: latent (nz,1,1)} of the files that --project writes. Raises UserError for others, and for another nz."""
    named = {}
    for path in paths:
        z = load_tensors(path, "make one with --project").get("latents")
        if not isinstance(z, torch.Tensor) or z.shape[2:] != (1, 1) or not z.is_floating_point() or not len(z):
            raise UserError(f"{path} holds no latents (N,nz,1,1); make a file of them with --project")
        if not z.isfinite().all():
            raise UserError(f"{path} holds NaN or infinite values; make it again with --project")
        if z.shape[1] != nz:
            raise UserError(f"{path} holds latents of length {z.shape[1]}, but the generator takes {nz}; project the "
                            "photo with this generator, or pass the other one to --params")
        for i, latent in enumerate(z.float()):
            name = path.stem + (f"_{i}" if len(z) > 1 else "")
            if name in named:
                raise UserError(f"--latents: two faces would be called {name}.png; rename one of the files")
            named[name] = latent
    return named
