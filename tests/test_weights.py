"""Files of weights from unknown sources: support/weights.py and generator_from_state_dict."""

import pytest
import torch

import network
import network_128
from generator import generator_from_state_dict
from support.files import UserError
from support.seeding import latents
from support.weights import load_tensors


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
    """A pickle that creates a file when it is loaded as code."""

    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(path) + '.boom'!r}, 'w')",))

    torch.save({"main.0.weight": Bomb()}, path)


def overlapping(path):
    """A small file that claims 2**40 numbers: all of them share one value in storage."""
    torch.save({"main.0.weight": torch.zeros(1).expand(2**20, 2**20)}, path)


def changed(change):
    """Saves the state dict of a generator after change(state dict)."""

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
def test_bad_weight_files_are_refused(tmp_path, make, word):
    path = tmp_path / "g.params"
    make(path)
    with pytest.raises(UserError, match=word) as stop:
        generator_from_state_dict(load_tensors(path, "train a generator"), path)
    assert str(path) in str(stop.value) and "\n" not in str(stop.value)
    assert not (tmp_path / "g.params.boom").exists()
