
import pytest
import torch
from torch import nn

import network
import network_128
from generator import generator_from_state_dict
from support.seeding import latents, step_latents
from support.weights import load_tensors


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
    """Names of torch's own layers, which some of network.py's are kinds of."""
    return [next(kind.__name__ for kind in type(layer).mro() if "torch" in kind.__module__) for layer in net.main]


def test_layers_are_the_reports():
    kinds = kinds_of_layers(network.Discriminator())
    block = ["Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert kinds == ["Conv2d", "LeakyReLU", *block * 3, "Conv2d", "Sigmoid"]
    kinds = kinds_of_layers(network.Generator())
    assert kinds == ["ConvTranspose2d", "BatchNorm2d", "ReLU"] * 4 + ["ConvTranspose2d", "Tanh"]


@pytest.mark.parametrize("nets", [network, network_128])
@pytest.mark.parametrize("ndf", [8, 9])
def test_with_group_norm_an_image_is_judged_by_itself(nets, ndf):
    netD, batchwise = nets.Discriminator(ndf, group_norm=True), nets.Discriminator(ndf)
    assert count(netD) == count(batchwise)
    size = 64 if nets is network else 128
    images = torch.rand(4, 3, size, size) * 2 - 1
    together, alone = netD(images, logits=True)[:1], netD(images[:1], logits=True)
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(batchwise(images, logits=True)[:2], batchwise(images[:2], logits=True), atol=1e-3)


@pytest.mark.parametrize("net, index, shape", [
    (network.Generator(7, 4), 0, (5, 7, 1, 1)),
    (network.Generator(7, 4), 3, (5, 32, 4, 4)),
    (network.Generator(7, 4), 3, (5, 32, 2, 6)),
    (network.Discriminator(4), 8, (5, 16, 8, 8)),
    (network.Discriminator(4), 8, (5, 16, 4, 10)),
])
def test_layers_of_small_maps_equal_torchs(net, index, shape):
    """Results, gradients of the input and of the weights; in the memory format that the next layers want."""
    layer = net.main[index].double().to(memory_format=torch.channels_last)
    x = torch.randn(shape, dtype=torch.double).to(memory_format=torch.channels_last).requires_grad_()
    ours, torchs = layer(x), super(type(layer), layer).forward(x)
    weights = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(y, (x, layer.weight), weights) for y in (ours, torchs))
    for a, b in zip((ours, *found), (torchs, *expected)):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_initial_weights():
    torch.manual_seed(0)
    for module in network.Generator().modules():
        if isinstance(module, nn.ConvTranspose2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.02) and (module.bias == 0).all()


def test_latents_depend_on_their_seed_alone():
    batch = latents(range(10))
    assert batch.shape == (10, 100, 1, 1) and batch.dtype == torch.float32
    assert torch.equal(batch[7], latents([7])[0])
    assert len({row.sum().item() for row in batch}) == 10
    assert torch.equal(step_latents(1, 5, 4), step_latents(1, 5, 4))
    assert not torch.equal(step_latents(1, 5, 4), step_latents(1, 6, 4))


@pytest.mark.parametrize("nets, nz, ngf", [(network, 100, 8), (network, 7, 16), (network_128, 20, 4)])
@pytest.mark.parametrize("prefix, dtype", [("", torch.float32), ("module.", torch.float64), ("", torch.float16)])
def test_sizes_follow_from_the_weights(nets, nz, ngf, prefix, dtype):
    netG = nets.Generator(nz, ngf).eval()
    state = {prefix + k: v.to(dtype) if v.is_floating_point() else v for k, v in netG.state_dict().items()}
    loaded = generator_from_state_dict(state, "x.params")
    z = latents(range(3), nz)
    assert (loaded.nz, loaded.ngf, loaded.image_size) == (nz, ngf, netG.image_size)
    assert torch.allclose(loaded(z), netG(z), atol=1e-6 if dtype != torch.float16 else 2e-2)


def pickle_bomb(path):
    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(path) + '.boom'!r}, 'w')",))

    torch.save({"main.0.weight": Bomb()}, path)


def overlapping(path):
    torch.save({"main.0.weight": torch.zeros(1).expand(2**20, 2**20)}, path)


def changed(change):
    def save(path):
        state = network.Generator(8, 4).state_dict()
        change(state)
        torch.save(state, path)

    return save


def truncated(path):
    torch.save(network.Generator(8, 4).state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("make, word", [
    (lambda path: None, "does not exist"),
    (lambda path: path.touch(), "damaged"),
    (truncated, "damaged"),
    (pickle_bomb, "damaged"),
    (lambda path: torch.save([1, 2], path), "list"),
    (lambda path: torch.save({"a": 1}, path), "generator"),
    (lambda path: torch.save(network.Discriminator(4).state_dict(), path), "discriminator"),
    (overlapping, "claims"),
    (changed(lambda s: s["main.0.weight"].fill_(float("nan"))), "NaN"),
    (changed(lambda s: s.pop("main.1.bias")), "main.1.bias"),
    (changed(lambda s: s.update(extra=torch.zeros(1))), "extra"),
    (changed(lambda s: s.update({"main.1.bias": torch.zeros(3)})), "main.1.bias"),
])
def test_weights_from_anywhere(tmp_path, make, word):
    path = tmp_path / "g.params"
    make(path)
    with pytest.raises(SystemExit, match=word) as stop:
        generator_from_state_dict(load_tensors(path, "make it anew"), path)
    assert str(path) in str(stop.value) and "\n" not in str(stop.value)
    assert not (tmp_path / "g.params.boom").exists()
