"""The networks of network.py and network_128.py."""

import pytest
import torch
from torch import nn

import network
import network_128


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("nets, g, d, size", [
    (network, 3_576_704, 2_765_568, 64),
    (network_128, 12_786_560, 11_164_416, 128),
])
def test_parameters_and_shapes(nets, g, d, size):
    netG, netD = nets.Generator(), nets.Discriminator()
    assert (count(netG), count(netD)) == (g, d)
    images = netG(torch.randn(2, 100, 1, 1))
    assert images.shape == (2, 3, size, size) and images.abs().max() <= 1
    judged = netD(images)
    assert judged.shape == (2, 1, 1, 1) and ((judged > 0) & (judged < 1)).all()


def kinds_of_layers(net):
    """The class names of torch's layers: some layers of network.py are subclasses."""
    return [next(kind.__name__ for kind in type(layer).mro() if "torch" in kind.__module__) for layer in net.main]


def test_layers_are_those_of_the_report():
    kinds = kinds_of_layers(network.Discriminator())
    block = ["Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert kinds == ["Conv2d", "LeakyReLU", *block * 3, "Conv2d"]
    kinds = kinds_of_layers(network.Generator())
    assert kinds == ["ConvTranspose2d", "BatchNorm2d", "ReLU"] * 4 + ["ConvTranspose2d", "Tanh"]


@pytest.mark.parametrize("nets", [network, network_128])
@pytest.mark.parametrize("ndf", [8, 9])
def test_with_group_norm_the_logit_of_an_image_does_not_depend_on_the_batch(nets, ndf):
    netD, batchwise = nets.Discriminator(ndf, group_norm=True), nets.Discriminator(ndf)
    assert count(netD) == count(batchwise)
    size = 64 if nets is network else 128
    images = torch.rand(4, 3, size, size) * 2 - 1
    together, alone = netD(images, logits=True)[:1], netD(images[:1], logits=True)
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(batchwise(images, logits=True)[:2], batchwise(images[:2], logits=True), atol=1e-3)


def test_initial_weights():
    torch.manual_seed(0)
    for module in network.Generator().modules():
        if isinstance(module, nn.ConvTranspose2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.02) and (module.bias == 0).all()
