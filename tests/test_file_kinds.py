"""Files that are no state dicts: support/file_kinds.py says what each one is, and support/weights.py what to do."""

import argparse
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import network
from support.file_kinds import PYTORCH, describe
from support.files import UserError
from support.weights import load_tensors


def safetensors(path):
    header = json.dumps({"main.0.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def script(path):
    torch.jit.save(torch.jit.trace(torch.nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 4, 4)), path)


def archive(*names):
    """A function that writes a zip of empty files."""

    def write(path):
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, b"")

    return write


def in_old_format(content):
    return lambda path: torch.save(content, path, _use_new_zipfile_serialization=False)


def truncated_checkpoint(path):
    in_old_format({"main.0.weight": torch.nn.Parameter(torch.zeros(9)), "seen": {1}, "size": torch.Size([3])})(path)
    path.write_bytes(path.read_bytes()[:-20])


def array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("write, words", [
    (lambda path: path.mkdir(), "is a folder, .*; give the file of weights in it"),
    (lambda path: path.touch(), "is an empty file, .*; make one"),
    (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n"), "git-lfs pointer.*git lfs"),
    (lambda path: path.write_text("\n<!doctype HTML>\n<html>"), "is an HTML page, .*download the file itself"),
    (lambda path: path.write_text("<html lang='en'>"), "is an HTML page"),
    (safetensors, "is a safetensors file, .*load_file"),
    (script, "is a TorchScript archive, .*torch.jit.load"),
    (archive("images/a.png", "readme.txt"), "is a zip of other files, .*unzip it"),
    (archive("config.json", "model.weights.h5"), "is a Keras model"),
    (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "is an HDF5 file, as Keras writes"),
    (lambda path: path.write_bytes(b"\x08\x07\x12\x07pytorch\x1a\x052.0.0:"), "is an ONNX model"),
    (lambda path: path.write_bytes(b"\x08\x01\x12\xaf\x02\n\x80\x01"), "is a TensorFlow model"),
    (lambda path: path.write_bytes(b"\n\x3f\n\x05input\x12\x0bPlaceholder*"), "is a TensorFlow model"),
    (lambda path: path.write_bytes(pickle.dumps({"G": 1})), "is a Python pickle"),
    (array, r"is a NumPy array \(.npy\)"),
    (lambda path: Image.new("RGB", (8, 8)).save(path, "png"), "is an image"),
    (lambda path: path.write_bytes(b"\x1f\x8b\x08\x00"), "is a compressed archive, .*unpack it"),
    (lambda path: path.write_text("hello"), "is damaged or not a PyTorch file"),
    (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "is damaged or not a PyTorch file"),
    (lambda path: torch.save(network.Generator(8, 4), path), r"pickled module \(network.Generator\), .*MODULE"),
    (in_old_format(network.Generator(8, 4)), r"pickled module \(network.Generator"),
    (lambda path: torch.save(torch.nn.Conv2d(1, 1, 1), path), r"pickled module \(torch.nn.modules.conv.Conv2d\)"),
    (truncated_checkpoint, "is damaged or not"),
    (lambda path: torch.save({"args": argparse.Namespace(lr=1)}, path), r"Python objects \(argparse.Namespace\)"),
    (in_old_format({"args": argparse.Namespace(lr=1)}), r"Python objects \(argparse.Namespace\)"),
])
def test_other_files_are_named_with_what_to_do(tmp_path, write, words):
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(UserError, match=words) as stop:
        load_tensors(path, "make one")
    assert str(path) in str(stop.value) and "\n" not in str(stop.value)


def test_pytorch_files_of_both_formats(tmp_path):
    state = network.Generator(8, 4).state_dict()
    for write in (lambda path: torch.save(state, path), in_old_format(state)):
        write(tmp_path / "w.pth")
        assert describe(tmp_path / "w.pth") == PYTORCH
        assert load_tensors(tmp_path / "w.pth", "").keys() == state.keys()


def test_a_tensorflow_checkpoint_is_known_by_its_name(tmp_path):
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001", "saved.pb"):
        (tmp_path / name).write_bytes(b"\0\1\2\3" * 9)
        assert describe(tmp_path / name) == "a TensorFlow file"
