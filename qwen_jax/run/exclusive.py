"""One process a worker on one machine."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from qwen_jax.errors import WriterConflictError
from qwen_jax.run.settings import Settings
from qwen_jax.storage.local import storage_errors


@contextmanager
def exclusive(settings: Settings) -> Iterator[None]:
    """Holds the worker's folders for this process; raises WriterConflictError if another has them."""
    folders = [settings.output_dir, *([settings.checkpoint_dir] if settings.checkpointing else [])]
    with exclusive_folders(folders, settings.worker_id):
        yield


@contextmanager
def exclusive_folders(folders: list[Path], worker_id: int) -> Iterator[None]:
    """The same for folders by name."""
    files = []
    try:
        for folder in dict.fromkeys(folder.resolve() for folder in folders):
            files.append(_lock(folder, worker_id))
        yield
    finally:
        for file in files:
            file.close()


def _lock(folder: Path, worker_id: int) -> TextIO:
    path = folder / f".worker_{worker_id}.lock"
    with storage_errors("write in", folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise WriterConflictError(
            f"another process on this machine runs worker {worker_id} in {folder}; stop it, or use another id"
        ) from error
    return file
