"""A store by its URL."""

import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qwen_jax.errors import UsageError
from qwen_jax.storage.folder import FolderStore
from qwen_jax.storage.store import Store

ANSWER_S = 60.0


def open_store(
    url: str,
    *,
    stop: threading.Event | None = None,
    budget_s: float | None = None,
    timeout_s: float = ANSWER_S,
) -> Store:
    """Opens `gs://bucket/prefix`, `file:///folder` or a plain folder path (made if missing).

    Args:
        url: where.
        stop: once set, every wait of the store ends with TerminatedError.
        budget_s, timeout_s: of a bucket, how long an operation may fail, None for the environment's word, and how
            long it may give no answer.

    Raises:
        UsageError: a URL that is none of these.
        StorageError: no credentials, or the folder cannot be made.
    """
    parts = urlsplit(url)
    if parts.scheme == "gs" and parts.netloc:
        # Only here: google.cloud.storage takes a second to import.
        from qwen_jax.storage.gcs import GcsStore

        return GcsStore(
            parts.netloc, parts.path.strip("/"), stop=stop, budget_s=budget_s, timeout_s=timeout_s
        )
    if (parts.scheme == "file" and not parts.netloc and parts.path) or ("://" not in url and url):
        return FolderStore(Path(unquote(parts.path) if parts.scheme == "file" else url), stop=stop)
    raise UsageError(f"cannot store to {url!r}: give gs://bucket/prefix, file:///folder or a folder")
