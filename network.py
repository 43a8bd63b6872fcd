"""The DCGAN for 64x64 faces: z (N,nz,1,1) -> images (N,3,64,64) -> real or fake (N,1,1,1).

    from network import Discriminator, Generator
    images = Generator()(torch.randn(16, 100, 1, 1))        # float32 in [-1,1]

Architecture and initial weights: Radford, Metz, Chintala, "Unsupervised Representation Learning with Deep
Convolutional Generative Adversarial Networks", 2016. Parameter names (`main.0.weight` ...) are those of the PyTorch
DCGAN tutorial, so that its weights load here.
"""

import math

import torch
from torch import nn

from support.convolutions import ConvTo4x4, ConvTransposeFrom1x1, ConvTransposeFrom4x4


class Generator(nn.Module):
    """Turns latents (N,nz,1,1), drawn from N(0,1), into images (N,3,image_size,image_size) in [-1,1].

    `ngf` is the number of channels before the last layer. Each block further from the image has twice as many.
    `image_size` is a power of two: 64 has four blocks, and each doubling adds one.
    """

    def __init__(self, nz: int = 100, ngf: int = 64, image_size: int = 64):
        super().__init__()
        self.nz = nz
        self.ngf = ngf
        self.image_size = image_size
        channels = [ngf * 2**i for i in reversed(range(count_blocks(image_size)))]
        layers = []
        for i, (previous, out) in enumerate(zip([nz, *channels], channels)):
            # The first block turns a 1x1 map into 4x4. Each later block doubles the map.
            if i == 0:
                conv = ConvTransposeFrom1x1(previous, out)
            elif i == 1:
                conv = ConvTransposeFrom4x4(previous, out)
            else:
                conv = nn.ConvTranspose2d(previous, out, 4, 2, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(ngf, 3, 4, 2, 1, bias=False), nn.Tanh())
        self.apply(init_weights)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z)


class Discriminator(nn.Module):
    """Gives images (N,3,image_size,image_size) in [-1,1] the probability (N,1,1,1), float32, of being real.

    `ndf` is the number of channels of the first block. Each further block halves the map and doubles the channels.
    `group_norm` replaces BatchNorm by group normalisation over 16 channels (Wu and He, "Group Normalization", 2018).
    BatchNorm sees batches of real images and batches of fakes separately, and so hides how their means differ.
    """

    def __init__(self, ndf: int = 64, image_size: int = 64, group_norm: bool = False):
        super().__init__()
        channels = [ndf * 2**i for i in range(count_blocks(image_size))]
        layers = []
        for previous, out in zip([3, *channels], channels):
            is_last = out == channels[-1]
            conv = ConvTo4x4(previous, out) if is_last else nn.Conv2d(previous, out, 4, 2, 1, bias=False)
            norm = nn.GroupNorm(out // math.gcd(out, 16), out) if group_norm else nn.BatchNorm2d(out)
            layers += [conv, norm, nn.LeakyReLU(0.2, inplace=True)]
        del layers[1]  # no norm in the first block: there it makes the training oscillate (DCGAN paper, section 3)
        self.main = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 4, 1, 0, bias=False))
        self.apply(init_weights)

    def forward(self, images: torch.Tensor, logits: bool = False) -> torch.Tensor:
        """With `logits`, the values before the sigmoid, from which a loss has a gradient even at probabilities 0 and 1.

        In bf16 a probability above 0.998 would round to 1, so the sigmoid is taken of float32.
        """
        scores = self.main(images).float()
        return scores if logits else scores.sigmoid()


def count_blocks(image_size: int) -> int:
    """Number of blocks between a 4x4 map and the layer at the image: 4 for 64x64, 5 for 128x128."""
    blocks = image_size.bit_length() - 3
    if blocks < 1 or image_size != 2 ** (blocks + 2):
        raise ValueError(f"image_size must be a power of two of 8 or more, not {image_size}")
    return blocks


def init_weights(module: nn.Module) -> None:
    """Draw convolutions from N(0, 0.02) and BatchNorm scales from N(1, 0.02), as the DCGAN paper does."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
