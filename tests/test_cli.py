"""Flag, then environment variable, then default."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_jax.cli import FlagParser, ShownFormatter, positive_float, positive_int, say
from qwen_jax.errors import StorageError, UsageError, shown
from qwen_jax.settings import WORKER_ID_VARIABLES, bucket_url, resolve_worker_id, worker_folder
from qwen_jax.storage import open_store


def parser() -> FlagParser:
    made = FlagParser(prog="script", env_for_all=True)
    made.flag("batch_size", "rows", default=4, type=positive_int)
    made.flag("layers", "layers", nargs="+", type=int)
    made.flag("kind", "kind", default="a", choices=("a", "b"))
    made.switch("upload_to_gcs", "upload")
    made.flag("dataset_path", "file", env="")
    return made


def test_flag_beats_variable_beats_default(monkeypatch):
    assert parser().parse_args([]).batch_size == 4
    monkeypatch.setenv("BATCH_SIZE", "8")
    assert parser().parse_args([]).batch_size == 8
    assert parser().parse_args(["--batch_size", "2"]).batch_size == 2


def test_an_empty_variable_is_an_unset_one(monkeypatch):
    monkeypatch.setenv("BATCH_SIZE", "")
    monkeypatch.setenv("UPLOAD_TO_GCS", "")
    args = parser().parse_args([])
    assert (args.batch_size, args.upload_to_gcs) == (4, False)


def test_dashes_are_underscores_but_only_in_names():
    args = parser().parse_args(["--batch-size=3", "--dataset-path", "my-file-name", "--upload-to-gcs"])
    assert (args.batch_size, args.dataset_path, args.upload_to_gcs) == (3, "my-file-name", True)


@pytest.mark.parametrize(
    "word, value", [("true", True), ("1", True), ("Yes", True), ("false", False), ("0", False)]
)
def test_switches_in_the_environment(monkeypatch, word, value):
    monkeypatch.setenv("UPLOAD_TO_GCS", word)
    assert parser().parse_args([]).upload_to_gcs is value


def test_lists_in_the_environment(monkeypatch):
    monkeypatch.setenv("LAYERS", "0 5 11")
    assert parser().parse_args([]).layers == [0, 5, 11]


@pytest.mark.parametrize(
    "name, value", [("BATCH_SIZE", "0"), ("BATCH_SIZE", "x"), ("UPLOAD_TO_GCS", "maybe"), ("KIND", "c")]
)
def test_a_bad_variable_is_named_with_exit_2(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        parser().parse_args([])
    assert end.value.code == 2
    assert name in capsys.readouterr().err


def test_help_shows_default_and_variable(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "[default: 4, variable: BATCH_SIZE]" in shown
    assert "[default: off, variable: UPLOAD_TO_GCS]" in shown
    assert "[default: none]" in shown


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf"])
def test_sizes_are_above_zero_and_finite(text):
    with pytest.raises(Exception, match="above 0"):
        positive_float(text)


def test_worker_id_is_taken_in_order():
    environment = {name: str(i + 1) for i, name in enumerate(WORKER_ID_VARIABLES)}
    assert resolve_worker_id("9", dict(environment)) == 9
    for i, name in enumerate(WORKER_ID_VARIABLES):
        assert resolve_worker_id(None, dict(environment)) == i + 1
        del environment[name]


def test_worker_id_leaves_no_rank_for_libtpu():
    environment = {"TPU_WORKER_ID": "5", "WORKER_ID": "3"}
    assert resolve_worker_id(None, environment) == 3
    assert "TPU_WORKER_ID" not in environment


@pytest.mark.parametrize("text", ["08", "009"])
def test_worker_id_is_decimal(text):
    assert resolve_worker_id(text, {}) == int(text, 10)


@pytest.mark.parametrize("environment", [{}, {"TPU_WORKER_ID": ""}])
def test_no_worker_id_is_an_error_never_zero(environment):
    with pytest.raises(UsageError, match="--worker_id"):
        resolve_worker_id(None, environment)


@pytest.mark.parametrize("text", ["-1", "one", "1.0", " 1", "٣"])
def test_a_bad_worker_id_names_its_source(text):
    with pytest.raises(UsageError, match="TPU_WORKER_ID"):
        resolve_worker_id(None, {"TPU_WORKER_ID": text})


def test_an_endless_worker_id_is_refused():
    with pytest.raises(UsageError, match="9 digits, got 5000"):
        resolve_worker_id("9" * 5000, {})


@pytest.mark.parametrize("prefix", ["../other", "a/../../b", "a\nb", "x" * 5000])
@pytest.mark.parametrize("bucket", ["bucket", "file:///folder"])
def test_a_prefix_that_cannot_be_is_refused(bucket, prefix):
    with pytest.raises(UsageError, match="a prefix may"):
        bucket_url(bucket, prefix, 0)


def test_a_prefix_means_itself_in_a_folder_too(tmp_path):
    url = bucket_url(tmp_path.as_uri(), "exp#1?%41", 0)
    open_store(url).put_bytes("a", b"1")
    assert (tmp_path / "exp#1?%41" / "tpu_0" / "a").exists()


def test_workers_never_share_a_folder(tmp_path):
    assert worker_folder(tmp_path, 5) == tmp_path / "worker_5"
    assert worker_folder(tmp_path / "worker_5", 5) == tmp_path / "worker_5"
    assert worker_folder(tmp_path / "worker_5", 6) == tmp_path / "worker_5" / "worker_6"


@pytest.mark.parametrize(
    "bucket, url",
    [
        ("bucket", "gs://bucket/activations/tpu_5"),
        ("gs://bucket/", "gs://bucket/activations/tpu_5"),
        ("file:///folder", "file:///folder/activations/tpu_5"),
    ],
)
def test_objects_go_to_the_workers_own_folder(bucket, url):
    assert bucket_url(bucket, "activations", 5) == url


def test_a_missing_package_is_named_with_what_to_do(tmp_path):
    """On a bare Python the data scripts need only tqdm; without it they say how to get it."""
    program = (
        "import sys; sys.modules['tqdm'] = None; sys.argv = ['create_dataset_streams.py', *sys.argv[1:]]\n"
    )
    program += "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    source = tmp_path / "source.jsonl"
    source.write_text('{"text": "hello"}\n')
    flags = ["--dataset_name", str(source), "--output_dir", str(tmp_path / "out")]
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program, *flags], cwd=root, capture_output=True, text=True)
    assert done.returncode == 78
    assert "tqdm is missing" in done.stderr and ".venv/bin/python" in done.stderr
    assert "Traceback" not in done.stderr


HOSTILE = "a\x1b[31mred\x9b2J\rb\tc‮d\ud800\x00 upload_id=SECRET"


def test_what_is_shown_moves_no_cursor_and_is_one_line(capsys):
    say(f"{HOSTILE}\nfaked line")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out[:-1].isprintable() and "SECRET" not in out
    assert r"a\x1b[31mred" in out


def test_errors_and_warnings_are_shown_so_too():
    record = logging.LogRecord("x", logging.WARNING, "", 0, "skipped: %s", (HOSTILE,), None)
    for text in (str(StorageError(HOSTILE)), ShownFormatter("%(message)s").format(record), shown(HOSTILE)):
        assert text.isprintable() and "SECRET" not in text


ENDING = """
import atexit, os, signal, threading, time
from qwen_jax.cli import run_script

class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

def main(argv):
    for thread in {threads}:
        threading.Thread(target=thread).start()
    globals()["late"] = Late()
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
    return 3

run_script(main)
"""
STUCK = """
def stuck():
    while signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # until the end has begun
        time.sleep(0.01)
    while True:  # again, since Python may miss one in the moment in which it begins to wait for the threads
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
"""


@pytest.mark.parametrize("threads", ["[]", "[stuck]"], ids=["Python itself ends", "a thread still runs"])
def test_ctrl_c_at_the_end_changes_nothing(threads):
    """What was done is done: the code says how, and no signal. A thread that does not end is cut off."""
    script = STUCK + ENDING.format(threads=threads)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, "")
