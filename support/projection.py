"""Photos as latents: the face of a generator that comes nearest to a photo, and photos with a hidden part.

    photo, hole = read_photo(Path("me.jpg"), 64, Path("mask.png"))
    z = project(netG, to_float(photo), ~hole)                   # (1,nz,1,1)
    photo = complete(photo, face, hole)                         # the hole filled with the face, without a seam
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from support.files import UserError, printable
from support.photos import Unreadable, crop_square, read_rgb
from support.seeding import latents

SCALES = (1, 2, 4, 8)  # sides in pixels of the squares that project() compares
CANDIDATES = 512  # random faces among which project() looks for its start
ITERATIONS = 18  # of project(), each with one batch of nz faces
STEP = 1e-2  # of its finite differences
PRIOR = 2e-3  # last weight of |z|^2 / nz against the mean squared error of pixels in [-1,1]; the first is 10 times it


def read_photo(path: Path, size: int, mask: Path | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A photo uint8 (3,S,S), cropped as preprocess.py does it, and where `mask` is white (S,S). Raises UserError."""
    images = []
    for file in filter(None, (path, mask)):
        try:
            image = read_rgb(file)
        except Unreadable as error:
            raise UserError(f"{error}; give an image") from None
        images.append(crop_square(image, min(image.size)).resize((size, size), Image.Resampling.BICUBIC))
        if file == path:
            shape = image.size
        elif image.size != shape:
            raise UserError(f"--mask {printable(mask)} is {image.width}x{image.height}, but {printable(path)} is "
                            f"{shape[0]}x{shape[1]}; give a mask of the photo's size")
    photo, *masks = (torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images)
    hole = masks[0].float().mean(0) > 127 if masks else torch.zeros(size, size, dtype=torch.bool)
    if masks and (hole.all() or not hole.any()):
        raise UserError(f"--mask {printable(mask)} is {'all' if hole.all() else 'not'} white: its white part is what "
                        "the photo lacks; give another")
    return photo, hole


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images; infinite for equal ones."""
    return float(10 * torch.log10(255**2 / (a.cpu().double() - b.cpu().double()).square().mean()))


@torch.inference_mode()
def project(
    netG: torch.nn.Module,
    photo: torch.Tensor,
    known: torch.Tensor | None = None,
    progress: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """The latent (1,nz,1,1) whose face comes nearest to `photo` (3,S,S) in [-1,1], where `known` (S,S) is 1 and not 0.

    Minimises the mean squared error of the pixels and of their averages over squares, plus a prior |z|^2 / nz whose
    weight falls to PRIOR. Levenberg-Marquardt starts from the best of CANDIDATES faces. Its derivatives are finite
    differences along all axes of z, which one batch of faces gives. Adam on z needs more faces and ends in local
    minima. `progress` is called ITERATIONS times.
    """
    parameter = next(netG.parameters())
    photo = photo.to(parameter)
    known = torch.ones_like(photo[0]) if known is None else known.to(parameter)
    axes = torch.eye(netG.nz, device=photo.device)

    def errors(z: torch.Tensor) -> torch.Tensor:
        """(N,M): their sum of squares is the mean squared error of the faces of `z` (N,nz)."""
        difference = ((netG(z[..., None, None].to(parameter)) - photo) * known).float()
        parts = [avg_pool2d(difference, side).flatten(1) * side for side in SCALES]
        return torch.cat(parts, 1) / (3 * len(SCALES) * known.sum().clamp_min(1)).sqrt()

    candidates = latents(range(CANDIDATES), netG.nz).flatten(1).to(photo.device)
    distances = torch.cat([errors(part).square().sum(1) for part in candidates.split(128)])
    z = candidates[distances.argmin()]
    damping = 1e-2
    for iteration in range(ITERATIONS):
        prior = PRIOR / netG.nz * max(1, 10 ** (1 - iteration / 8))
        at = errors(z[None])[0]
        jacobian = (errors(z + STEP * axes) - at) / STEP  # (nz,M)
        gradient = (jacobian @ at + prior * z).cpu()  # a system of nz equations is solved on the CPU: MPS cannot
        curvature = (jacobian @ jacobian.T + prior * axes).cpu()
        damped = curvature.diagonal().mean() * torch.eye(netG.nz)
        dampings = [0, damping / 10, damping, damping * 10]
        steps = [torch.linalg.solve(curvature + value * damped, gradient) for value in dampings[1:]]
        trials = torch.stack([z, *(z - step.to(z.device) for step in steps)])
        costs = errors(trials).square().sum(1) + prior * trials.square().sum(1)
        best = int(costs.nan_to_num(torch.inf).argmin())
        z = trials[best]
        damping = min(max(dampings[best] or damping * 100, 1e-7), 1e4)
        progress()
    return z[None, :, None, None].cpu()


def complete(photo: torch.Tensor, face: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """`photo` uint8 (3,S,S) with the pixels of `face` uint8 (3,S,S) where `hole` (S,S) is true, and no seam.

    Inside the hole the differences between neighbouring pixels are those of the face, and its border has the colours
    of the photo (Perez, Gangnet, Blake, "Poisson Image Editing", 2003). All other pixels stay as they are.
    """
    photo = photo.clone()
    hole = hole.numpy()
    count = hole.sum()
    face = face.cpu().double().numpy()
    known = photo.cpu().double().numpy()
    number = np.full(hole.shape, -1)
    number[hole] = np.arange(count)
    matrix = scipy.sparse.lil_matrix((count, count))
    right = np.zeros((count, 3))
    for row, (y, x) in enumerate(zip(*hole.nonzero())):
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if not (0 <= v < len(hole) and 0 <= u < len(hole)):
                continue
            matrix[row, row] += 1
            right[row] += face[:, y, x] - face[:, v, u]
            if hole[v, u]:
                matrix[row, number[v, u]] = -1
            else:
                right[row] += known[:, v, u]
    filled = scipy.sparse.linalg.spsolve(matrix.tocsc(), right).reshape(count, 3)
    photo[:, torch.from_numpy(hole)] = torch.from_numpy(filled.T.round().clip(0, 255)).to(torch.uint8)
    return photo
