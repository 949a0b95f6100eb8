"""A double of Cloud Storage's JSON API in memory, that fails on request.

    with FakeGcs() as server:
        server.faults.append(Fault("status", method="PUT", status=503))
        ... google.cloud.storage with STORAGE_EMULATOR_HOST=server.url ...
        assert server.tree() == {"name": b"..."}

It keeps generations and checks preconditions and checksums as the real thing does. Run it as
`python tests/fake_gcs.py --port 9000 --dump folder` for a process of its own; on SIGTERM or Ctrl-C it
writes its objects into the folder.
"""

import argparse
import base64
import email.parser
import email.policy
import hashlib
import json
import re
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c


@lru_cache(maxsize=64)
def crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


@lru_cache(maxsize=64)
def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


def turned_over(data: bytes) -> bytes:
    """The same with one bit changed."""
    return bytes([data[0] ^ 1]) + data[1:]


@dataclass
class Fault:
    """What goes wrong with the requests it matches: the `nth` one and, `times` in all, those after it.

    name: of the object that a request of one piece stores; any if empty.

    Kinds:
        status: answer `status` and do nothing.
        reset: take `keep` bytes of the body (a session stores them), then reset the connection.
        stall: take the request, answer nothing until the server stops.
        short: a session stores only `keep` bytes of the chunk and says so in a 308.
        lose_reply: do it, then reset the connection instead of answering.
        expire: forget the upload session and answer 410.
        corrupt: do it, with one bit of what is sent in answer, or stored after the checks, turned over.
        garble: turn over a bit of what was sent, before the checks that the bucket makes.
        cut: send half of the answer's body, then reset the connection.
        bare: answer 412 and nothing else, whatever the condition is.
        vanish: do it, and delete the object before the answer is sent.
        strange: do it, but the answer describes the object as `reply` says.
    """

    kind: str
    method: str = ""
    path: str = ""
    name: str = ""
    nth: int = 1
    times: int = 1
    status: int = 503
    keep: int = 0
    seen: int = 0
    reply: dict[str, Any] = field(default_factory=dict)

    def strikes(self, method: str, path: str, body: bytes = b"") -> bool:
        """body: its beginning."""
        if (self.method and self.method != method) or self.path not in path or self.name.encode() not in body:
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times


@dataclass
class Stored:
    """One object."""

    data: bytes
    generation: int
    metadata: dict[str, str]

    def resource(self, bucket: str, name: str) -> dict[str, Any]:
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(self.data)),
            "generation": str(self.generation),
            "metageneration": "1",
            "crc32c": crc32c(self.data),
            "md5Hash": md5(self.data),
            "metadata": self.metadata,
        }


@dataclass
class Session:
    """A resumable upload; `done` is the object's resource once it is finished."""

    bucket: str
    resource: dict[str, Any]
    query: dict[str, str]
    data: bytearray = field(default_factory=bytearray)
    done: dict[str, Any] | None = None


class ApiError(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def wanted_range(headers: Mapping[str, str], size: int) -> tuple[int, int]:
    """Start and end of the bytes that a request asks for."""
    if "Range" not in headers:
        return 0, size
    first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", headers["Range"]).groups()
    return int(first), int(last) + 1


class FakeGcs:
    """The server; a context manager that serves on 127.0.0.1 in a thread.

    Attributes:
        faults: the script; each request takes the first fault that strikes.
        requests: (method, path with query) of everything that arrived.
        body_bytes: request body bytes that arrived.
        sent_bytes: of objects' content, that were sent.
        latency_s, rate: seconds before each answer, and bytes a second of all answers together (0: as fast as can be).
        upload_rate: bytes a second of what one connection sends.
        uploads: names of the objects that whole bodies arrived for, stored or refused.
        page_size: objects in a page of a listing.
    """

    def __init__(self, buckets: Sequence[str] = ("bucket",), port: int = 0, page_size: int = 1000):
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.body_bytes = self.sent_bytes = 0
        self.latency_s = self.rate = self.upload_rate = 0.0
        self.link = threading.Lock()
        self.uploads: list[str] = []
        self.page_size = page_size
        self.location = "US-CENTRAL2"
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        self.sessions: dict[str, Session] = {}
        self._objects: dict[str, dict[str, Stored]] = {bucket: {} for bucket in buckets}
        self._generation = 1000
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._server.fake = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def tree(self, bucket: str = "bucket") -> dict[str, bytes]:
        """Everything that is stored: name -> bytes, by name."""
        with self.lock:
            return {name: self._objects[bucket][name].data for name in sorted(self._objects[bucket])}

    def struck(self, method: str, path: str, body: bytes) -> Fault | None:
        with self.lock:
            self.requests.append((method, path))
            striking = [fault for fault in self.faults if fault.strikes(method, path, body)]
            return striking[0] if striking else None

    def objects(self, bucket: str) -> dict[str, Stored]:
        if bucket not in self._objects:
            raise ApiError(404, "The specified bucket does not exist.")
        return self._objects[bucket]

    def get(self, bucket: str, name: str, query: dict[str, str]) -> Stored:
        stored = self.objects(bucket).get(name)
        if stored is None or query.get("generation", str(stored.generation)) != str(stored.generation):
            raise ApiError(404, f"No such object: {bucket}/{name}")
        return stored

    def check_condition(self, bucket: str, name: str, query: dict[str, str]) -> None:
        present = self.objects(bucket).get(name)
        expected = query.get("ifGenerationMatch")
        if expected is not None and int(expected) != (present.generation if present else 0):
            raise ApiError(412, "At least one of the pre-conditions you specified did not hold.")

    def store(
        self, bucket: str, resource: dict[str, Any], data: bytes, query: dict[str, str]
    ) -> dict[str, Any]:
        """Checks and commits one object; returns its resource."""
        name = resource["name"]
        self.uploads.append(name)
        self.check_condition(bucket, name, query)
        if resource.get("crc32c", crc32c(data)) != crc32c(data):
            raise ApiError(400, "Provided CRC32C does not match calculated CRC32C.")
        if resource.get("md5Hash", md5(data)) != md5(data):
            raise ApiError(400, "Provided MD5 hash does not match calculated MD5 hash.")
        self._generation += 1
        stored = Stored(bytes(data), self._generation, resource.get("metadata") or {})
        self.objects(bucket)[name] = stored
        return stored.resource(bucket, name)

    def damage(self, bucket: str, name: str) -> dict[str, Any]:
        """Turns over a bit of what is stored; returns the resource as it is now."""
        stored = self.objects(bucket)[name]
        stored.data = turned_over(stored.data)
        return stored.resource(bucket, name)


class _Server(ThreadingHTTPServer):
    """Says nothing of clients that are killed in the middle of a request."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes; with Nagle's algorithm each answer would wait for the client's ACK.
    disable_nagle_algorithm = True

    @property
    def fake(self) -> FakeGcs:
        return self.server.fake

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length", 0))
        self.fault = self.fake.struck(self.command, unquote(self.path), self.rfile.peek() if length else b"")
        kind = self.fault.kind if self.fault else ""
        self.body = self.rfile.read(min(length, self.fault.keep) if kind == "reset" else length)
        self.fake.body_bytes += len(self.body)
        if self.fake.upload_rate:
            time.sleep(length / self.fake.upload_rate)
        if kind != "reset" and len(self.body) < length:
            return self._reset()  # the client died while it sent this
        if kind == "stall":
            self.fake.stopping.wait()
            return self._reset()
        if kind == "status":
            return self._error(ApiError(self.fault.status, "injected"))
        if kind == "bare":
            return self._send(412, {}, b"")
        if kind == "reset" and "upload_id" not in self.query:
            return self._reset()
        try:
            with self.fake.lock:
                status, headers, data = self._answer(parts.path)
        except ApiError as error:
            if kind == "vanish":
                self.fake.objects("bucket").clear()
            return self._error(error)
        if kind == "strange":
            data = self._strange(data)
        if kind in ("lose_reply", "reset"):
            return self._reset()
        self._send(status, headers, data)

    def _strange(self, data: bytes) -> bytes:
        """The description as the fault has it; a key whose value is None is left out."""
        said = json.loads(data or b"{}")
        if "generation" not in said:
            return data
        said |= self.fault.reply
        return json.dumps({key: value for key, value in said.items() if value is not None}).encode()

    def _answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        match = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path)
        if match is None:
            raise ApiError(404, f"no such method: {path}")
        kind, bucket, name = match[1], unquote(match[2]), unquote(match[3] or "")
        if kind == "/upload":
            return self._session(bucket) if "upload_id" in self.query else self._upload(bucket)
        if not path.rpartition("/b/")[2].partition("/")[1]:
            self.fake.objects(bucket)
            return 200, {}, json.dumps({"name": bucket, "location": self.fake.location}).encode()
        if not name:
            return 200, {}, self._list(bucket)
        if self.command == "DELETE":
            self.fake.get(bucket, name, self.query)
            self.fake.check_condition(bucket, name, self.query)
            del self.fake.objects(bucket)[name]
            return 204, {}, b""
        return self._get(bucket, name)

    def _get(self, bucket: str, name: str) -> tuple[int, dict[str, str], bytes]:
        stored = self.fake.get(bucket, name, self.query)
        if self.query.get("alt") != "media":
            return 200, {}, json.dumps(stored.resource(bucket, name)).encode()
        start, end = wanted_range(self.headers, len(stored.data))
        data, status = stored.data[start:end], 206 if "Range" in self.headers else 200
        self.fake.sent_bytes += len(data)
        if self.fault and self.fault.kind == "corrupt":
            # Without the header of checksums, as behind a proxy: the library alone would not see it.
            return status, {}, data[:-1] + bytes([data[-1] ^ 1])
        resource = stored.resource(bucket, name)
        hashes = f"crc32c={resource['crc32c']},md5={resource['md5Hash']}"
        return status, {"X-Goog-Hash": hashes, "X-Goog-Generation": resource["generation"]}, data

    def _list(self, bucket: str) -> bytes:
        prefix = self.query.get("prefix", "")
        objects = self.fake.objects(bucket)
        names = sorted(name for name in objects if name.startswith(prefix))
        start = int(self.query.get("pageToken", 0))
        end = start + min(self.fake.page_size, int(self.query.get("maxResults", 1000)))
        page = {"kind": "storage#objects"}
        page["items"] = [objects[name].resource(bucket, name) for name in names[start:end]]
        if end < len(names):
            page["nextPageToken"] = str(end)
        return json.dumps(page).encode()

    def _upload(self, bucket: str) -> tuple[int, dict[str, str], bytes]:
        if self.query.get("uploadType") == "resumable":
            resource = json.loads(self.body or b"{}")
            resource.setdefault("name", self.query.get("name"))
            self.fake.check_condition(bucket, resource["name"], self.query)
            session = f"session-{len(self.fake.sessions)}"
            self.fake.sessions[session] = Session(bucket, resource, self.query)
            location = (
                f"{self.fake.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={session}"
            )
            return 200, {"Location": location}, b""
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + self.body)
        described, _ = message.iter_parts()
        # The parser decodes line ends; the data is cut out of the body by its boundary instead.
        boundary = b"\r\n--" + message.get_boundary().encode()
        data = self.body.split(boundary)[1].split(b"\r\n\r\n", 1)[1]
        resource = json.loads(described.get_content())
        return 200, {}, self._stored(bucket, resource, data, self.query)

    def _stored(self, bucket: str, resource: dict[str, Any], data: bytes, query: dict[str, str]) -> bytes:
        if self.fault and self.fault.kind == "garble":
            data = turned_over(data)
        stored = self.fake.store(bucket, resource, data, query)
        if self.fault and self.fault.kind == "corrupt":
            stored = self.fake.damage(bucket, resource["name"])
        return json.dumps(stored).encode()

    def _session(self, bucket: str) -> tuple[int, dict[str, str], bytes]:
        """A chunk, or the question how much is there (`bytes */size`)."""
        if self.fault and self.fault.kind == "expire":
            self.fake.sessions.pop(self.query["upload_id"], None)
        session = self.fake.sessions.get(self.query["upload_id"])
        if session is None:
            raise ApiError(410, "The upload session has expired.")
        if session.done is None:
            self._take_chunk(session)
        if session.done is not None:
            return 200, {}, json.dumps(session.done).encode()
        return 308, {"Range": f"bytes=0-{len(session.data) - 1}"} if session.data else {}, b""

    def _take_chunk(self, session: Session) -> None:
        match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", self.headers["Content-Range"])
        if match[1] is not None:
            if int(match[1]) > len(session.data):
                raise ApiError(400, "a chunk starts after the end of what is stored")
            fresh = self.body[len(session.data) - int(match[1]) :]
            session.data += fresh[: self.fault.keep] if self.fault and self.fault.kind == "short" else fresh
        if len(session.data) == int(match[2]):
            stored = self._stored(session.bucket, session.resource, bytes(session.data), session.query)
            session.done = json.loads(stored)

    def _error(self, error: ApiError) -> None:
        body = {"error": {"code": error.status, "message": str(error)}}
        self._send(error.status, {}, json.dumps(body).encode())

    def _travel(self, size: int) -> None:
        time.sleep(self.fake.latency_s)
        if self.fake.rate:
            with self.fake.link:
                time.sleep(size / self.fake.rate)

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self._travel(len(data))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.fault and self.fault.kind == "cut":
            self.wfile.write(data[: len(data) // 2])
            return self._reset()
        self.wfile.write(data)

    def _reset(self) -> None:
        """Ends the connection as a crashed peer does: RST, no FIN."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # the socket stays open as long as this file does
        self.connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bucket", default="bucket")
    parser.add_argument("--dump", type=Path, help="folder that gets the objects in the end")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=0.0, help="bytes a second of all answers together")
    parser.add_argument(
        "--upload_rate", type=float, default=0.0, help="bytes a second of what a connection sends"
    )
    args = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with FakeGcs([args.bucket], args.port) as server:
        server.latency_s, server.rate, server.upload_rate = args.latency, args.rate, args.upload_rate
        print(server.url, flush=True)
        stop.wait()
        for name, data in server.tree(args.bucket).items() if args.dump else ():
            path = args.dump / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


if __name__ == "__main__":
    main()
