"""State dicts as data: load, check and save them. Nothing in a file is ever run.

    state = load_tensors("generator.params", remedy="pass another file to --params")
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from support.files import UserError, atomic_write


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


def load_tensors(path: str | Path, remedy: str) -> dict:
    """Read a dictionary that torch.save wrote, on the CPU and with weights_only=True.

    Raises UserError, one sentence that ends in `remedy`, when the file is missing or damaged, when it holds anything
    but plain data and tensors, or when a tensor claims more elements than the file has.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; {remedy}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise UserError(f"{path} cannot be read (permission denied); {remedy}") from None
    except Exception as error:  # torch.load raises some ten kinds, depending on the byte that is damaged
        kind = type(error).__name__
        raise UserError(f"{path} is damaged or not a PyTorch file of plain tensors ({kind}); {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors; {remedy}")
    for name, tensor in nested_tensors(content):
        # With a stride of 0, a file of a few bytes can claim 2**40 elements. Refuse it before anything copies it.
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} claims {tensor.numel():,} elements it does not hold; {remedy}")
    return content


def save_tensors(content: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors as CPU tensors, which load on machines without a GPU too. Raises UserError."""
    with atomic_write(path, durable=True) as file:
        torch.save({name: tensor.cpu() for name, tensor in content.items()}, file)
