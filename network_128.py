"""The DCGAN for 128x128 faces: the layers of network.py, with one more block.

    from network_128 import Discriminator, Generator
    images = Generator()(torch.randn(16, 100, 1, 1))        # (16,3,128,128), float32 in [-1,1]

`python train.py --image-size 128` trains it.
"""

import network


class Generator(network.Generator):
    """Turns latents (N,nz,1,1) into images (N,3,128,128) in [-1,1]; 12,786,560 parameters at the defaults."""

    def __init__(self, nz: int = 100, ngf: int = 64):
        super().__init__(nz, ngf, image_size=128)


class Discriminator(network.Discriminator):
    """Gives images (N,3,128,128) a probability (N,1,1,1) of being real; 11,164,416 parameters at the defaults."""

    def __init__(self, ndf: int = 64, group_norm: bool = False):
        super().__init__(ndf, image_size=128, group_norm=group_norm)
