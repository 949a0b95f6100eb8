"""A resumable upload to Cloud Storage, chunk by chunk, that goes on from wherever the bucket says it is.

google-cloud-storage starts such an upload over when a reply confirms part of a chunk or is lost for long;
for a shard of a gigabyte that is a gigabyte sent again. The protocol itself needs no more than this file:
https://cloud.google.com/storage/docs/performing-resumable-uploads (the session's URL is its authority).
"""

import re
from typing import Any, BinaryIO

import requests
from google.api_core.exceptions import from_http_response


class SessionLostError(Exception):
    """The upload session has expired; its bytes are gone and a new session is needed."""


class NoProgressError(Exception):
    """The bucket took a chunk and kept nothing of it."""


class ResumableUpload:
    """One upload session.

    Args:
        session_url: what creating the session returned.
        file: seekable, holds the whole object.
        size: of the object in bytes.
        chunk_bytes: a multiple of 256 KiB; at most this much is sent again after a failure.
        timeout_s: for connecting, and for each wait for data.
    """

    def __init__(self, session_url: str, file: BinaryIO, size: int, chunk_bytes: int, timeout_s: float):
        self.confirmed = 0
        self._url = session_url
        self._file = file
        self._size = size
        self._chunk_bytes = chunk_bytes
        self._timeout_s = timeout_s
        self._http = requests.Session()
        self._in_doubt = False

    def send(self) -> dict[str, Any]:
        """Sends what is missing and returns the object's resource; call again after a failure.

        Raises:
            SessionLostError: start a new session.
            NoProgressError, requests.RequestException, google.api_core.exceptions.GoogleAPICallError.
        """
        if self._in_doubt:
            resource = self._put(b"", f"bytes */{self._size}")
            if resource is not None:
                return resource
        while True:
            before = self.confirmed
            self._file.seek(before)
            chunk = self._file.read(self._chunk_bytes)
            resource = self._put(chunk, f"bytes {before}-{before + len(chunk) - 1}/{self._size}")
            if resource is not None:
                return resource
            if self.confirmed <= before:
                raise NoProgressError(f"the bucket kept nothing of bytes {before} to {before + len(chunk)}")

    def _put(self, data: bytes, content_range: str) -> dict[str, Any] | None:
        """One request; returns the finished object's resource, else None and `confirmed` is up to date."""
        self._in_doubt = True
        headers = {"Content-Range": content_range}
        # A 308 has no Location here; following redirects would be wrong.
        response = self._http.put(
            self._url, data=data, headers=headers, timeout=self._timeout_s, allow_redirects=False
        )
        if response.status_code in (404, 410):
            raise SessionLostError(f"status {response.status_code}")
        if response.status_code in (200, 201):
            return response.json()
        if response.status_code != 308:
            raise from_http_response(response)
        self._in_doubt = False
        end = re.fullmatch(r"bytes=0-(\d+)", response.headers.get("Range", ""))
        self.confirmed = int(end[1]) + 1 if end else 0
        return None
