"""The folder of compiled programs. They are code: one that somebody else can write to, or a bucket, is not used."""

import logging
import os
import stat
from pathlib import Path

log = logging.getLogger(__name__)

_MOUNTS = Path("/proc/self/mounts")


def use_cache(folder: Path) -> None:
    """Takes compiled programs from the folder and keeps them there, or says why not."""
    from qwen_jax.model.capture import use_compilation_cache  # doctor looks at the folder without jax

    obstacle = why_not_used(folder)
    if obstacle is not None:
        log.warning("compiled programs are neither taken from %s nor kept there: %s", folder, obstacle)
    use_compilation_cache(folder if obstacle is None else None)


def why_not_used(folder: Path) -> str | None:
    """Makes the folder, for this user alone, where it is not there; None where its programs can be trusted."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        return f"it cannot be made: {error.strerror}"
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}, the worker is user {os.geteuid()}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write into it: delete it, and the worker makes it anew"
    kind = _file_system(folder.resolve())
    return f"it is mounted from elsewhere ({kind})" if kind.startswith("fuse") else None


def _file_system(folder: Path) -> str:
    """The kind of the file system that it is on, as Linux calls it: buckets are `fuse...`; elsewhere empty."""
    if not _MOUNTS.exists():
        return ""
    mounts = [line.split(" ") for line in _MOUNTS.read_text().splitlines()]
    above = {Path(where.replace("\\040", " ")): kind for _, where, kind, *_ in mounts}
    return next((above[each] for each in (folder, *folder.parents) if each in above), "")
