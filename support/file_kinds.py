"""What a file is, by its first bytes and by the names in a zip. Nothing in a file is ever run. Imports no torch.

    describe(Path("netG.pth"))                  # "a git-lfs pointer"
    require_pytorch_file(Path("netG.pth"), remedy="pass another to --params")
    holds_statistics(Path("real.npz"))          # True: mu and sigma
    read_pickle(Path("netG.pth"))               # (["network.Generator", ...], {"_modules", ...}), without loading any
"""

import io
import pickletools
import re
import zipfile
from contextlib import suppress
from pathlib import Path

from support.files import UserError, printable
from support.sources import require_images

PYTORCH = "a PyTorch file"
STATISTICS = "an .npz of statistics"
SAMPLES = "an .npz of images"
# Regular expressions for the first bytes. The first one that fits counts.
FIRST_BYTES = {
    "an empty file": rb"\Z",
    "a git-lfs pointer": rb"version https://git-lfs",
    "an HTML page": rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b",
    PYTORCH: rb"\x80.\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19",  # as torch.save wrote before version 1.6
    "a Python pickle": rb"\x80[\x02-\x05]",
    "a NumPy array (.npy)": rb"\x93NUMPY",
    "an HDF5 file, as Keras writes": rb"\x89HDF\r\n\x1a\n",
    "a safetensors file": rb".{5}\0\0\0\{",  # the length of a JSON header in 8 bytes, and the header
    "a TensorFlow model": rb"\x08\x01\x12|.{4}TFL3|\x0a.{1,3}\x0a.{1,300}(Placeholder|Const|VariableV2)",
    "an ONNX model": rb"\x08[\x02-\x1f][\x12\x1a\x22\x3a\x42]",
    "an image": rb"\x89PNG|\xff\xd8\xff|GIF8|BM.{4}\0\0\0\0|RIFF.{4}WEBP|II\*\0|MM\0\*",
    "a compressed archive": rb"\x1f\x8b|7z\xbc\xaf|BZh|\xfd7zXZ|Rar!|.{257}ustar",
}
TENSORFLOW = r"\.(pb|pbtxt|tflite|index|meta|data-\d+-of-\d+)$"  # names of files whose first bytes say little
# What to do with a file that is no state dict. Where a kind is missing here, the caller's remedy says it.
WEIGHTS_ADVICE = {
    "a folder": "give the file of weights in it",
    "a git-lfs pointer": "fetch the weights with `git lfs pull`",
    "an HTML page": "download the file itself, not the page that links to it",
    "a safetensors file": "convert it with `torch.save(safetensors.torch.load_file(OLD), NEW)`",
    "a TorchScript archive": "save its weights with `torch.save(torch.jit.load(OLD).state_dict(), NEW)`",
    "a zip of other files": "unzip it and give the file of weights in it",
    "a compressed archive": "unpack it and give the file of weights in it",
}
SAVEZ = "write its mu and sigma to an .npz with `numpy.savez(FILE, mu=mu, sigma=sigma)`"
# What to do with a file that is neither a folder of images nor an .npz.
IMAGES_ADVICE = {
    "a NumPy array (.npy)": SAVEZ,
    "a Python pickle": SAVEZ,
    PYTORCH: f"pass a generator to --params; if it holds statistics, {SAVEZ}",
    "a zip of other files": "unzip it and give the folder",
    "a compressed archive": "unpack it and give the folder",
    "an image": "give the folder that holds it",
    "an empty file": "copy or download it again",
    "a git-lfs pointer": "fetch the file with `git lfs pull`",
    "an HTML page": "download the file itself, not the page that links to it",
}
LONGEST = 2**23  # bytes of a pickle that are looked at


def describe(path: Path) -> str:
    """What `path` is, such as "an HTML page", or an empty string where that is unknown. Raises OSError."""
    if path.is_dir():
        return "a folder"
    with path.open("rb") as file:
        start = file.read(1024)
    if start.startswith(b"PK"):
        return describe_zip(path)
    for kind, pattern in FIRST_BYTES.items():
        if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
            return kind
    return "a TensorFlow file" if re.search(TENSORFLOW, path.name) else ""


def describe_zip(path: Path) -> str:
    """What a zip is, by the names in it, or an empty string where it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises many kinds on damaged files
        return ""
    if any(re.fullmatch(r"[^/]+/(constants\.pkl|code/.*)", name) for name in names):
        return "a TorchScript archive"
    if any(re.fullmatch(r"[^/]+/data\.pkl", name) for name in names):
        return PYTORCH
    if {"mu.npy", "sigma.npy"} <= set(names):
        return STATISTICS
    if "arr_0.npy" in names:
        return SAMPLES
    if names and all(name.endswith(".npy") for name in names):
        return "an .npz of other arrays"
    return "a Keras model" if "model.weights.h5" in names else "a zip of other files"


def read_pickle(path: Path) -> tuple[list[str], set[str]]:
    """The classes and functions that the pickle in a PyTorch file names, in their order, and all its strings."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name))
            with archive.open(name) as file:
                content = file.read(LONGEST)
    else:
        with path.open("rb") as file:
            content = file.read(LONGEST)
    called, strings, stream = [], set(), io.BytesIO(content)
    with suppress(Exception):  # of a damaged pickle, what came before counts
        for _ in range(5):  # the format before torch 1.6 has several pickles, one after the other
            for opcode, value, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL":
                    called.append(value.replace(" ", "."))
                elif isinstance(value, str):
                    strings.add(value)
    return called, strings


def require_pytorch_file(path: Path, remedy: str) -> None:
    """Raise UserError when `path` is missing, cannot be read or is a file of another kind.

    Whether it holds the right tensors is for support/weights.py to say.
    """
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{path} does not exist; {remedy}")
    try:
        kind = describe(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    if kind not in ("", PYTORCH):
        raise UserError(f"{path} is {kind}, not a state dict of PyTorch; {WEIGHTS_ADVICE.get(kind, remedy)}")


def holds_statistics(path: Path) -> bool:
    """Whether `path` is an .npz of statistics, and not images. Raises UserError, which names the kind of other files.

    The content decides, not the name. Whether the statistics are whole is for load_statistics() to say.
    """
    named_npz = path.suffix.lower() == ".npz"
    if not path.is_file():
        return named_npz and not path.is_dir()
    try:
        kind = describe(path)
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read ({error.strerror}); give another") from None
    if kind in (STATISTICS, SAMPLES):
        return kind == STATISTICS
    if named_npz and kind in ("", "an .npz of other arrays"):
        return True
    what = kind or "neither a folder nor an .npz"
    raise UserError(f"{printable(path)} is {what}; {IMAGES_ADVICE.get(kind, 'give a folder of images or an .npz')}")


def require_images_or_statistics(path: Path) -> None:
    """Raise UserError when `path` is neither a folder that holds an image nor an .npz."""
    if holds_statistics(path) and not path.is_file():
        raise UserError(f"{path} does not exist; give a folder of images or an .npz of statistics")
    if not path.is_file():
        require_images(path)
