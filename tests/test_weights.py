"""Files of weights from unknown sources: support/weights.py and generator_from_state_dict."""

import argparse
import json
import struct
import zipfile

import pytest
import torch

import network
import network_128
from generator import generator_from_state_dict, load_generator
from support.files import UserError
from support.seeding import latents
from support.weights import load_tensors


def saved(path, content):
    """What generator.py loads from a file of `content`."""
    torch.save(content, path)
    return load_generator(path)


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
    (truncated, "damaged"),
    (pickle_bomb, r"Python objects \(.*exec\), not only tensors"),
    (lambda path: torch.save([1, 2], path), "list"),
    (lambda path: torch.save({"a": 1}, path), "generator"),
    (lambda path: torch.save(network.Discriminator(4).state_dict(), path), "discriminator"),
    (overlapping, "claims"),
    (changed(lambda s: s["main.0.weight"].fill_(float("nan"))), "NaN"),
    (changed(lambda s: s.update({"main.1.bias": torch.zeros(32, device="meta")})), "main.1.bias.*not a plain one"),
    (changed(lambda s: s.update({"main.1.bias": torch.eye(4).to_sparse()})), "main.1.bias.*not a plain one"),
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


# ---------------------------------------------------------------------------------------------- weights people have


@pytest.fixture
def state():
    torch.manual_seed(0)
    return network.Generator(8, 4).state_dict()


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def without_counters(state):
    """As torch 0.3 saved it."""
    return {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name}


NET_D = network.Discriminator(4).state_dict()


@pytest.mark.parametrize("wrap", [
    without_counters,
    lambda s: prefixed("_orig_mod.", s),
    lambda s: prefixed("module._orig_mod.module.", s),
    lambda s: {"netG": s, "epoch": 3},
    lambda s: {"generator": prefixed("module.", s), "discriminator": NET_D},
    lambda s: {"state_dict": prefixed("netG.", s) | prefixed("netD.", NET_D), "optimizer": {"state": {0: NET_D}}},
    lambda s: {"model": without_counters(prefixed("generator.", s))},
    lambda s: prefixed("netG.", s) | {"totals": torch.zeros(4)},
])
def test_one_generator_is_found_below_keys_and_prefixes(tmp_path, state, wrap):
    loaded = saved(tmp_path / "g.pth", wrap(state)).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_checkpoint_of_train_gives_its_ema_generator(trained, capsys):
    loaded, ema = (load_generator(trained / name).state_dict() for name in ("checkpoint.pt", "generator.params"))
    assert all(torch.equal(loaded[name], ema[name]) for name in ema)
    assert "checkpoint.pt is a checkpoint; this is its EMA generator" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["netG_ema", "average"])
def test_the_ema_generator_of_newer_and_older_checkpoints(tmp_path, state, name):
    other = {key: tensor + 1 for key, tensor in state.items()}
    loaded = saved(tmp_path / "checkpoint.pt", {"netG": other, "netD": NET_D, name: state}).state_dict()
    assert torch.equal(loaded["main.0.weight"], state["main.0.weight"])


@pytest.mark.parametrize("content, words", [
    (lambda s: {"model": s, "ema": dict(s)}, r"2 generators \(ema, model\)"),
    (lambda s: {"netD": NET_D}, "discriminator, not a generator"),
    (lambda s: prefixed("module.", network.Discriminator(4).state_dict()), "discriminator, not a generator"),
    (lambda s: NET_D | {"main.0.weight": torch.zeros(4, 1, 4, 4)}, "discriminator, not a generator"),
    (lambda s: s | {"main.12.weight": torch.zeros(4, 1, 4, 4)}, r"its shape is \(4, 1, 4, 4\), not \(4, 3, 4, 4\)"),
    (lambda s: {"weights\n": {"layer.0.weight": torch.zeros(3)}, "epoch": 1}, r"its keys: weights\\n, epoch"),
    (lambda s: {}, "its keys: none"),
    (lambda s: s | {"main.0.weight": torch.zeros(0, 32, 4, 4)}, "does not hold a DCGAN generator"),
    (lambda s: {f"main.{i}.weight": torch.zeros(1, 1, 4, 4) for i in range(99)}, "does not hold a DCGAN generator"),
])
def test_other_networks_are_named(tmp_path, state, content, words):
    with pytest.raises(UserError, match=words) as stop:
        saved(tmp_path / "g.pth", content(state))
    assert str(tmp_path / "g.pth") in str(stop.value) and "\n" not in str(stop.value)


# ---------------------------------------------------------------------------------------------- other files


def safetensors(path):
    header = json.dumps({"main.0.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def script(path):
    torch.jit.save(torch.jit.trace(torch.nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 4, 4)), path)


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("images/a.png", b"")


def in_old_format(content):
    return lambda path: torch.save(content, path, _use_new_zipfile_serialization=False)


def truncated_checkpoint(path):
    in_old_format({"main.0.weight": torch.nn.Parameter(torch.zeros(9)), "seen": {1}, "size": torch.Size([3])})(path)
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("write, words", [
    (lambda path: path.mkdir(), "is a folder, .*; give the file of weights in it"),
    (lambda path: path.touch(), "is an empty file, .*; make one"),
    (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n"), "git-lfs pointer.*git lfs"),
    (lambda path: path.write_text("\n<!doctype HTML>\n<html>"), "is an HTML page, .*download the file itself"),
    (lambda path: path.write_text("<html lang='en'>"), "is an HTML page"),
    (safetensors, "is a safetensors file, .*load_file"),
    (script, "is a TorchScript archive, .*torch.jit.load"),
    (archive, "is a zip of other files, .*unzip it"),
    (lambda path: path.write_text("hello"), "is damaged or not a PyTorch file"),
    (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "is damaged or not a PyTorch file"),
    (truncated_checkpoint, "is damaged or not"),
    (lambda path: torch.save(network.Generator(8, 4), path), r"\(network.Generator\), not only tensors; .*MODULE"),
    (in_old_format(network.Generator(8, 4)), r"Python objects \(network.Generator\)"),
    (in_old_format({"args": argparse.Namespace(lr=1)}), r"Python objects \(argparse.Namespace\)"),
])
def test_other_files_are_named_with_what_to_do(tmp_path, write, words):
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(UserError, match=words) as stop:
        load_tensors(path, "make one")
    assert str(path) in str(stop.value) and "\n" not in str(stop.value)


def test_a_file_in_the_format_before_torch_1_6(tmp_path, state):
    in_old_format(state)(tmp_path / "w.pth")
    assert load_tensors(tmp_path / "w.pth", "").keys() == state.keys()
