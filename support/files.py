"""Files written whole or not at all, and what is said where they cannot be."""

import errno
import os
import secrets
from contextlib import contextmanager, suppress
from pathlib import Path


def printable(text: object) -> str:
    """`text` on one line: what cannot be printed (newlines, broken UTF-8) as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def cannot_write(path: Path, error: OSError) -> SystemExit:
    """One sentence about an OSError: which path, why, what to do."""
    advice = {errno.ENOSPC: "free some space and run the same command again", errno.ENAMETOOLONG: "shorten its name"}
    todo = advice.get(error.errno, "check the folder or choose another one")
    return SystemExit(f"error: cannot write {printable(path)}: {error.strerror or error}; {todo}")


@contextmanager
def atomic_write(path: str | Path, durable: bool = False):
    """Yield a binary file that appears at `path` whole when the block ends well, and otherwise not at all.

    `durable` waits until the disk has it. Raises SystemExit, one sentence, where `path` cannot be written; its
    __cause__ is the OSError.
    """
    path = Path(path)
    temp = path.with_name(f".{secrets.token_hex(5)}.tmp")  # short, as the name of `path` may use all 255 bytes
    try:
        with temp.open("xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temp.replace(path)
        if durable and os.name == "posix":  # a rename is on the disk once its folder is
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of the OSError of a full disk
        while error is not None and not isinstance(error, OSError):
            error = error.__context__
        if error is None:
            raise
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
