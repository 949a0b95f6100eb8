"""Local files: their names, and what the system says of them."""

import contextlib
import errno
import os
from collections.abc import Iterator
from urllib.parse import unquote

from qwen_jax.errors import StorageError


def plain_path(path: str) -> str:
    """The path that `file:///folder` means; anything else is taken as it is. `#` and `?` are part of names."""
    return unquote(path.removeprefix("file://")) if path.startswith("file:///") else path


_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space, then start again",
    errno.EDQUOT: "the disk quota is used up: free some space, then start again",
    errno.EACCES: "no permission: check the owner and mode of the folder",
    errno.EPERM: "not permitted: check the owner and attributes of the folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EFBIG: "a file may not grow this large here: check `ulimit -f` and the file system",
    errno.ENOENT: "the folder does not exist: create it",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
    errno.EISDIR: "a folder has this name: move it away",
    errno.ELOOP: "it is a symbolic link, which is not followed: remove it",
}


@contextlib.contextmanager
def storage_errors(action: str, path: str | os.PathLike) -> Iterator[None]:
    """Turns an OSError inside into a StorageError that names the path and says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = _ADVICE.get(error.errno or 0, "check the disk, then start again")
        raise StorageError(f"cannot {action} {os.fspath(path)}: {reason} ({advice})") from error
