"""google-cloud-storage for real, against a double that fails in every way we know of."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import requests

from qwen_jax.errors import ConfigError, StorageError, TerminatedError
from qwen_jax.settings import bucket_url
from qwen_jax.storage import PreconditionFailedError, open_store
from qwen_jax.storage.checksum import crc32c_of
from qwen_jax.storage.gcs import GcsStore
from qwen_jax.storage.store import ReplacedError
from tests import fake_gcs
from tests.fake_gcs import FakeGcs, Fault
from tests.few import few
from tests.storage.contract import BIG, StoreContract
from tests.waiting import until

SMALL = b"a small object"
CHUNK = 256 << 10


@pytest.fixture
def server(monkeypatch):
    with FakeGcs() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


def quick_store(**changes) -> GcsStore:
    settings = {
        "chunk_bytes": CHUNK,
        "budget_s": 10.0,
        "first_delay_s": 0.001,
        "max_delay_s": 0.01,
        "timeout_s": 0.5,
    }
    return GcsStore("bucket", "activations", **{**settings, **changes})


@pytest.fixture
def store(server):
    return quick_store()


class TestGcsStore(StoreContract):
    def test_listings_have_pages(self, server, store):
        server.page_size = 2
        names = [f"tpu_1/{number}" for number in range(5)]
        for name in names:
            store.put_bytes(name, b"x")
        assert [info.name for info in store.list("tpu_1/")] == names
        assert sum("pageToken" in path for _, path in server.requests) == 2

    def test_names_stay_under_the_prefix(self, server, store):
        GcsStore("bucket", "").put_bytes("elsewhere", b"x")
        store.put_bytes("a", b"1")
        assert [info.name for info in store.list()] == ["a"]
        assert server.tree() == {"activations/a": b"1", "elsewhere": b"x"}


@pytest.mark.parametrize("prefix", ["exp#1", "exp?2", "a%23b", "#", "ümlaut x"])
def test_a_prefix_is_a_name_and_no_address(server, prefix):
    open_store(bucket_url("bucket", prefix, 0)).put_bytes("a", b"1")
    assert server.tree() == {f"{prefix}/tpu_0/a": b"1"}


WRITE_FAULTS = [
    Fault("status", "POST", status=408),
    Fault("status", "POST", status=429),
    Fault("status", "POST", status=500),
    Fault("status", "POST", status=503, times=5),
    Fault("status", "POST", status=410),
    Fault("reset", "POST"),
    Fault("reset", "POST", keep=5),
    Fault("stall", "POST"),
    Fault("lose_reply", "POST"),
    Fault("lose_reply", "POST", times=3),
    Fault("corrupt", "POST"),
    Fault("garble", "POST"),
    Fault("cut", "POST"),
    Fault("status", "PUT", status=408, nth=2),
    Fault("status", "PUT", status=429, nth=2),
    Fault("status", "PUT", status=503, nth=2, times=5),
    Fault("status", "PUT", status=410),
    Fault("status", "PUT", status=404, nth=3),
    Fault("reset", "PUT", nth=2),
    Fault("reset", "PUT", nth=2, keep=100_000),
    Fault("reset", "PUT", nth=4, keep=100_000, times=3),
    Fault("stall", "PUT", nth=2),
    Fault("short", "PUT", nth=2, keep=100_000),
    Fault("short", "PUT", nth=4, keep=1),
    Fault("short", "PUT", nth=2, keep=0, times=3),
    Fault("lose_reply", "PUT", nth=1),
    Fault("lose_reply", "PUT", nth=4),
    Fault("lose_reply", "PUT", nth=4, times=3),
    Fault("expire", "PUT", nth=3),
    Fault("expire", "PUT", nth=2, times=2),
    Fault("corrupt", "PUT", nth=4),
    Fault("garble", "PUT", nth=4),
    Fault("cut", "PUT", nth=4),
]


STRANGE_REPLIES = [
    {"size": None},
    {"crc32c": None},
    {"generation": None},
    {"name": None},
    {"name": "activations/other"},
    {"size": "many"},
    {"size": "7"},
    {"crc32c": "AAAAAA=="},
]


def show(value: object) -> str | None:
    if not isinstance(value, Fault):
        return None
    kind = f"status {value.status}" if value.kind == "status" else value.kind
    return f"{kind} {value.method} {value.path} {value.nth} x{value.times} keep {value.keep}"


@pytest.mark.parametrize("fault", WRITE_FAULTS, ids=show)
@pytest.mark.parametrize("condition", few(["new", "replace", "any"]))
def test_a_write_survives(server, tmp_path, fault, condition):
    data = BIG if fault.method == "PUT" else SMALL
    (tmp_path / "shard").write_bytes(data)
    store = quick_store()
    expected = {"new": 0, "any": None}.get(condition)
    if condition == "replace":
        expected = store.put_bytes("shard", b"dead predecessor", 0).generation
    fault.seen = 0
    server.faults.append(fault)
    info = store.put_file("shard", tmp_path / "shard", expected, writer="me")
    assert fault.seen >= fault.nth, "the fault did not strike"
    assert server.tree() == {"activations/shard": data}
    assert (info.size, info.crc32c, info.writer) == (len(data), crc32c_of(data), "me")
    assert store.stat("shard") == info


@pytest.mark.parametrize("fault", [fault for fault in WRITE_FAULTS if fault.kind != "corrupt"], ids=show)
def test_a_write_is_committed_once(server, fault):
    """Exactly one generation: no fault makes a conditional write happen twice."""
    store = quick_store()
    fault.seen = 0
    server.faults.append(fault)
    first = store.put_bytes("a", BIG if fault.method == "PUT" else SMALL, 0)
    assert first.generation == 1001


@pytest.mark.parametrize("reply", STRANGE_REPLIES, ids=str)
@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("condition", [0, None])
def test_a_reply_about_something_else_is_a_fault(server, store, reply, method, condition):
    data = BIG if method == "PUT" else SMALL
    server.faults.append(Fault("strange", method, "upload", nth=4 if data is BIG else 1, reply=reply))
    info = store.put_bytes("a", data, condition, writer="me")
    assert server.tree() == {"activations/a": data}
    assert (info.name, info.size, info.crc32c) == ("a", len(data), crc32c_of(data))
    assert store.stat("a") == info


@pytest.mark.parametrize("reply", STRANGE_REPLIES[:6], ids=str)
def test_a_look_up_that_speaks_of_something_else_is_tried_again(server, store, reply):
    info = store.put_bytes("a", SMALL)
    server.faults.append(Fault("strange", "GET", reply=reply))
    assert store.stat("a") == info
    assert len(server.requests) == 3


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_refusal_that_nothing_explains_is_tried_again(server, store, method):
    data = BIG if method == "PUT" else SMALL
    server.faults.append(Fault("bare", method, times=2))
    assert store.put_bytes("a", data, 0, writer="me").size == len(data)
    server.faults.append(Fault("bare", method, times=10**6))
    with pytest.raises(StorageError, match="refused, though all is as it was expected"):
        quick_store(budget_s=0.1).put_bytes("b", data, 0, writer="me")


@pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
def test_an_object_that_vanishes_between_a_refusal_and_its_look_up(server, store, data):
    store.put_bytes("a", b"dead writer's")
    server.faults.append(Fault("vanish", "POST"))
    assert store.put_bytes("a", data, 0, writer="me").size == len(data)
    assert server.tree() == {"activations/a": data}


@pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
def test_what_is_damaged_on_the_way_is_sent_again(server, store, data, monkeypatch):
    """The bucket answers 400, because the checksum is another."""
    refused, crc = [], fake_gcs.crc32c

    def damaged(arrived):
        if len(arrived) == len(data) and len(refused) < 2:
            refused.append(arrived)
            return "AAAAAA=="
        return crc(arrived)

    monkeypatch.setattr(fake_gcs, "crc32c", damaged)
    store.put_bytes("a", data, 0)
    assert refused and server.tree() == {"activations/a": data}


def test_an_uploads_authority_is_nowhere_shown(server, caplog):
    server.faults.append(Fault("status", "PUT", times=10**6))
    with caplog.at_level(logging.DEBUG, "qwen_jax"), pytest.raises(StorageError) as caught:
        quick_store(budget_s=0.1).put_bytes("a", BIG, 0)
    shown = caplog.text + str(caught.value)
    assert "upload_id=..." in shown and "session-" not in shown


@pytest.mark.parametrize(
    "text",
    [
        "url: /upload?uploadType=resumable&upload_id=SECRET (Caused by ...)",
        "https://x/o?X-Goog-Signature=SECRET&x=1",
        "Authorization: Bearer SECRET",
        "{'Authorization': 'Bearer SECRET'}",
        "export HF_TOKEN=SECRET && x",
        "token hf_SECRETSECRET was refused",
        "ya29.SECRETSECRET",
        "https://x/?access_token=SECRET",
    ],
)
def test_what_grants_access_is_redacted(text):
    assert "SECRET" not in str(StorageError(text)) and "..." in str(StorageError(text))


def test_what_grants_nothing_is_left(server):
    text = "sample 3 (task key) at gs://bucket/a/monkey=1: 5 tokens, tokenizer, keep_tokens=all, hf_x"
    assert str(StorageError(text)) == text


@pytest.mark.parametrize(
    ("fault", "most"),
    [
        (Fault("short", "PUT", nth=3, keep=1000), 1),
        (Fault("lose_reply", "PUT", nth=3), 1),
        (Fault("reset", "PUT", nth=3, keep=200_000), 1),
        (Fault("status", "PUT", nth=3, times=4), 1),
    ],
    ids=show,
)
def test_what_is_sent_again_is_bounded_by_a_chunk(server, store, fault, most):
    server.faults.append(fault)
    store.put_bytes("a", BIG, 0)
    assert server.body_bytes < len(BIG) + most * CHUNK + 2000


READ_FAULTS = [
    *(Fault("status", "GET", status=status, times=2) for status in (408, 429, 500, 503)),
    Fault("reset", "GET"),
    Fault("stall", "GET"),
    Fault("cut", "GET"),
    Fault("reset", "GET", "alt=media"),
    Fault("stall", "GET", "alt=media"),
    Fault("cut", "GET", "alt=media", times=2),
    Fault("corrupt", "GET", "alt=media"),
    Fault("status", "GET", "alt=media", status=404),
]


@pytest.mark.parametrize("fault", few(READ_FAULTS, 6), ids=show)
def test_a_read_survives(server, store, tmp_path, fault):
    info = store.put_bytes("a", BIG, 0)
    for read in (
        lambda: store.get_bytes("a") == (BIG, info),
        lambda: store.download_file("a", tmp_path / "a") == info and (tmp_path / "a").read_bytes() == BIG,
    ):
        fault.seen = 0
        server.faults[:] = [fault]
        assert read()
        assert fault.seen >= fault.nth, "the fault did not strike"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["status", "reset", "stall", "lose_reply", "cut"])
def test_stat_list_and_delete_survive(server, store, kind):
    info = store.put_bytes("a", b"1")
    for method, call in (
        ("GET", lambda: store.stat("a") == info),
        ("GET", lambda: list(store.list()) == [info]),
        ("DELETE", lambda: store.delete("a", info.generation) is None),
    ):
        server.faults[:] = [Fault(kind, method)]
        assert call()
        assert server.faults[0].seen > 1 or kind == "cut"
    assert server.tree() == {}


def test_a_listing_that_breaks_on_its_second_page(server, store):
    server.page_size = 2
    for number in range(5):
        store.put_bytes(f"{number}", b"x")
    server.faults.append(Fault("status", "GET", "pageToken"))
    assert [info.name for info in store.list()] == ["0", "1", "2", "3", "4"]


def test_a_lost_reply_is_not_anothers_write(server, store):
    """Our fencing object lost its reply, but another worker with equal bytes was first."""
    store.put_bytes("checkpoint", SMALL, 0, writer="other")
    server.faults.append(Fault("lose_reply", "POST"))
    with pytest.raises(PreconditionFailedError) as caught:
        store.put_bytes("checkpoint", SMALL, 0, writer="me")
    assert caught.value.present.writer == "other"


@pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "gcloud auth application-default login"), (403, "Storage Object User"), (400, "settings")],
)
def test_refusals_end_at_once(server, store, data, status, advice):
    server.faults.append(Fault("status", "POST", status=status, times=99))
    with pytest.raises(StorageError, match=f"cannot write gs://bucket/activations/a: .*{advice}"):
        store.put_bytes("a", data, 0)
    assert len(server.requests) == 1 and server.tree() == {}


def test_a_missing_bucket_is_no_empty_bucket(server, tmp_path):
    store = GcsStore("none", "x", first_delay_s=0.001)
    (tmp_path / "a").write_bytes(b"1")
    for call in (
        lambda: store.put_bytes("a", b"1"),
        lambda: store.get_bytes("a"),
        lambda: store.download_file("a", tmp_path / "b"),
        lambda: store.stat("a"),
        lambda: store.list(),
        lambda: store.delete("a"),
    ):
        with pytest.raises(StorageError, match=r"gsutil mb -l us-central1 gs://none/"):
            call()


@pytest.mark.parametrize(
    ("kind", "method", "data"),
    few(
        [
            *((kind, "", data) for kind in ("reset", "corrupt") for data in (SMALL, BIG)),
            ("status", "POST", SMALL),
            ("status", "PUT", BIG),
            ("short", "PUT", BIG),
            ("expire", "PUT", BIG),
        ],
        2,
    ),
    ids=lambda value: str(len(value)) if isinstance(value, bytes) else value,
)
def test_the_budget_ends(server, tmp_path, kind, method, data, caplog):
    (tmp_path / "shard").write_bytes(data)
    server.faults.append(Fault(kind, method, times=10**6))
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError) as caught:
        quick_store(budget_s=1.0).put_file("a", tmp_path / "shard", 0)
    assert re.search(
        rf"could not write .*/a for 1 s, .*then start again; the local file {tmp_path}/shard is kept",
        str(caught.value),
    )
    assert (tmp_path / "shard").read_bytes() == data
    assert "next try in" in caplog.text and caught.value.exit_code == 75


def test_the_budget_starts_anew_when_an_upload_gets_on(server, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("qwen_jax.storage.gcs.time.monotonic", lambda: clock[0])
    store = quick_store(budget_s=7.0)

    class Waits(threading.Event):
        def wait(self, timeout=None):
            clock[0] += 4.0
            return False

    store._stop = Waits()
    # Every second request fails: twelve seconds of failures in all, never two without progress.
    server.faults.extend(Fault("status", "PUT", nth=nth) for nth in (2, 5, 8))
    assert store.put_bytes("a", BIG, 0).size == len(BIG)
    assert clock[0] == 12.0


def test_a_server_that_is_not_there(monkeypatch):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{sock.getsockname()[1]}")
        with pytest.raises(StorageError, match="Check the network"):
            quick_store(budget_s=0.05).stat("a")


def test_stop_ends_the_waiting(server):
    stop = threading.Event()
    store = quick_store(stop=stop, first_delay_s=60.0, max_delay_s=60.0, budget_s=1000.0)
    server.faults.append(Fault("status", times=10**6))
    threading.Timer(0.1, stop.set).start()
    start = time.monotonic()
    with pytest.raises(TerminatedError, match="stopped while waiting to write gs://bucket/activations/a"):
        store.put_bytes("a", BIG, 0)
    assert time.monotonic() - start < 10
    server.faults.clear()
    assert store.put_bytes("a", SMALL, 0).size == len(SMALL)  # what needs no waiting still gets through


def test_the_buckets_checksum_check_refuses_what_was_damaged_on_the_way(server, tmp_path, monkeypatch):
    """The file changes between our checksum and the upload, as a bad disk would have it."""
    path = tmp_path / "shard"
    path.write_bytes(BIG)
    store = quick_store(budget_s=0.1)
    start_session = store._start_session

    def damage(*args):
        path.write_bytes(b"?" + BIG[1:])
        return start_session(*args)

    monkeypatch.setattr(store, "_start_session", damage)
    with pytest.raises(StorageError, match="CRC32C does not match"):
        store.put_file("a", path, 0)
    assert server.tree() == {}


def test_chunks_must_fit_the_protocol(server):
    for size in (0, 1000, CHUNK + 1):
        with pytest.raises(ConfigError, match="multiple of 262144"):
            GcsStore("bucket", chunk_bytes=size)


def test_no_credentials(monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(StorageError, match="gcloud auth application-default login"):
        open_store("gs://bucket/activations")


def test_the_double_is_also_a_process_of_its_own(tmp_path, monkeypatch):
    command = [sys.executable, "tests/fake_gcs.py", "--dump", tmp_path / "dump"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", process.stdout.readline().strip())
        quick_store().put_bytes("tpu_0/a", BIG, 0)
        process.terminate()
    assert (tmp_path / "dump/activations/tpu_0/a").read_bytes() == BIG


def test_against_an_emulator_that_others_wrote(tmp_path, monkeypatch):
    """gcp-storage-emulator from PyPI; it ignores preconditions, so only plain traffic is tried."""
    pytest.importorskip("gcp_storage_emulator")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "gcp_storage_emulator",
        "start",
        "--host=127.0.0.1",
        f"--port={port}",
        "--in-memory",
    ]
    process = subprocess.Popen([*command, "--default-bucket=bucket"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        store = quick_store(timeout_s=10.0)
        for name, data in (("tpu_0/small", SMALL), ("tpu_0/big", BIG)):
            info = store.put_bytes(name, data)
            assert (info.size, info.crc32c) == (len(data), crc32c_of(data))
            assert store.get_bytes(name)[0] == data
        assert [info.name for info in store.list("tpu_0/")] == ["tpu_0/big", "tpu_0/small"]
        store.delete("tpu_0/small")
        assert store.stat("tpu_0/small") is None
    finally:
        process.kill()
        process.wait()


TESTBENCH = os.environ.get("STORAGE_TESTBENCH", "")
"""The folder of Google's storage-testbench, whose packages are in its .venv or here."""


@pytest.fixture(scope="module")
def testbench():
    """Its address, with one bucket."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    path = os.pathsep.join((os.path.join(TESTBENCH, ".venv", "bin"), os.environ["PATH"]))
    process = subprocess.Popen(
        ["python", "testbench_run.py", "localhost", str(port), "10"],
        cwd=TESTBENCH,
        env=os.environ | {"PATH": path},  # it starts gunicorn by its name
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        url = f"http://localhost:{port}"
        wait_for(url)
        requests.post(
            f"{url}/storage/v1/b?project=test", json={"name": "bucket"}, timeout=10
        ).raise_for_status()
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@pytest.mark.skipif(not TESTBENCH, reason="STORAGE_TESTBENCH names no folder with Google's storage-testbench")
class TestGcsStoreAgainstGooglesTestbench(StoreContract):
    @pytest.fixture
    def store(self, testbench, monkeypatch):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", testbench)
        store = quick_store(timeout_s=10.0)
        for info in store.list():
            store.delete(info.name)
        return store


def wait_for(url: str) -> None:
    def answers() -> bool:
        try:
            requests.get(url, timeout=1)
        except requests.RequestException:
            return False
        return True

    until(answers)


def downloaded(store: GcsStore, info, start: int, end: int, path) -> bytes:
    with open(path, "wb+") as file:
        file.write(b"before")
        store.download_range(info, start, end, file)
    return path.read_bytes()


@pytest.mark.parametrize(
    "fault", [None, Fault("status", "GET", status=503), Fault("cut", "GET"), Fault("reset", "GET")]
)
def test_a_range_is_those_bytes_behind_what_is_there(server, store, tmp_path, fault):
    info = store.put_bytes("a", BIG)
    server.faults += [fault] if fault else []
    sent = server.sent_bytes
    assert downloaded(store, info, 1000, 70_000, tmp_path / "a") == b"before" + BIG[1000:70_000]
    assert server.sent_bytes - sent <= 2 * 69_000


def test_a_range_is_of_the_generation_that_was_asked_for(server, store, tmp_path):
    info = store.put_bytes("a", BIG)
    store.put_bytes("a", BIG[::-1])
    with pytest.raises(ReplacedError, match="activations/a was replaced while it was read"):
        downloaded(store, info, 0, 10, tmp_path / "a")


def test_a_server_that_sends_more_than_the_range_is_not_believed(server, tmp_path, monkeypatch):
    store = quick_store(budget_s=0.05)
    info = store.put_bytes("a", BIG)
    monkeypatch.setattr(fake_gcs, "wanted_range", lambda headers, size: (0, size))
    with pytest.raises(StorageError, match="1000000 bytes came instead of 10"):
        downloaded(store, info, 0, 10, tmp_path / "a")
