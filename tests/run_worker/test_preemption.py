"""The pre-emption notice is a line in the log: absent, slow or lying, it changes nothing else."""

import logging
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qwen_jax.run import preemption
from tests.run_worker.conftest import tree


@contextmanager
def metadata_server(body: bytes, *, answers: bool = True):
    """A metadata server that answers every request with `body`, or lets it wait until the end."""
    released = threading.Event()
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            if not answers:
                released.wait()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", asked
    finally:
        released.set()
        server.shutdown()
        server.server_close()


def notice(host: str, monkeypatch, caplog) -> str:
    monkeypatch.setenv("GCE_METADATA_HOST", host)
    with caplog.at_level(logging.WARNING):
        preemption.watch_for_notice().join(timeout=20)
    return caplog.text


def test_the_notice_is_logged(monkeypatch, caplog):
    with metadata_server(b"TRUE") as (host, asked):
        assert "announces a pre-emption" in notice(host, monkeypatch, caplog)
    assert asked == [("/computeMetadata/v1/instance/preempted?wait_for_change=true", "Google")]


@pytest.mark.parametrize("body", [b"FALSE", b"", b"<html>"])
def test_any_other_answer_is_none(monkeypatch, caplog, body):
    with metadata_server(body) as (host, _):
        assert notice(host, monkeypatch, caplog) == ""


def test_no_server_is_no_matter(monkeypatch, caplog):
    with metadata_server(b"") as (host, _):
        pass
    assert notice(host, monkeypatch, caplog) == ""


def test_off_compute_engine_nothing_is_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(preemption, "_PRODUCT_NAME", tmp_path / "absent")
    assert preemption.watch_for_notice() is None


@pytest.mark.parametrize("answers", [True, False], ids=["lying", "slow"])
def test_a_run_ends_the_same(workspace, finished, monkeypatch, answers):
    with metadata_server(b"TRUE", answers=answers) as (host, asked):
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        done = workspace.run()
    assert asked
    assert ("announces a pre-emption" in done.stderr) is answers
    assert tree(workspace.output) == tree(finished.output)
