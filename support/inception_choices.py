"""The networks, layers and resizes that support/inception.py can measure with, as data. Imports no torch."""

from pathlib import Path

from support.files import UserError

LAST_LAYER = {64: "maxpool1", 192: "maxpool2", 768: "Mixed_6e", 2048: "Mixed_7c"}  # by number of features
URLS = {
    "torchvision": "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth",
    "tf2015": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
}
MEGABYTES = {"torchvision": 104, "tf2015": 91}
CLASSES = {"torchvision": 1000, "tf2015": 1008}  # all other shapes are the same in both
# The resizes of published numbers: TensorFlow's graph (TTUR, StyleGAN, torch-fidelity) includes one, and users of
# torchvision's network resize with PyTorch.
DEFAULT_RESIZE = {"torchvision": "bilinear", "tf2015": "tf"}
RESIZES = ("bilinear", "tf", "clean")


def check_weights(path: Path) -> None:
    """Raise UserError when the file of weights `path` is missing."""
    if path.is_dir():
        raise UserError(f"--weights {path} is a folder; give the state dict of Inception-v3 in it")
    if not path.is_file():
        raise UserError(f"--weights {path} does not exist; give a state dict of Inception-v3")
