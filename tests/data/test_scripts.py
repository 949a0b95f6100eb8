"""The data scripts as a shell sees them: exit codes, what they print, and what a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import create_dataset_streams
from tests.data.test_streams import contents, jsonl, rows, task_ids

ROOT = Path(__file__).parents[2]


def run(*command: object, expect: int = 0, **environment: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == expect, done.stderr
    return done


def test_the_folder_may_come_from_the_environment(tmp_path):
    source = jsonl(tmp_path / "s.jsonl", [*rows(6), {"examples": "no"}])
    command = ["create_dataset_streams.py", "--dataset_name", source, "--num-streams=2"]
    done = run(*command, DATASET_DIR=str(tmp_path / "out"))
    assert len(contents(tmp_path / "out")) == 3
    for words in ("6 samples", "2 streams", "1 rows rejected", "rows/s"):
        assert words in done.stdout
    assert "row 6 rejected" in done.stderr
    assert "row/s" not in done.stderr, "a progress bar where there is no terminal"


def test_without_a_terminal_progress_is_plain_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(create_dataset_streams, "LINE_EVERY_S", 0.0)
    source = jsonl(tmp_path / "s.jsonl", rows(2))
    create_dataset_streams.main(["--dataset_name", str(source), "--output_dir", str(tmp_path / "out")])
    assert capsys.readouterr().err == "1/? rows, 00:00\n2/? rows, 00:00\n"


def test_exit_codes(tmp_path):
    unusable = jsonl(tmp_path / "s.jsonl", [{"x": 1}])
    script, out = "create_dataset_streams.py", tmp_path / "out"
    done = run(script, "--dataset_name", unusable, "--output_dir", out, expect=65)
    assert "row 0" in done.stderr and "its keys: x" in done.stderr
    assert "Traceback" not in done.stderr
    run(script, "--dataset_name", tmp_path / "gone.jsonl", "--output_dir", out, expect=78)
    run(script, "--num_streams", "0", expect=2)
    run("convert_hf_to_arc_format.py", "--dataset_name", unusable, expect=2)


def test_convert_as_a_script(tmp_path):
    source = jsonl(tmp_path / "s.jsonl", rows(9))
    flags = ["--dataset_name", source, "--output_filename", tmp_path / "o.jsonl"]
    done = run("convert_hf_to_arc_format.py", *flags, "--start_index", "2", "--end_index", "5")
    assert done.stdout.startswith("3 tasks written")
    assert task_ids(tmp_path / "o.jsonl") == ["s2", "s3", "s4"]


def test_a_kill_leaves_the_earlier_streams_whole(tmp_path):
    """The second run dies after its rows are written and before any file is published."""
    source = jsonl(tmp_path / "s.jsonl", rows(30))
    flags = ["--dataset_name", str(source), "--output_dir", str(tmp_path / "out"), "--num_streams", "3"]
    run("create_dataset_streams.py", *flags)
    before = contents(tmp_path / "out")
    jsonl(source, rows(60))
    dying = (
        "import os, signal, create_dataset_streams as script\n"
        "from qwen_jax.data.streams import StreamFile\n"
        "StreamFile.publish = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"script.main({flags!r})\n"
    )
    run("-c", dying, expect=-signal.SIGKILL)
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    run("create_dataset_streams.py", *flags)
    assert json.loads((tmp_path / "out" / "streams.json").read_text())["samples"] == 60
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_system_that_allows_too_few_files_is_said_so(tmp_path):
    source = jsonl(tmp_path / "s.jsonl", rows(3))
    flags = ["--dataset_name", str(source), "--output_dir", str(tmp_path / "out"), "--num_streams", "200"]
    limited = (
        "import resource, sys, create_dataset_streams as script\n"
        "from qwen_jax.cli import run_script\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        f"run_script(lambda argv: script.main({flags!r}))\n"
    )
    done = run("-c", limited, expect=2)
    assert "ulimit -n" in done.stderr
