"""State dicts as data: load, check and save them. Nothing in a file is ever run.

    content = load_tensors("netG.pth", remedy="pass another file to --params")
    networks = find_networks(content, "main.0.weight")      # {"netG": state dict, "netD": state dict}
"""

import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from support.files import UserError, atomic_write, kind_by_first_bytes, printable

# What people pass instead of a file of weights: the first bytes, and what to do with it ("" where the caller says it).
FILE_KINDS = {
    "an empty file": (rb"\Z", ""),
    "a git-lfs pointer": (rb"version https://git-lfs", "fetch the file itself with `git lfs pull`"),
    "an HTML page": (rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b",
                     "download the file itself, not the page that links to it"),
    "a safetensors file": (rb".{5}\0\0\0\{",  # the length of a JSON header in 8 bytes, and the header
                           "convert it with `torch.save(safetensors.torch.load_file(OLD), NEW)`"),
}
EMA_NAMES = ("netG_ema", "average")  # of the EMA weights in checkpoints; older ones have the second


def check_tensors(state: dict, expected: dict, path: str | Path, what: str, remedy: str) -> None:
    """Raise UserError unless `state`, read from `path`, has each tensor of `expected`, of its shape and finite."""
    for name, wanted in expected.items():
        tensor = state.get(name)
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path} does not hold {what} (see {name}); {remedy}")
        if tensor.shape != wanted.shape:
            shapes = f"its shape is {tuple(tensor.shape)}, not {tuple(wanted.shape)}"
            raise UserError(f"{path} does not hold {what} (see {name}: {shapes}); {remedy}")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinite values; {remedy}")


def nested_tensors(content: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested dictionaries and lists, with the keys that lead to it."""
    pending, seen = [("", content)], set()
    while pending:  # no recursion: a file may hold a dictionary that holds itself
        name, value = pending.pop()
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            pending += [(f"{name}.{key}".lstrip("."), item) for key, item in items]


def find_networks(content: dict, first: str) -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts in `content` that hold a tensor called `first`, by what stands before that name.

    They may be anywhere in nested dictionaries, with any prefix such as netG., module. (DataParallel) or _orig_mod.
    (torch.compile). The name of a state dict without a prefix is empty.
    """
    tensors = dict(nested_tensors(content))
    prefixes = [name.removesuffix(first) for name in tensors if f".{name}".endswith(f".{first}")]
    return {
        prefix.rstrip("."): {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }
        for prefix in sorted(prefixes)
    }


def find_dcgans(content: dict) -> tuple[dict[str, dict], dict[str, dict]]:
    """(generators, discriminators) in `content`, each {what stands before its names: state dict}."""
    networks = find_networks(content, "main.0.weight")
    networks = {name: state for name, state in networks.items() if kernels_of(state)}
    discriminators = {name: state for name, state in networks.items() if is_discriminator(kernels_of(state))}
    return {name: networks[name] for name in networks if name not in discriminators}, discriminators


def generator_sizes(state: dict[str, torch.Tensor]) -> dict[str, int]:
    """nz, ngf and image_size of a generator, by the shapes of its kernels."""
    kernels = kernels_of(state)
    return {"nz": kernels[0].shape[0], "ngf": kernels[-1].shape[0], "image_size": 2 ** (len(kernels) + 1)}


def find_generator(content: dict, path: str | Path, remedy: str) -> dict[str, torch.Tensor]:
    """The state dict of the one generator in `content`, or of the EMA generator of a checkpoint of train.py.

    Raises UserError, which names `path` and ends in `remedy`, when there is none or several.
    """
    generators, discriminators = find_dcgans(content)
    for ema in EMA_NAMES:
        if generators.keys() == {"netG", ema}:
            note = f"note: {path} is a checkpoint; this is its EMA generator, the one of generator.params"
            print(note, file=sys.stderr)
            return generators[ema]
    if len(generators) > 1:
        names = printable(", ".join(name or "one without a prefix" for name in generators))
        raise UserError(f"{path} holds {len(generators)} generators ({names}); save one of them alone, and pass that")
    if not generators:
        if discriminators:
            raise UserError(f"{path} holds a discriminator, not a generator; {remedy}")
        keys = printable(", ".join(map(str, list(content)[:6])))[:200] or "none"
        raise UserError(f"{path} does not hold a DCGAN generator (its keys: {keys}); {remedy}")
    [state] = generators.values()
    return state


def kernels_of(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The 4x4 kernels of a DCGAN's convolutions from first to last. Empty where `state` is no DCGAN."""
    layers = {name.split(".")[1]: t for name, t in state.items() if re.fullmatch(r"main\.[0-9]{1,3}\.weight", name)}
    kernels = [layers[i] for i in sorted(layers, key=int) if layers[i].ndim == 4]
    whole = 3 <= len(kernels) <= 10 and all(k.shape[2:] == (4, 4) and k.numel() for k in kernels)
    return kernels if whole else []


def is_discriminator(kernels: list[torch.Tensor]) -> bool:
    """Whether each kernel (out,in,4,4) takes the channels that the one before gives, and the last gives one."""
    return kernels[-1].shape[0] == 1 and all(a.shape[0] == b.shape[1] for a, b in zip(kernels, kernels[1:]))


def add_counters(state: dict, expected: dict) -> dict:
    """`state` with the counters of BatchNorm that it lacks: torch 0.3 had none. Only training reads them."""
    counters = [name for name in expected if name.endswith("num_batches_tracked")]
    return {name: torch.tensor(0) for name in counters} | state


def load_tensors(path: str | Path, remedy: str) -> dict:
    """Read a dictionary that torch.save wrote, on the CPU and with weights_only=True.

    Raises UserError, one sentence that says what to do, when the file is missing, damaged or of another kind, when it
    holds anything but plain data and tensors, or when a tensor claims more elements than the file has.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a state dict of PyTorch; give the file of weights in it")
    if not path.is_file():  # a pipe is no file: reading it would wait for ever
        raise UserError(f"{path} does not exist; {remedy}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises some ten kinds, depending on the byte that is damaged
        raise explain_failure(path, error, remedy) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors; {remedy}")
    for name, tensor in nested_tensors(content):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UserError(f"{path}: {name} is a sparse, quantized or empty tensor, not a plain one; {remedy}")
        # With a stride of 0, a file of a few bytes can claim 2**40 elements. Refuse it before anything copies it.
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} claims {tensor.numel():,} elements it does not hold; {remedy}")
    return content


def explain_failure(path: Path, error: Exception, remedy: str) -> UserError:
    """One sentence for a `path` that torch.load refused with `error`: what the file is, and what to do."""
    if isinstance(error, PermissionError):
        return UserError(f"{path} cannot be read ({error.strerror}); {remedy}")
    kind, advice = describe(path)
    if kind:
        return UserError(f"{path} is {kind}, not a state dict of PyTorch; {advice or remedy}")
    if foreign := re.search(r"GLOBAL (\S+)", str(error)):
        how = "load it where its code is, and save the tensors alone with `torch.save(MODULE.state_dict(), NEW)`"
        return UserError(f"{path} holds Python objects ({printable(foreign[1])[:100]}), not only tensors; {how}")
    return UserError(f"{path} is damaged or not a PyTorch file of plain tensors ({type(error).__name__}); {remedy}")


def describe(path: Path) -> tuple[str, str]:
    """What a file that is no state dict is, such as "an HTML page", and what to do with it. Empty where unknown."""
    kind, advice = kind_by_first_bytes(path, FILE_KINDS)
    if kind:
        return kind, advice
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # no zip, or a damaged one: zipfile raises many kinds
        return "", ""
    if any(re.fullmatch(r"[^/]+/(constants\.pkl|code/.*)", name) for name in names):
        return "a TorchScript archive", "save its weights with `torch.save(torch.jit.load(OLD).state_dict(), NEW)`"
    if any(re.fullmatch(r"[^/]+/data\.pkl", name) for name in names):
        return "", ""
    return "a zip of other files", "unzip it and give the file of weights in it"


def save_tensors(content: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors as CPU tensors, which load on machines without a GPU too. Raises UserError."""
    with atomic_write(path, durable=True) as file:
        torch.save({name: tensor.cpu() for name, tensor in content.items()}, file)
