"""Writing large files to a disk that may be full."""

import errno
import os
import shutil
from pathlib import Path

from dsjax.progress import in_bytes


def write_all(file: int, content: memoryview, offset: int, path: Path) -> None:
    """Writes `content` at `offset`. OSError names `path` and says how to go on."""
    while content:
        try:
            count = os.pwrite(file, content, offset)
            if not count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            told = f"{error.strerror}; what is finished stays, the same command continues"
            raise OSError(error.errno, told, str(path)) from error
        content, offset = content[count:], offset + count


def check_free(directory: Path, needed: int) -> None:
    """OSError if the disk of `directory`, which may not exist yet, has less than `needed` bytes."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the disk has {in_bytes(free)} free, {in_bytes(needed)} are still to be written; "
            "make room and repeat the command",
            str(directory),
        )
