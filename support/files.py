"""Files: written whole or not at all, what is in the way of them, and the names of outputs. Imports no torch.

    from support.files import UserError, atomic_write
    with atomic_write("faces.png") as file:
        file.write(png)
    lock = open_outdir(args.outdir, args.resume)            # the folder of a training
    make_outdir(args.outdir, paths, args.overwrite)         # a folder of faces
"""

import errno
import hashlib
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]  # the folder of the scripts
OVERWRITE_HELP = "replace output files that exist"  # of --overwrite, which has one meaning in all scripts
ADVICE = {errno.ENOSPC: "free some space and run the same command again", errno.ENAMETOOLONG: "shorten its name"}
CHECKPOINTS = ("checkpoint.pt", "checkpoint_previous.pt")  # the newest first
TRAINED = Path("runs/64/generator.params")
PRETRAINED = ROOT / "pretrained" / "generator_64.params"
PARAMS_REMEDY = "make one with `python train.py`, or pass another to --params"
WEIGHTS_NOTE = "weights.sha256"  # in a folder of faces


class UserError(Exception):
    """One sentence that names a file or a flag and says what to do. support/cli.py's run() prints it.

    `errno` is the system's error number where a file could not be written.
    """

    errno: int | None = None


def printable(text: object) -> str:
    """`text` on one line: newlines, broken UTF-8 and other unprintable characters become backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def cannot_write(path: Path, error: OSError) -> UserError:
    """A UserError that says which path could not be written, why, and what to do."""
    advice = ADVICE.get(error.errno, "check the folder or choose another one")
    problem = UserError(f"cannot write {printable(path)}: {error.strerror or error}; {advice}")
    problem.errno = error.errno
    return problem


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file, as sha256sum prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def kind_by_first_bytes(path: Path, kinds: dict[str, tuple[bytes, str]]) -> tuple[str, str]:
    """(kind, advice) of the first of `kinds` whose regular expression fits the first bytes of a file; else ("", "")."""
    with path.open("rb") as file:
        start = file.read(1024)
    for kind, (pattern, advice) in kinds.items():
        if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
            return kind, advice
    return "", ""


def git_commit() -> str | None:
    """The commit of this repository, with "-dirty" after local changes. None without git or outside a clone."""
    if not (ROOT / ".git").exists():  # the scripts may lie in somebody else's repository
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return git.stdout.strip() or None


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in `folder`. A rename is durable only after that.

    Some network file systems cannot do this for a folder (EINVAL); their renames are as durable as they get.
    """
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


@contextmanager
def atomic_write(path: str | Path, durable: bool = False):
    """Yield a binary file that replaces `path` when the block ends without an exception, and vanishes otherwise.

    `durable` waits until the disk has the file. Raises UserError when `path` cannot be written.
    """
    path = Path(path)
    temp = path.with_name(f".{secrets.token_hex(5)}.tmp")  # short: the name of `path` may use all 255 bytes
    try:
        with temp.open("xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temp.replace(path)
        if durable:
            sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns the OSError of a full disk into a RuntimeError
        while error is not None and not isinstance(error, OSError):
            error = error.__context__
        if error is None:
            raise
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temp.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------- the folder of a training


def name_last_checkpoint(outdir: Path) -> str:
    newest = outdir / CHECKPOINTS[0]
    return f"the last good checkpoint is {newest}" if newest.exists() else "there is no checkpoint yet"


def holds_training(outdir: Path) -> bool:
    return any((outdir / name).exists() for name in CHECKPOINTS)


def check_outdir(outdir: Path, resume: bool) -> None:
    """Raise UserError when `outdir` holds a training that is not to be resumed, or another training's parameters."""
    shown = printable(outdir)
    if holds_training(outdir) and not resume:
        raise UserError(f"{shown} holds a training; go on by --resume, or choose another --outdir")
    if not holds_training(outdir) and (outdir / "generator.params").exists():
        raise UserError(f"{shown} holds the generator.params of another training; choose another --outdir")


def open_outdir(outdir: Path, resume: bool) -> TextIO:
    """Make `outdir` and lock it. The system releases the lock however this process ends. Raises UserError."""
    check_outdir(outdir, resume)
    shown = printable(outdir)
    try:
        (outdir / "samples").mkdir(parents=True, exist_ok=True)
        lock = (outdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to --outdir {shown} ({error.strerror}); choose another") from None
    try:
        lock_file(lock)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # Lustre and others have no locks
            message = f"the file system of {shown} has no locks ({error.strerror}); start no second training there"
            print(f"warning: {message}", file=sys.stderr)
        else:
            raise UserError(f"another training is running in {shown}; choose another --outdir") from None
    for leftover in outdir.rglob(".*.tmp"):  # of a killed training: the lock proves that no other is writing them
        leftover.unlink(missing_ok=True)
    return lock


def lock_file(file: TextIO) -> None:
    """Lock an open file for this process alone. Raises OSError when another process has locked it."""
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ------------------------------------------------------------------------------------------------ outputs of a command


def refuse_existing(targets: Iterable[Path], overwrite: bool, flag: str) -> None:
    """Raise UserError when an output of `flag` exists without `overwrite`, or is a folder, before any work is done."""
    for path in targets:
        if path.is_dir():
            raise UserError(f"{printable(path)} is a folder; choose another {flag}")
        if not overwrite and os.path.lexists(path):
            raise UserError(f"{printable(path)} exists; choose another {flag}, or pass --overwrite to replace it")


def check_outputs(targets: dict[str, Path | None], overwrite: bool, inputs: Iterable[Path | None] = ()) -> None:
    """Raise UserError unless each path of `targets`, by its flag, can become a file that replaces no input."""
    for flag, path in targets.items():
        if path is None:
            continue
        refuse_existing([path], overwrite, flag)
        if not path.parent.is_dir():
            raise UserError(f"there is no folder {printable(path.parent)} for {flag} {printable(path.name)}; make it")
        if any(other and other.exists() and path.exists() and path.samefile(other) for other in inputs):
            raise UserError(f"{flag} {printable(path)} is an input of the same command; choose another {flag}")


def make_outdir(outdir: Path, targets: Iterable[Path], overwrite: bool) -> None:
    """Make the folder --outdir of the pictures `targets`. Raises UserError when one exists, without `overwrite`."""
    refuse_existing(targets, overwrite, "--outdir")
    try:
        outdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --outdir {printable(outdir)} ({error.strerror}); choose another") from None


def note_weights(outdir: Path, params: Path, faces: Iterable[Path]) -> None:
    """Note the SHA-256 of the weights `params`, which draw `faces`, in the folder of faces `outdir`.

    Prints a warning when pictures of other weights stay there: evaluate.py would measure the mixture.
    """
    note = outdir / WEIGHTS_NOTE
    digest = hash_file(params)
    stay = set(outdir.glob("*.png")).difference(faces)
    try:
        before = note.read_text(errors="replace").split() if stay and note.is_file() else []
    except OSError as error:
        raise cannot_write(note, error) from error
    if set(before) - {digest}:
        print(f"warning: {printable(outdir)} keeps faces of other weights; a FID of it would be one of the mixture; "
              "choose another --outdir", file=sys.stderr)
    with atomic_write(note) as file:
        file.write("".join(f"{line}\n" for line in dict.fromkeys([*before, digest])).encode())


def path_next_to(outdir: Path, ending: str) -> Path:
    """faces_grid.png for faces: pictures of several faces lie next to the folder, which holds nothing but faces."""
    named = outdir if outdir.name not in ("", "..") else outdir.resolve()
    return named.with_name(named.name + ending)
