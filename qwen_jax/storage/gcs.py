"""A prefix in a Cloud Storage bucket, behind retries of our own.

google-cloud-storage retries some failures and not others (a lost reply is a 412 to it, a 410 is final), so
its own retries are off and every operation goes through `GcsStore._retry`.
"""

import io
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import requests
import urllib3
from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

from qwen_jax.errors import RETRY_BUDGET_S, ConfigError, StorageError, TerminatedError, redacted
from qwen_jax.files import storage_errors
from qwen_jax.storage.atomic import atomic_write
from qwen_jax.storage.checksum import crc32c_of, file_crc32c
from qwen_jax.storage.resumable import NoProgressError, ResumableUpload, SessionLostError
from qwen_jax.storage.store import ObjectInfo, ReplacedError, accept_or_conflict, check_small, conflict

CHUNK_BYTES = 8 << 20

_CHUNK_UNIT = 256 << 10
_WRITER_KEY = "writer"
_SIZE_LEFT_OUT = {crc32c_of(b""): 0}  # Google's testbench does so for what is empty
_CONTENT_TYPE = "application/octet-stream"
_TRANSIENT_CODES = {408, 410, 429}
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class _WrongBytesError(Exception):
    """What arrived, there or here, is not what was sent."""


class _WrongReplyError(Exception):
    """The reply cannot be the bucket's: it lacks what the bucket says, or speaks of something else."""


_TRANSIENT = (
    requests.RequestException,
    auth.TransportError,
    api.RetryError,
    urllib3.exceptions.HTTPError,  # a connection that breaks while a body is read
    DataCorruption,
    SessionLostError,
    NoProgressError,
    _WrongBytesError,
    _WrongReplyError,
)
_LIBRARY_ERRORS = (*_TRANSIENT, api.GoogleAPICallError, auth.GoogleAuthError, InvalidResponse)


class GcsStore:
    """Implements Store (see there) on gs://bucket/prefix.

    With STORAGE_EMULATOR_HOST set it talks to that address without credentials.

    Args:
        bucket: the bucket's name.
        prefix: put before every name, with a slash; may be empty.
        stop: once set, waiting between tries ends with TerminatedError.
        chunk_bytes: larger objects go in chunks of this size, a multiple of 256 KiB.
        budget_s: how long an operation may fail before StorageError; counted anew whenever an upload gets
            on.
        first_delay_s: wait before the first retry; doubles up to `max_delay_s`, with jitter.
        timeout_s: for connecting, and for each wait for data.
        log_retries_at: level of the log line of each failure that is tried again.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        stop: threading.Event | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        budget_s: float = RETRY_BUDGET_S,
        first_delay_s: float = 1.0,
        max_delay_s: float = 32.0,
        timeout_s: float = 60.0,
        log_retries_at: int = logging.WARNING,
    ):
        if chunk_bytes < _CHUNK_UNIT or chunk_bytes % _CHUNK_UNIT:
            raise ConfigError(f"chunk_bytes must be a multiple of {_CHUNK_UNIT}, got {chunk_bytes}")
        self.url = f"gs://{bucket}/{prefix}".rstrip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._stop = stop or threading.Event()
        self._chunk_bytes = chunk_bytes
        self._budget_s = budget_s
        self._first_delay_s = first_delay_s
        self._max_delay_s = max_delay_s
        self._timeout_s = timeout_s
        self._log_retries_at = log_retries_at
        self._client = self._connect()
        self._bucket = self._client.bucket(bucket)

    def put_bytes(
        self, name: str, data: bytes, if_generation: int | None = None, *, writer: str | None = None
    ) -> ObjectInfo:
        wanted = ObjectInfo(name, len(data), crc32c_of(data), 0, writer)
        return self._put(wanted, io.BytesIO(data), if_generation, "")

    def put_file(
        self,
        name: str,
        path: str | os.PathLike,
        if_generation: int | None = None,
        *,
        writer: str | None = None,
    ) -> ObjectInfo:
        with storage_errors("read", path), open(path, "rb") as file:
            wanted = ObjectInfo(name, *file_crc32c(path), 0, writer)
            return self._put(wanted, file, if_generation, f"; the local file {os.fspath(path)} is kept")

    def get_bytes(self, name: str) -> tuple[bytes, ObjectInfo] | None:
        def attempt() -> tuple[bytes, ObjectInfo] | None:
            blob = self._reload(name)
            if blob is None:
                return None
            info, file = self._info(blob), io.BytesIO()
            check_small(info, self.url)
            self._download(blob, file)
            if crc32c_of(file.getbuffer()) != info.crc32c:
                raise _WrongBytesError(f"its bytes do not have crc32c {info.crc32c}")
            return file.getvalue(), info

        return self._retry("read", name, attempt)

    def download_file(self, name: str, path: str | os.PathLike) -> ObjectInfo | None:
        def attempt() -> ObjectInfo | None:
            blob = self._reload(name)
            if blob is None:
                return None
            info = self._info(blob)
            with atomic_write(path) as file:
                self._download(blob, file)
                if file.crc32c != info.crc32c:
                    raise _WrongBytesError(f"its bytes do not have crc32c {info.crc32c}")
            return info

        return self._retry("read", name, attempt)

    def download_range(self, info: ObjectInfo, start: int, end: int, file: BinaryIO) -> None:
        """Writes the bytes from `start` to before `end` of the very object that `info` describes to where `file`
        stands.

        One request. Nothing checks the bytes but their count. Raises ReplacedError where that object is no longer
        there, StorageError as the methods of Store do.
        """
        blob = self._bucket.blob(self._prefix + info.name, generation=info.generation)
        at, options = file.tell(), {"raw_download": True, "checksum": None, "timeout": self._timeout_s}

        def attempt() -> None:
            file.seek(at)
            try:
                blob.download_to_file(file, start=start, end=end - 1, retry=None, **options)
            except api.NotFound as error:
                self._refuse_missing_bucket(error)
                raise ReplacedError(f"{self.url}/{info.name} was replaced while it was read") from error
            if file.tell() - at != end - start:
                raise _WrongBytesError(f"{file.tell() - at} bytes came instead of {end - start}")

        self._retry("read", info.name, attempt)

    def stat(self, name: str) -> ObjectInfo | None:
        def attempt() -> ObjectInfo | None:
            blob = self._reload(name)
            return self._info(blob) if blob else None

        return self._retry("look up", name, attempt)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        def attempt() -> list[ObjectInfo]:
            blobs = self._client.list_blobs(
                self._bucket, prefix=self._prefix + prefix, retry=None, timeout=self._timeout_s
            )
            return [self._info(blob) for blob in blobs]

        return iter(self._retry("list", prefix, attempt))

    def delete(self, name: str, if_generation: int | None = None) -> None:
        def attempt() -> None:
            try:
                self._blob(name).delete(
                    if_generation_match=if_generation, retry=None, timeout=self._timeout_s
                )
            except api.NotFound as error:
                self._refuse_missing_bucket(error)
            except api.PreconditionFailed:
                present = self.stat(name)
                if present is not None:
                    raise conflict(name, if_generation, present, self.url) from None

        self._retry("delete", name, attempt)

    def location(self) -> str:
        """Where the bucket is, in lower case: `us-central2`, or `us` for all of it. Raises StorageError."""

        def attempt() -> str:
            self._bucket.reload(retry=None, timeout=self._timeout_s)
            return str(self._bucket.location).lower()

        return self._retry("look at the bucket of", "", attempt)

    def _put(self, wanted: ObjectInfo, file: BinaryIO, if_generation: int | None, kept: str) -> ObjectInfo:
        condition = if_generation
        upload: ResumableUpload | None = None

        def attempt() -> ObjectInfo:
            nonlocal condition, upload
            try:
                if wanted.size > self._chunk_bytes:
                    upload = upload or self._start_session(wanted, file, condition)
                    info = self._info_of_resource(wanted.name, upload.send())
                else:
                    info = self._send_whole(wanted, file, condition)
            except (SessionLostError, api.BadRequest, _WrongReplyError):
                upload = None
                raise
            except api.PreconditionFailed as error:
                upload, present = None, self.stat(wanted.name)
                if (present.generation if present else 0) == condition:
                    # Something on the way says so, or what stood there is gone: the next try will tell.
                    raise _WrongReplyError("refused, though all is as it was expected to be") from error
                return accept_or_conflict(wanted, if_generation, present, self.url)
            if (info.size, info.crc32c) != (wanted.size, wanted.crc32c):
                # Ours, but damaged: the next try replaces exactly that.
                condition, upload = (None if if_generation is None else info.generation), None
                raise _WrongBytesError(f"stored with crc32c {info.crc32c}, sent with {wanted.crc32c}")
            return info

        return self._retry("write", wanted.name, attempt, kept, lambda: upload.confirmed if upload else 0)

    def _send_whole(self, wanted: ObjectInfo, file: BinaryIO, condition: int | None) -> ObjectInfo:
        blob = self._blob(wanted.name, wanted.writer)
        blob.upload_from_file(
            file,
            rewind=True,
            size=wanted.size,
            content_type=_CONTENT_TYPE,
            if_generation_match=condition,
            checksum="crc32c",
            retry=None,
            timeout=self._timeout_s,
        )
        return self._info(blob)

    def _start_session(self, wanted: ObjectInfo, file: BinaryIO, condition: int | None) -> ResumableUpload:
        blob = self._blob(wanted.name, wanted.writer)
        blob.crc32c = wanted.crc32c  # the bucket checks it before the object becomes visible
        session_url = blob.create_resumable_upload_session(
            content_type=_CONTENT_TYPE,
            size=wanted.size,
            checksum=None,
            if_generation_match=condition,
            retry=None,
            timeout=self._timeout_s,
        )
        return ResumableUpload(session_url, file, wanted.size, self._chunk_bytes, self._timeout_s)

    def _reload(self, name: str) -> storage.Blob | None:
        blob = self._blob(name)
        try:
            blob.reload(retry=None, timeout=self._timeout_s)
        except api.NotFound as error:
            self._refuse_missing_bucket(error)
            return None
        return blob

    def _download(self, blob: storage.Blob, file: Any) -> None:
        """Fetches exactly the generation that `blob` describes."""
        try:
            blob.download_to_file(
                file, raw_download=True, checksum="crc32c", retry=None, timeout=self._timeout_s
            )
        except api.NotFound as error:
            raise _WrongBytesError("it was replaced while it was read") from error

    def _blob(self, name: str, writer: str | None = None) -> storage.Blob:
        blob = self._bucket.blob(self._prefix + name)
        if writer is not None:
            blob.metadata = {_WRITER_KEY: writer}
        return blob

    def _info(self, blob: storage.Blob) -> ObjectInfo:
        return self._info_of_resource(blob.name.removeprefix(self._prefix), blob._properties)

    def _info_of_resource(self, name: str, resource: Any) -> ObjectInfo:
        """What a reply says of an object; raises _WrongReplyError where it is not of this one, or not whole."""
        try:
            said, generation, crc32c = resource["name"], int(resource["generation"]), resource["crc32c"]
            size = int(resource["size"] if "size" in resource else _SIZE_LEFT_OUT[crc32c])
            writer = (resource.get("metadata") or {}).get(_WRITER_KEY)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _WrongReplyError(f"a reply that does not describe an object ({error!r})") from error
        if said != self._prefix + name:
            raise _WrongReplyError(f"a reply about another object, {said!r:.200}")
        return ObjectInfo(name, size, crc32c, generation, writer)

    def _retry(
        self,
        action: str,
        name: str,
        attempt: Callable[[], _Result],
        kept: str = "",
        progress: Callable[[], int] = lambda: 0,
    ) -> _Result:
        """Calls `attempt` until it succeeds, fails for good, or has failed for the whole budget."""
        what = f"{action} {self.url}/{name}"
        delays, deadline, reached = self._delays(), time.monotonic() + self._budget_s, 0
        while True:
            try:
                return attempt()
            except _LIBRARY_ERRORS as error:
                if not _is_transient(error):
                    raise StorageError(
                        f"cannot {what}: {_one_line(error)}. {self._advice(error)}{kept}"
                    ) from error
                if progress() > reached:
                    delays, deadline, reached = self._delays(), time.monotonic() + self._budget_s, progress()
                delay = next(delays)
                if time.monotonic() + delay > deadline:
                    raise StorageError(
                        f"could not {what} for {self._budget_s:.0f} s, last: {_one_line(error)}. Check the "
                        f"network, then start again{kept}"
                    ) from error
                _log.log(
                    self._log_retries_at,
                    "%s failed (%s); next try in %.1f s",
                    what,
                    _one_line(error),
                    delay,
                )
            if self._stop.wait(delay):
                raise TerminatedError(f"stopped while waiting to {what}{kept}")

    def _delays(self) -> Iterator[float]:
        delay = self._first_delay_s
        while True:
            yield delay * random.uniform(0.5, 1.0)  # so that a fleet does not come back in step
            delay = min(2 * delay, self._max_delay_s)

    def _connect(self) -> storage.Client:
        # Else the library looks the bucket up in a thread of its own, for traces that nobody collects.
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        try:
            if os.environ.get("STORAGE_EMULATOR_HOST"):
                return storage.Client(project="emulator", credentials=AnonymousCredentials())
            return storage.Client(project=None)
        except auth.GoogleAuthError as error:
            raise StorageError(
                f"cannot open {self.url}: {_one_line(error)}. {self._advice(error)}"
            ) from error

    def _refuse_missing_bucket(self, error: api.NotFound) -> None:
        """A 404 for the bucket is an error, one for the object an answer; only the text tells which."""
        if "bucket does not exist" in error.message:
            raise StorageError(f"cannot use {self.url}: {_one_line(error)}. {self._advice(error)}") from error

    def _advice(self, error: Exception) -> str:
        code = _code(error)
        bucket = self.url.split("/")[2]
        if code == 401 or isinstance(error, auth.GoogleAuthError):
            return "Log in: gcloud auth application-default login"
        if code == 403:
            return (
                f"This account may not do that in {bucket}: ask for the role Storage Object User, or log in: "
                "gcloud auth application-default login"
            )
        if code == 404:
            return f"Make the bucket: gsutil mb -l us-central1 gs://{bucket}/"
        return "Check the bucket and its settings"


def _is_transient(error: Exception) -> bool:
    if isinstance(error, _TRANSIENT):
        return True
    if isinstance(error, auth.GoogleAuthError):
        return error.retryable
    code = _code(error)
    if code == 400:
        # What arrived there has another checksum than what we sent: damaged on the way.
        return re.search("crc32c|md5|checksum", str(error), re.IGNORECASE) is not None
    return code is not None and (code in _TRANSIENT_CODES or code >= 500)


def _code(error: Exception) -> int | None:
    if isinstance(error, InvalidResponse):
        return error.response.status_code
    return int(error.code) if isinstance(error, api.GoogleAPICallError) and error.code else None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(redacted(str(error)).split())[:300]}".rstrip(".")
