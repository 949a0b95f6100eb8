"""One process a worker on one machine."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qwen_jax.errors import WriterConflictError
from qwen_jax.files import storage_errors
from qwen_jax.settings import Settings
from qwen_jax.storage.atomic import no_link


@contextmanager
def exclusive(settings: Settings) -> Iterator[None]:
    """Holds the worker's folders for this process; raises WriterConflictError if another has them."""
    folders = [settings.worker_dir, *([] if settings.no_checkpointing else [settings.checkpoint_dir])]
    with exclusive_folders(folders, settings.worker_id):
        yield


@contextmanager
def exclusive_folders(folders: list[Path], worker_id: int) -> Iterator[None]:
    """The same for folders by name, the first of which is this worker's alone."""
    with contextlib.ExitStack() as held:
        for number, folder in enumerate(dict.fromkeys(folder.resolve() for folder in folders)):
            held.enter_context(_lock(folder, worker_id))
            if number == 0:
                held.callback(os.close, _lock_folder(folder, worker_id))
        yield


def _lock(folder: Path, worker_id: int) -> BinaryIO:
    path = folder / f".worker_{worker_id}.lock"
    with storage_errors("write in", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with storage_errors("lock", path):
        # Nothing is cut off or written, whatever somebody has put there under this name.
        file = open(path, "ab", opener=no_link)  # noqa: SIM115 - the caller closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise _taken(folder, worker_id) from error
    return file


def _lock_folder(folder: Path, worker_id: int) -> int:
    """Locks the folder itself, for the lock's file may be deleted while its worker runs."""
    with storage_errors("lock", folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            os.close(descriptor)
            raise _taken(folder, worker_id) from error
        # Some network file systems lock files only; there the file's lock must do.
    return descriptor


def _taken(folder: Path, worker_id: int) -> WriterConflictError:
    return WriterConflictError(
        f"another process on this machine runs worker {worker_id} in {folder}; stop it, or use another id"
    )
