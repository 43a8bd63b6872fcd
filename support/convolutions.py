"""Convolutions at 4x4 maps as matrix products: nn.Conv2d and nn.ConvTranspose2d, faster on a CPU.

At such small maps a CPU's convolution kernels leave most of its matrix units idle. One matrix product with a row for
each pixel of each image uses them. Other devices use torch's own kernels.

nn.functional's unfold and fold do the same in as many lines, but take 1.2 times as long (a core without bf16 support).
"""

import torch
from torch import nn
from torch.nn.functional import linear, pad


class ConvTransposeFrom1x1(nn.ConvTranspose2d):
    """ConvTranspose2d(B, C, 4, bias=False) of a map of one pixel: (N,B,1,1) -> (N,C,4,4)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 4, 1, 0, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x.flatten(1) @ self.weight.permute(0, 2, 3, 1).flatten(1)
        return pixels.unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)


class ConvTransposeFrom4x4(nn.ConvTranspose2d):
    """ConvTranspose2d(B, C, 4, 2, 1, bias=False) for small maps: (N,B,H,W) -> (N,C,2H,2W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 4, 2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cpu:
            return super().forward(x)
        windows = (x.permute(0, 2, 3, 1) @ self.weight.permute(0, 2, 3, 1).flatten(1)).unflatten(3, (4, 4, -1))
        rows = overlap_add(windows.movedim(3, 2), 1)  # (N,H,W,4,4,C) -> (N,2H,W,4,C)
        return overlap_add(rows, 2).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


class ConvTo4x4(nn.Conv2d):
    """Conv2d(B, C, 4, 2, 1, bias=False) for small maps: (N,B,H,W) -> (N,C,H/2,W/2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 4, 2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cpu:
            return super().forward(x)
        padded = pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        windows = padded.unfold(2, 4, 2).unfold(1, 4, 2)  # (N,H/2,W/2,B,4,4): columns, then rows of each window
        pixels = windows.permute(0, 1, 2, 5, 4, 3).flatten(3)
        return linear(pixels, self.weight.permute(0, 2, 3, 1).flatten(1)).permute(0, 3, 1, 2)


def overlap_add(windows: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum windows of 4 pixels that lie 2 apart and overlap: dims (L,4) at `dim` become one of 2L, padding cut off."""
    length, shape = windows.shape[dim], list(windows.shape)
    shape[dim : dim + 2] = [2 * length + 2]
    index = (2 * torch.arange(length)[:, None] + torch.arange(4)).flatten()
    summed = windows.new_zeros(shape).index_add(dim, index, windows.flatten(dim, dim + 1))
    return summed.narrow(dim, 1, 2 * length)
