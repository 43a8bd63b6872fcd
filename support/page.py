"""One HTML file that draws the faces of a generator in any browser, without a network: page.html plus its weights.

    write_page(Path("faces.html"), netG, [("seed 7", latents([7])[0])], "generator.params")
"""

import argparse
import base64
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from support.files import atomic_write, check_outputs, printable
from support.latent_space import read_latents
from support.seeding import latents

TEMPLATE = Path(__file__).with_name("page.html")
BLOCK = 8  # columns of a weight matrix that the page's multiply() computes together


def draw_page(args: argparse.Namespace, netG: nn.Module) -> str:
    """The page of generator.py's --page: the faces of --latents, then those of --seeds."""
    path = args.page
    check_outputs({"--page": path}, args.overwrite, [args.params, *(args.latents or ())])
    named = read_latents(args.latents or (), netG.nz)
    seeds = zip((f"seed {seed}" for seed in args.seeds), latents(args.seeds, netG.nz))
    write_page(path, netG, [*named.items(), *seeds], args.params.name)
    return f"a page of {args.params} in {path}; open it in a browser"


def write_page(path: Path, netG: nn.Module, faces: Sequence[tuple[str, torch.Tensor]], generator: str) -> None:
    """Write the page of `netG` to `path`, whole or not at all. Raises UserError.

    The page draws `faces` first, which are pairs of a name and a latent (nz,1,1). It holds the weights of the
    convolutions in half precision. `generator` is the name that it gives to the generator.
    """
    convolutions = [module for module in netG.main if isinstance(module, nn.ConvTranspose2d)]
    norms = [module for module in netG.main if isinstance(module, nn.BatchNorm2d)]
    scales, biases = zip(*map(scale_and_bias, norms), (torch.ones(3), torch.zeros(3)))  # no BatchNorm at the image
    data = {
        "generator": printable(generator),
        "size": netG.image_size,
        "channels": [netG.nz, *(conv.out_channels for conv in convolutions)],
        "scales": [scale.tolist() for scale in scales],
        "biases": [bias.tolist() for bias in biases],
        "names": [printable(name) for name, _ in faces],
        "latents": [z.flatten().tolist() for _, z in faces],
    }
    weights = base64.b64encode(b"".join(pack(conv.weight) for conv in convolutions))
    text = json.dumps(data).replace("<", "\\u003c")  # a name could hold </script>
    template = TEMPLATE.read_bytes()
    with atomic_write(path) as file:
        file.write(template.replace(b"@weights@", weights).replace(b"@data@", text.encode()))


def scale_and_bias(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """A BatchNorm in eval mode as float32 (C,), (C,): y = x * scale + bias.

    Folded into the weights, the scale would be rounded to half precision with them, and 0.5 % of the pixels change.
    """
    weight, bias, mean, var = (t.cpu().double() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    scale = weight / (var + norm.eps).sqrt()
    return scale.float(), (bias - mean * scale).float()


def pack(weight: torch.Tensor) -> bytes:
    """Weights (B,C,4,4) as little-endian float16 of a matrix (B,16*C), in blocks (B,BLOCK) of its columns."""
    matrix = weight.cpu().half().permute(0, 2, 3, 1).flatten(1)
    return matrix.unflatten(1, (-1, BLOCK)).transpose(0, 1).contiguous().numpy().astype("<f2").tobytes()
