"""Rows become the same lines on any number of cores, in bounded memory, and failures reach the caller."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_jax.data import convert
from qwen_jax.data.arc import BadRecord
from qwen_jax.data.convert import CHUNK_ROWS, stream_lines
from qwen_jax.data.sources import iter_source_rows
from qwen_jax.data.spread import Spread
from qwen_jax.errors import StorageError
from tests.waiting import process_state, until


def source_line(index: int) -> bytes:
    if index % 50 == 7:
        return b"{torn\n"
    if index % 50 == 9:
        return json.dumps({"examples": [[[[1]], [[10]]], [[[1]], [[1]]]]}).encode() + b"\n"
    pairs = [[[[index % 10] * 3], [[1, 2, 3]]], [[[4]], [[5]]]]
    return json.dumps({"examples": pairs, "source": f"é {index}"}).encode() + b"\n"


def converted(rows, cores: int, monkeypatch) -> tuple[list[bytes], list]:
    monkeypatch.setattr(convert, "this_machines_cores", lambda: list(range(cores)))
    rejected = []
    return list(stream_lines(rows, "examples", rejected.append)), rejected


@pytest.mark.parametrize("count", [0, 1, CHUNK_ROWS, CHUNK_ROWS + 1, 6 * CHUNK_ROWS + 5])
def test_lines_and_rejected_rows_do_not_depend_on_the_cores(count, monkeypatch):
    rows = [(index, source_line(index)) for index in range(count)]
    rows += [(count, {"text": "given as an object"}), (count + 1, BadRecord("unreadable"))]
    one, many = converted(rows, 1, monkeypatch), converted(rows, 3, monkeypatch)
    assert one == many
    lines, rejected = many
    assert [row.row for row in rejected] == [
        *(i for i in range(count) if i % 50 in (7, 9)),
        count + 1,
    ]
    assert len(lines) == count + 2 - len(rejected)


def test_few_chunks_are_under_way(monkeypatch):
    taken = 0

    def rows():
        nonlocal taken
        for taken in range(1, 100 * CHUNK_ROWS):
            yield taken, source_line(taken)

    monkeypatch.setattr(convert, "this_machines_cores", lambda: [0, 1])
    lines = stream_lines(rows(), "examples", lambda _: None)
    for _ in range(2 * CHUNK_ROWS):
        next(lines)
    assert taken <= 8 * CHUNK_ROWS
    lines.close()


def converting_processes() -> list[int]:
    """Those that the forkserver has started."""
    children = [
        pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()
    ]
    servers = [pid for pid in children if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    found = [Path(f"/proc/{pid}/task/{pid}/children").read_text().split() for pid in servers]
    return [int(pid) for pids in found for pid in pids]


@pytest.mark.parametrize("row_bytes", [10, 100_000])
def test_a_killed_process_is_reported(row_bytes, monkeypatch):
    """With long rows it is killed in the middle of sending: a pipe does not hold what it has made of them."""

    def rows():
        for index in range(100 * CHUNK_ROWS):
            if index == 3 * CHUNK_ROWS:
                until(lambda: all(process_state(pid) == "S" for pid in converting_processes()))
                for process in converting_processes():
                    os.kill(process, signal.SIGKILL)
            line = json.dumps({"examples": [[[[1]], [[2]]]] * 2, "source": "x" * row_bytes})
            yield index, line.encode() + b"\n"

    monkeypatch.setattr(convert, "this_machines_cores", lambda: [0, 1])
    with pytest.raises(StorageError, match="process that converts rows died \\(exit code -9"):
        list(stream_lines(rows(), "examples", lambda _: None))


class Broken(Spread):
    """As a bug of ours would: fails for what comes after the first chunk."""

    def lines(self, record, index):
        return {}[index] if index >= CHUNK_ROWS else super().lines(record, index)


def test_an_error_of_ours_in_a_process_is_not_taken_for_the_machines(monkeypatch):
    monkeypatch.setattr(convert, "this_machines_cores", lambda: [0, 1])
    rows = ((index, source_line(index)) for index in range(3 * CHUNK_ROWS))
    with pytest.raises(RuntimeError, match="its error stands above"):
        list(stream_lines(rows, "examples", lambda _: None, Broken()))


def test_a_small_dataset_starts_no_process(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"".join(map(source_line, range(20))))
    program = (
        "import sys\nfrom create_dataset_streams import main\n"
        f"main(['--dataset_name', {str(tmp_path / 'rows.jsonl')!r}, '--num_streams', '2', "
        f"'--output_dir', {str(tmp_path / 'out')!r}])\n"
        "sys.exit('multiprocessing.forkserver' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0


def test_lines_of_a_file_come_unparsed(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"[1]\n{torn")
    assert list(iter_source_rows(str(tmp_path / "rows.jsonl"))) == [(0, b"[1]\n"), (1, b"{torn")]
