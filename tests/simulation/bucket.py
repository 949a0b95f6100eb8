"""A bucket in memory under the real GcsStore: the part of google.cloud.storage that it uses, and its sessions.

Every request is a step of the simulation: it may fail, lose its reply, be delayed until its sender is dead, or be
taken in part.
"""

import base64
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import google_crc32c
import requests
from google.api_core import exceptions as api


def crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


@dataclass(frozen=True)
class Stored:
    """One generation of an object."""

    data: bytes
    generation: int
    metadata: dict[str, str]
    crc32c: str


@dataclass
class Session:
    """A resumable upload."""

    name: str
    condition: int | None
    metadata: dict[str, str]
    crc32c: str
    size: int
    data: bytes = b""
    done: Stored | None = None


@dataclass
class Bucket:
    """Objects, sessions and requests that are still on their way.

    before: says what is to go wrong with a request, None for nothing. after: told of each object that changed. as_sent:
    makes a request one that arrives as its sender's, whoever is at work then.
    """

    before: Callable[[str], str | None] = lambda what: None
    after: Callable[[str], None] = lambda name: None
    as_sent: Callable[[Callable[[], object]], Callable[[], object]] = lambda work: work
    objects: dict[str, Stored] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)
    late: list[Callable[[], object]] = field(default_factory=list)
    _generation: int = 1000

    def request(self, what: str, work: Callable[[], Any]) -> Any:
        """Does `work`, or what is to go wrong with it."""
        trouble = self.before(what)
        if trouble is None:
            return work()
        if trouble == "late":
            self.late.append(self.as_sent(work))
            raise requests.ReadTimeout("no answer")
        if trouble == "lose":
            arrive(work)
            raise requests.ConnectionError("the reply was lost")
        raise (
            api.ServiceUnavailable("injected") if trouble == "full" else requests.ConnectionError("injected")
        )

    def check(self, name: str, condition: int | None) -> None:
        present = self.objects.get(name)
        if condition is not None and condition != (present.generation if present else 0):
            raise api.PreconditionFailed("the condition does not hold")

    def put(self, name: str, data: bytes, metadata: dict[str, str], condition: int | None) -> Stored:
        self.check(name, condition)
        self._generation += 1
        self.objects[name] = Stored(data, self._generation, metadata, crc32c(data))
        self.after(name)
        return self.objects[name]

    def get(self, name: str, generation: int | None = None) -> Stored:
        stored = self.objects.get(name)
        if stored is None or generation not in (None, stored.generation):
            raise api.NotFound(f"no such object: {name}")
        return stored

    def delete(self, name: str, condition: int | None) -> None:
        self.get(name)
        self.check(name, condition)
        del self.objects[name]
        self.after(name)


def arrive(work: Callable[[], object]) -> None:
    """A request whose sender hears nothing of it."""
    try:
        work()
    except api.GoogleAPICallError:
        return


class Client:
    """In the place of google.cloud.storage.Client."""

    def __init__(self, bucket: Bucket):
        self._bucket = bucket

    def bucket(self, name: str) -> "Client":
        return self

    def blob(self, name: str) -> "Blob":
        return Blob(self._bucket, name)

    def list_blobs(self, bucket: object, prefix: str, **_: object) -> Iterator["Blob"]:
        def work() -> list[Blob]:
            objects = self._bucket.objects
            return [
                Blob(self._bucket, name, objects[name]) for name in sorted(objects) if name.startswith(prefix)
            ]

        return iter(self._bucket.request(f"list {prefix}", work))


class Blob:
    """In the place of google.cloud.storage.Blob."""

    def __init__(self, bucket: Bucket, name: str, stored: Stored | None = None):
        self.name, self.metadata, self.crc32c = name, None, None
        self._bucket = bucket
        if stored is not None:
            self._is(stored)

    def _is(self, stored: Stored) -> None:
        self._properties = resource(self.name, stored)
        self.generation, self.metadata = stored.generation, stored.metadata

    def reload(self, **_: object) -> None:
        self._is(self._bucket.request(f"stat {self.name}", lambda: self._bucket.get(self.name)))

    def delete(self, if_generation_match: int | None, **_: object) -> None:
        self._bucket.request(
            f"delete {self.name}", lambda: self._bucket.delete(self.name, if_generation_match)
        )

    def download_to_file(self, file: Any, **_: object) -> None:
        generation = self.generation
        stored = self._bucket.request(f"get {self.name}", lambda: self._bucket.get(self.name, generation))
        file.write(stored.data)

    def upload_from_file(self, file: Any, if_generation_match: int | None, **_: object) -> None:
        file.seek(0)
        data, metadata = file.read(), self.metadata or {}
        self._is(
            self._bucket.request(
                f"put {self.name}",
                lambda: self._bucket.put(self.name, data, metadata, if_generation_match),
            )
        )

    def create_resumable_upload_session(self, size: int, if_generation_match: int | None, **_: object) -> str:
        session = Session(self.name, if_generation_match, self.metadata or {}, self.crc32c, size)

        def work() -> str:
            self._bucket.check(self.name, if_generation_match)
            url = f"session-{len(self._bucket.sessions)}"
            self._bucket.sessions[url] = session
            return url

        return self._bucket.request(f"put {self.name} (begin)", work)


class Http:
    """In the place of requests.Session, for the chunks of resumable uploads."""

    def __init__(self, bucket: Bucket):
        self._bucket = bucket

    def put(self, url: str, data: bytes, headers: dict[str, str], **_: object) -> "Answer":
        session = self._bucket.sessions[url]
        try:
            return self._bucket.request(
                f"put {session.name} (chunk)", lambda: take_chunk(self._bucket, session, data, headers)
            )
        except api.PreconditionFailed:
            return Answer(412)


@dataclass
class Answer:
    """In the place of requests.Response."""

    status_code: int
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    request: Any = field(default_factory=lambda: SimpleNamespace(method="PUT", url="session"))
    text: str = ""

    def json(self) -> dict[str, Any]:
        return self.body


def take_chunk(bucket: Bucket, session: Session, data: bytes, headers: dict[str, str]) -> Answer:
    """Stores a chunk, and the object with the last one."""
    start = re.match(r"bytes (\d+)-", headers["Content-Range"])
    if start is not None and session.done is None:
        session.data += data[len(session.data) - int(start[1]) :]
    if session.done is None and len(session.data) == session.size:
        session.done = bucket.put(session.name, session.data, session.metadata, session.condition)
    if session.done is not None:
        return Answer(200, {}, resource(session.name, session.done))
    return Answer(308, {"Range": f"bytes=0-{len(session.data) - 1}"} if session.data else {})


def resource(name: str, stored: Stored) -> dict[str, Any]:
    """What the bucket says of an object."""
    return {
        "name": name,
        "size": str(len(stored.data)),
        "generation": str(stored.generation),
        "crc32c": stored.crc32c,
        "metadata": stored.metadata,
    }
