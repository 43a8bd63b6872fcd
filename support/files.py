"""Files that are written whole or not at all, and the one kind of error that a user can mend. Imports no torch.

    from support.files import UserError, atomic_write
    with atomic_write("faces.png") as file:
        file.write(png)
"""

import errno
import hashlib
import os
import secrets
import subprocess
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the folder of the scripts
OVERWRITE_HELP = "replace output files that exist"  # of --overwrite, which has one meaning in all scripts
ADVICE = {errno.ENOSPC: "free some space and run the same command again", errno.ENAMETOOLONG: "shorten its name"}


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
    """Wait until the disk has the names in `folder`. A rename is durable only after that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def refuse_existing(targets: Iterable[Path], overwrite: bool, flag: str) -> None:
    """Raise UserError when an output of `flag` exists without `overwrite`, or is a folder, before any work is done."""
    for path in targets:
        if path.is_dir():
            raise UserError(f"{printable(path)} is a folder; choose another {flag}")
        if not overwrite and os.path.lexists(path):
            raise UserError(f"{printable(path)} exists; choose another {flag}, or pass --overwrite to replace it")


def check_outputs(targets: dict[str, Path | None], overwrite: bool, inputs: Iterable[Path | None] = ()) -> None:
    """Raise UserError unless each path of `targets`, by its flag, can become a file that replaces no input."""
    named = {flag: path for flag, path in targets.items() if path}
    for flag, path in named.items():
        refuse_existing([path], overwrite, flag)
        if not path.parent.is_dir():
            raise UserError(f"there is no folder {printable(path.parent)} for {flag} {printable(path.name)}; make it")
        if any(other and other.exists() and path.exists() and path.samefile(other) for other in inputs):
            raise UserError(f"{flag} {printable(path)} is an input of the same command; choose another {flag}")
        same = next(other for other in named if named[other].resolve() == path.resolve())
        if same != flag:
            raise UserError(f"{same} and {flag} both write {printable(path)}; choose another {flag}")


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
