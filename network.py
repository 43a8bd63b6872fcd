"""The DCGAN for 64x64 faces: z (N,nz,1,1) -> images (N,3,64,64) -> real or fake (N,1,1,1).

    from network import Generator, Discriminator, latents
    images = Generator()(latents(range(16)))        # float32 in [-1,1]

Architecture and initial weights: Radford, Metz, Chintala, "Unsupervised Representation Learning with Deep
Convolutional Generative Adversarial Networks", 2016. Parameter names (`main.0.weight` ...) are those of the
PyTorch DCGAN tutorial, so that its weights load here.
"""

import math

import torch
import torch.distributed.nn  # before there is a group: its default arguments would keep that, and its threads, for good
from torch import nn

from support.convolutions import ConvTo4x4, ConvTransposeFrom1x1, ConvTransposeFrom4x4


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


