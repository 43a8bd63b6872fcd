"""Convolutions of 4x4 maps as matrix products: support/convolutions.py."""

import pytest
import torch

import network


@pytest.mark.parametrize("net, index, shape", [
    (network.Generator(7, 4), 0, (5, 7, 1, 1)),
    (network.Generator(7, 4), 3, (5, 32, 4, 4)),
    (network.Generator(7, 4), 3, (5, 32, 2, 6)),
    (network.Discriminator(4), 8, (5, 16, 8, 8)),
    (network.Discriminator(4), 8, (5, 16, 4, 10)),
])
def test_layers_of_small_maps_equal_those_of_torch(net, index, shape):
    """The result, both gradients and the memory format (channels_last) are compared."""
    layer = net.main[index].double().to(memory_format=torch.channels_last)
    x = torch.randn(shape, dtype=torch.double).to(memory_format=torch.channels_last).requires_grad_()
    ours, torchs = layer(x), super(type(layer), layer).forward(x)
    weights = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(y, (x, layer.weight), weights) for y in (ours, torchs))
    for a, b in zip((ours, *found), (torchs, *expected)):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert ours.is_contiguous(memory_format=torch.channels_last)
