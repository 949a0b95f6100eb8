"""No JSON or statistics file ends a command in a traceback, or takes memory that its size does not."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.ledger import checks
from qwen_jax.ledger.checks import DamagedError, parse_json, read_bounded
from tests.fleet.fleets import record
from tests.reading import hostile_files
from tests.reading.conftest import STREAMS
from tests.run_worker.starts import ROOT

MOST_BYTES = 500 << 20


@pytest.fixture(scope="module")
def lines(clean, tmp_path_factory) -> list[dict[str, Any]]:
    """What came of each file and command, in a process of their own."""
    folder = Path(shutil.copytree(clean, tmp_path_factory.mktemp("hostile") / "worker_0"))
    (folder / hostile_files.PROGRESS).write_bytes(record(0).to_bytes())
    shutil.copy(STREAMS, folder)
    done = subprocess.run(
        [sys.executable, "-m", "tests.reading.hostile_files", str(folder)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.wide
def test_there_are_enough_of_them(lines):
    assert len({line["file"] for line in lines}) > 55
    assert len({line["command"] for line in lines}) == 8


@pytest.mark.wide
def test_none_ends_in_a_traceback(lines):
    assert [line for line in lines if not line["outcome"].startswith("exit ")] == []


@pytest.mark.wide
def test_none_takes_much_memory(lines):
    assert [line for line in lines if line["bytes"] > MOST_BYTES] == []


@pytest.mark.wide
def test_readers_refuse_a_damaged_description_with_65(lines):
    """The same file, the same words, whichever command reads it."""
    refused = {
        line["file"]: line["outcome"].partition("is damaged: ")[2]
        for line in lines
        if line["command"] == "inspect" and line["outcome"].startswith("exit 65: ")
    }
    assert len(refused) > 45
    for line in lines:
        if line["file"] in refused and line["command"] in ("stats", "plot", "export", "certify"):
            assert refused[line["file"]] in line["outcome"] and line["outcome"].startswith("exit 65: "), line


def test_a_small_file_takes_little_memory_and_a_large_one_is_not_read_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    tracemalloc.start()
    assert read_bounded(path) == b"0123456789"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    monkeypatch.setattr(checks, "MOST_BYTES", 4)
    assert read_bounded(path) == b"01234"
    with pytest.raises(DamagedError, match="more than 4 bytes"):
        parse_json(read_bounded(path))


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def test_json_is_bounded_in_depth_size_and_numbers(monkeypatch):
    assert parse_json(nested(12)) and parse_json(b"[%d, 1e300]" % (2**64 - 1))
    dense = b"[" + b"[]," * 999_999 + b"[]]"
    with pytest.raises(DamagedError, match="more values"):
        parse_json(dense)
    for data, reason in (
        (nested(13), "nested deeper"),
        (nested(100_000), "nested"),
        (b"[%d]" % 2**64, "more than 64 bits"),
        (b"[1e999]", "not finite"),
        (b"[NaN]", "NaN is not"),
        (b'["\\ud800"]', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        ('["\ud83d\ude00"]'.encode("utf-8", "surrogatepass"), "not JSON"),
    ):
        with pytest.raises(DamagedError, match=reason):
            parse_json(data)
    assert parse_json(b'["\\ud83d\\ude00"]') == ["\U0001f600"]
