"""Streams hold every usable row once, in a known place, with the same bytes each time."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

import convert_hf_to_arc_format
import create_dataset_streams
from convert_hf_to_arc_format import convert_hf_dataset_to_arc_format
from examples.demo import make_stream
from qwen_jax.data import streams
from qwen_jax.data.arc import BadRecord, Task
from qwen_jax.data.sources import iter_source_rows
from qwen_jax.data.streams import read_stream, stream_name, stream_summary, write_streams
from qwen_jax.errors import BadDataError, ConfigError, StorageError, UsageError

ROOT = Path(__file__).parents[2]


def rows(count: int) -> list[dict]:
    return [
        {"source": f"s{n}", "examples": [[[[n % 10]], [[1, 2]]], [[[3]], [[n // 10 % 10]]]]}
        for n in range(count)
    ]


def jsonl(path: Path, objects) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in objects))
    return path


def create(source, out, *flags: str) -> None:
    create_dataset_streams.main(["--dataset_name", str(source), "--output_dir", str(out), *flags])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def task_ids(path: Path) -> list[str]:
    return [json.loads(line)["task_id"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("num_streams", [1, 3, 7])
def test_rows_are_dealt_round_robin(tmp_path, num_streams):
    create(jsonl(tmp_path / "source.jsonl", rows(20)), tmp_path / "out", "--num_streams", str(num_streams))
    for i in range(num_streams):
        expected = [f"s{n}" for n in range(i, 20, num_streams)]
        assert task_ids(tmp_path / "out" / stream_name(i)) == expected


def test_manifest_says_what_is_there(tmp_path):
    bad = [{"examples": "no"}, {"examples": []}]
    create(jsonl(tmp_path / "source.jsonl", [*rows(5), *bad]), tmp_path / "out", "--num_streams", "2")
    manifest = json.loads((tmp_path / "out" / "streams.json").read_text())
    assert (manifest["samples"], manifest["rejected"]) == (5, 2)
    assert [row["row"] for row in manifest["rejected_rows"]] == [5, 6]
    assert "examples" in manifest["rejected_rows"][1]["reason"]
    for entry in manifest["streams"]:
        data = (tmp_path / "out" / entry["file"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["samples"] == data.count(b"\n")


def test_the_same_rows_give_the_same_bytes(tmp_path):
    source = jsonl(tmp_path / "source.jsonl", rows(20))
    create(source, tmp_path / "a", "--num_streams", "3")
    create(source, tmp_path / "b", "--num_streams", "3")
    create(source, tmp_path / "b", "--num_streams", "3")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_every_local_form_of_a_dataset_gives_the_same_streams(tmp_path):
    source = rows(12)
    jsonl(tmp_path / "a.jsonl", source)
    (tmp_path / "b.json").write_text(json.dumps(source))
    dataset = Dataset.from_list(source)
    dataset.to_parquet(tmp_path / "c.parquet")
    dataset.save_to_disk(tmp_path / "d")
    (tmp_path / "e").mkdir()
    jsonl(tmp_path / "e" / "part-0.jsonl", source[:5])
    jsonl(tmp_path / "e" / "part-1.jsonl", source[5:])
    made = []
    for name in ("a.jsonl", "b.json", "c.parquet", "d", "e"):
        create(tmp_path / name, tmp_path / "out" / name, "--num_streams", "2")
        made.append({k: v for k, v in contents(tmp_path / "out" / name).items() if k != "streams.json"})
    assert all(each == made[0] for each in made)
    assert len(made[0]) == 2


def test_arc_json_files_are_tasks_by_id(tmp_path):
    task = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]]}]}
    (tmp_path / "tasks.json").write_text(json.dumps({"a": task, "b": task}))
    (tmp_path / "0a1b.json").write_text(json.dumps(task))
    assert [row["task_id"] for _, row in iter_source_rows(str(tmp_path / "tasks.json"))] == ["a", "b"]
    assert [row["task_id"] for _, row in iter_source_rows(str(tmp_path / "0a1b.json"))] == ["0a1b"]


def test_a_saved_dataset_of_several_splits_is_read_by_split(tmp_path):
    splits = {"train": Dataset.from_list(rows(3)), "test": Dataset.from_list(rows(1))}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert len(list(iter_source_rows(str(tmp_path / "saved")))) == 3
    assert len(list(iter_source_rows(str(tmp_path / "saved"), "test"))) == 1
    with pytest.raises(ConfigError, match="--split dev"):
        list(iter_source_rows(str(tmp_path / "saved"), "dev"))


def test_a_torn_parquet_file_is_named(tmp_path):
    Dataset.from_list(rows(3)).to_parquet(tmp_path / "s.parquet")
    (tmp_path / "s.parquet").write_bytes((tmp_path / "s.parquet").read_bytes()[:-20])
    with pytest.raises(BadDataError, match=r"s\.parquet"):
        list(iter_source_rows(str(tmp_path / "s.parquet")))


def test_max_samples_limits_the_rows_read(tmp_path):
    create(
        jsonl(tmp_path / "s.jsonl", rows(20)), tmp_path / "out", "--num_streams", "1", "--max_samples", "6"
    )
    assert len(task_ids(tmp_path / "out" / stream_name(0))) == 6


def test_streams_of_an_earlier_larger_split_are_not_mixed_in(tmp_path):
    source = jsonl(tmp_path / "source.jsonl", rows(20))
    create(source, tmp_path / "out", "--num_streams", "4")
    before = contents(tmp_path / "out")
    with pytest.raises(UsageError, match=r"stream_002\.jsonl"):
        create(source, tmp_path / "out", "--num_streams", "2")
    assert contents(tmp_path / "out") == before


def test_nothing_appears_when_the_source_fails_midway(tmp_path):
    def failing():
        yield from enumerate(rows(5))
        raise StorageError("the hub went away")

    with pytest.raises(StorageError):
        write_streams(failing(), 2, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bytes_are_durable_before_any_file_gets_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    write_streams(enumerate(rows(6)), 3, tmp_path)
    assert calls == ["fsync"] * 3 + ["replace"] * 3 + ["fsync", "replace"], "streams first, streams.json last"


def test_a_source_that_fails_is_not_blamed_on_the_output(tmp_path):
    def failing():
        yield from enumerate(rows(5))
        raise PermissionError(13, "Permission denied", "source.jsonl")

    with pytest.raises(StorageError, match=r"dataset cannot be read.*source\.jsonl"):
        write_streams(failing(), 2, tmp_path)
    assert not list(tmp_path.iterdir())


def test_mixed_rows_are_the_same_from_parquet(tmp_path):
    """A table has one set of columns, so Parquet fills the gaps with nulls."""
    mixed = [*rows(3), {"prompt": "hi"}, {"messages": [{"role": "user", "content": "hi"}]}]
    create(jsonl(tmp_path / "a.jsonl", mixed), tmp_path / "a", "--num_streams", "2")
    columns = {key: [row.get(key) for row in mixed] for key in ("source", "examples", "prompt", "messages")}
    Dataset.from_dict(columns).to_parquet(tmp_path / "b.parquet")
    create(tmp_path / "b.parquet", tmp_path / "b", "--num_streams", "2")
    for name in (stream_name(0), stream_name(1)):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "b" / "streams.json").read_text())["samples"] == len(mixed)


def test_no_usable_row_is_exit_65(tmp_path):
    with pytest.raises(BadDataError, match="--column_name"):
        create(jsonl(tmp_path / "s.jsonl", [{"x": 1}]), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["./gone", "/gone", "gone.jsonl"])
def test_missing_sources_are_named(name):
    with pytest.raises(ConfigError, match="no such file"):
        list(iter_source_rows(name))


def test_an_unreachable_hub_says_so():
    with pytest.raises((StorageError, ConfigError), match="some/dataset"):
        list(iter_source_rows("some/dataset"))


def test_two_hundred_streams_do_not_exhaust_the_open_files(tmp_path):
    source = jsonl(tmp_path / "source.jsonl", rows(300))
    script = "import resource, create_dataset_streams as c; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096)); "
    flags = ["--dataset_name", str(source), "--output_dir", str(tmp_path / "out"), "--num_streams", "200"]
    script += f"c.main({flags!r})"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)
    assert len(list((tmp_path / "out").glob("stream_*"))) == 200


def test_convert_is_importable_as_the_guide_shows(tmp_path):
    source = jsonl(tmp_path / "source.jsonl", rows(20))
    written = convert_hf_dataset_to_arc_format(
        dataset_name=str(source),
        column_name="examples",
        output_filename=str(tmp_path / "custom" / "stream.jsonl"),
        start_index=5,
        end_index=12,
    )
    assert written == 7
    assert task_ids(tmp_path / "custom" / "stream.jsonl") == [f"s{n}" for n in range(5, 12)]


def test_convert_reads_no_further_than_its_range(tmp_path, monkeypatch):
    def source(*args):
        yield from enumerate(rows(4))
        raise AssertionError("read past the range")

    monkeypatch.setattr(convert_hf_to_arc_format, "iter_source_rows", source)
    assert convert_hf_dataset_to_arc_format("x", "examples", tmp_path / "out.jsonl", 1, 4) == 3


def test_convert_logs_rejected_rows_with_their_index(tmp_path, caplog):
    source = jsonl(tmp_path / "source.jsonl", [*rows(2), {"examples": []}, *rows(1)])
    assert convert_hf_dataset_to_arc_format(str(source), "examples", tmp_path / "o.jsonl") == 3
    assert "row 2 skipped" in caplog.text


@settings(deadline=None, max_examples=40)
@given(start=st.integers(0, 25), length=st.none() | st.integers(1, 25))
def test_convert_writes_the_slice_or_nothing(tmp_path_factory, start, length):
    folder = tmp_path_factory.mktemp("slice")
    source = jsonl(folder / "source.jsonl", rows(20))
    end = None if length is None else start + length
    expected = [f"s{n}" for n in range(20)][start:end]
    if expected:
        assert convert_hf_dataset_to_arc_format(str(source), "examples", folder / "o", start, end) == len(
            expected
        )
        assert task_ids(folder / "o") == expected
    else:
        with pytest.raises(BadDataError, match="no usable row"):
            convert_hf_dataset_to_arc_format(str(source), "examples", folder / "o", start, end)
        assert not (folder / "o").exists()


def test_convert_refuses_an_empty_range(tmp_path):
    with pytest.raises(UsageError, match="start_index"):
        convert_hf_dataset_to_arc_format("x", "examples", tmp_path / "o.jsonl", 5, 5)


lines = st.lists(
    st.sampled_from(
        [
            b'{"text": "good"}',
            b'{"text": "good"}\r',
            b"",
            b"nope",
            b"\xff\xfe",
            b"\x00",
            b'\xef\xbb\xbf{"text": "good"}',
            b'{"text": "' + b"x" * 300 + b'"}',
        ]
    ),
    min_size=1,
    max_size=30,
)


@given(lines=lines, final_newline=st.booleans(), start=st.integers(0, 10))
def test_sample_idx_is_the_line_number_whatever_the_lines(tmp_path_factory, lines, final_newline, start):
    path = tmp_path_factory.mktemp("lines") / "s.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if final_newline else b""))
    expected = lines if final_newline or lines[-1] else lines[:-1]
    limit = streams.MAX_LINE_BYTES
    streams.MAX_LINE_BYTES = 200
    try:
        read = list(read_stream(path, start))
    finally:
        streams.MAX_LINE_BYTES = limit
    assert [index for index, _ in read] == list(range(start, len(expected)))
    for index, record in read:
        good = b"good" in expected[index]
        assert isinstance(record, BadRecord) is not good
    assert stream_summary(path).lines == len(expected)


def test_a_huge_line_is_read_past_in_bounded_memory(tmp_path):
    path = tmp_path / "s.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "one"}\n')
        for _ in range(50):
            file.write(b"x" * (1 << 20))
        file.write(b'\n{"text": "three"}')
    first, second, third = (record for _, record in read_stream(path))
    assert (first.text, third.text) == ("one", "three")
    assert "longer than" in str(second)


LONG = [json.dumps({"text": f"{number} " + "x" * 300_000}) + "\n" for number in range(12)]
CHANGES = {
    "cut at a line": lambda lines: lines[:-2],
    "cut at a piece": lambda lines: ["".join(lines)[: 1 << 20]],
    "emptied": lambda lines: [],
    "more lines": lambda lines: [*lines, lines[0]],
    "another letter": lambda lines: [*lines[:6], lines[6].replace("x", "y", 1), *lines[7:]],
    "lines swapped": lambda lines: [*lines[:8], lines[9], lines[8], *lines[10:]],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_stream_that_changes_is_seen_before_a_line_of_the_change_is_used(tmp_path, change):
    path = tmp_path / "s.jsonl"
    path.write_text("".join(LONG))
    summary = stream_summary(path)
    whole = list(read_stream(path, 0, summary))
    assert [record.text for _, record in whole] == [json.loads(line)["text"] for line in LONG]
    path.write_text("".join(change(LONG)))
    read = []
    with pytest.raises(ConfigError, match="was changed while it was in use"):
        for entry in read_stream(path, 0, summary):
            read.append(entry)
    assert read == whole[: len(read)]


def test_a_stream_that_is_replaced_by_its_like_is_the_same(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text("".join(LONG))
    summary = stream_summary(path)
    path.unlink()
    path.write_text("".join(LONG))
    assert len(list(read_stream(path, 3, summary))) == len(LONG) - 3


def test_a_missing_stream_says_how_to_make_it(tmp_path):
    with pytest.raises(ConfigError, match="create_dataset_streams"):
        list(read_stream(tmp_path / "gone.jsonl"))


def test_the_demo_stream_is_what_its_script_makes(tmp_path):
    make_stream.main(tmp_path)
    assert contents(tmp_path) == contents(ROOT / "examples" / "demo" / "streams")
    records = [record for _, record in read_stream(tmp_path / stream_name(0))]
    assert len(records) == 96 and all(isinstance(record, Task) for record in records)


@pytest.mark.slow
def test_two_hundred_thousand_rows_in_bounded_memory(tmp_path):
    """docs/testing.md has the last measured figure."""
    row = json.dumps({"examples": [[[[1] * 12] * 12, [[2] * 12] * 12]] * 4}) + "\n"
    with (tmp_path / "s.jsonl").open("w") as file:
        for _ in range(200_000):
            file.write(row)
    program = (
        "import sys, create_dataset_streams as script\n"
        "from tests.peak_memory import peak_bytes\n"
        "script.main(sys.argv[1:])\n"
        "print(peak_bytes())\n"
    )
    command = [sys.executable, "-c", program, "--dataset_name", str(tmp_path / "s.jsonl")]
    command += ["--output_dir", str(tmp_path / "out"), "--num_streams", "32", "--max_samples", "200000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    print(done.stdout)
    assert 0 < int(done.stdout.split()[-1]) < 500 << 20
