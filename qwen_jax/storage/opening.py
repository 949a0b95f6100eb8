"""A store by its URL."""

import logging
import re
import threading
from pathlib import Path

from qwen_jax.errors import RETRY_BUDGET_S, UsageError
from qwen_jax.files import plain_path
from qwen_jax.storage.folder import FolderStore
from qwen_jax.storage.store import Store

ANSWER_S = 60.0
_LONGEST_NAME = 1024
"""Bytes of an object's name in Cloud Storage; `checkpoint_worker_N.json` and the like come after a prefix."""
_LONGEST_OF_OURS = 64


def open_store(
    url: str,
    *,
    stop: threading.Event | None = None,
    budget_s: float = RETRY_BUDGET_S,
    timeout_s: float = ANSWER_S,
    log_retries_at: int = logging.WARNING,
) -> Store:
    """Opens `gs://bucket/prefix`, `file:///folder` or a plain folder path (made if missing).

    Args:
        url: where.
        stop: once set, every wait of the store ends with TerminatedError.
        budget_s, timeout_s: of a bucket, how long an operation may fail, and how long it may give no answer.
        log_retries_at: level of the log line of each failure that a bucket's store tries again.

    Raises:
        UsageError: a URL that is none of these.
        StorageError: no credentials, or the folder cannot be made.
    """
    check_store_url(url)
    if url.startswith("gs://"):
        # Only here: google.cloud.storage takes a second to import.
        from qwen_jax.storage.gcs import GcsStore

        bucket, _, prefix = url.removeprefix("gs://").partition("/")
        return GcsStore(
            bucket,
            prefix.strip("/"),
            stop=stop,
            budget_s=budget_s,
            timeout_s=timeout_s,
            log_retries_at=log_retries_at,
        )
    return FolderStore(Path(plain_path(url)), stop=stop)


def check_store_url(url: str) -> None:
    """Raises UsageError for what no store of ours can be opened at, or can hold."""
    if url.startswith("gs://"):
        bucket, _, prefix = url.removeprefix("gs://").partition("/")
        problem = _bucket_problem(bucket) or _prefix_problem(prefix)
    elif not url or ("://" in url and not url.startswith("file:///")):
        problem = "give gs://bucket/prefix, file:///folder or a folder"
    else:
        problem = "it holds control characters" if _has_controls(plain_path(url)) else None
    if problem:
        raise UsageError(f"cannot store to {url[:200]!r}: {problem}")


def _bucket_problem(bucket: str) -> str | None:
    if not bucket:
        return "give gs://bucket/prefix, file:///folder or a folder"
    if re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket):
        return None
    return (
        f"{bucket[:80]!r} cannot be the name of a bucket: 3 to 63 lower-case letters, digits, dashes, underscores "
        "and dots"
    )


def _prefix_problem(prefix: str) -> str | None:
    if {".", ".."} & set(prefix.split("/")):
        return "a prefix may not hold . or .. as a folder's name"
    if _has_controls(prefix):
        return "a prefix may not hold control characters, nor what is no text"
    if len(prefix.encode()) > _LONGEST_NAME - _LONGEST_OF_OURS:
        return f"a prefix may have {_LONGEST_NAME - _LONGEST_OF_OURS} bytes, not {len(prefix.encode())}"
    return None


def _has_controls(text: str) -> bool:
    """Control characters, or surrogates, which stand for bytes that are no UTF-8."""
    return any(each < " " or "\x7f" <= each < "\xa0" or "\ud800" <= each < "\ue000" for each in text)
