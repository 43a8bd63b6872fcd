"""Convolutions at 4x4 maps as matrix products."""

import torch
from torch import nn
from torch.nn.functional import linear, pad


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
