"""Every state of a worker is told from every other, and no file can break the look."""

import itertools
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser

import pytest

from qwen_jax.__main__ import main
from qwen_jax.commands.workers import shards_url
from qwen_jax.errors import StorageError
from qwen_jax.fleet import monitor
from qwen_jax.fleet.monitor import WorkerState, bucket_files, details, exit_code, look, mark_slow
from qwen_jax.fleet.page import make_page, throughput
from qwen_jax.ledger.progress_record import HISTORY_POINTS, ProgressRecord
from qwen_jax.ledger.schema import FAILED, STARTING, TERMINATED
from qwen_jax.ledger.worker_files import WorkerFiles
from qwen_jax.storage.folder import FolderStore
from qwen_jax.storage.gcs import GcsStore
from tests.fake_gcs import FakeGcs, Fault
from tests.fleet.fleets import NOW, TOTAL, checkpoint, make_fleet, put, record


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    root = tmp_path_factory.mktemp("fleet")
    make_fleet(root)
    return root


def states(root, count=32) -> list[WorkerState]:
    files = partial(WorkerFiles.local, root / "checkpoints", root / "activations")
    return mark_slow([look(files(worker), NOW) for worker in range(count)])


def test_every_state_of_a_fleet(fleet):
    found: dict[str, list[int]] = {}
    for state in states(fleet):
        found.setdefault(state.state, []).append(state.worker)
    assert found.pop("in_progress") == [n for n in range(30) if n not in (3, 4, 7, 9, 11, 17, 21, 25)]
    assert found == {
        "completed": [3, 4, 9],
        "failed": [7],
        "slow": [11],
        "stalled": [17, 21],
        "unreadable": [25],
        "not_started": [30, 31],
    }
    by_id = {state.worker: state for state in states(fleet)}
    assert by_id[17].message == "no sign of life for 1.5 h"
    assert by_id[21].message == "no sample for 65 min"
    assert "403 <Forbidden>" in by_id[7].message
    assert by_id[11].message == "2.1 d left, the median worker has 2.3 h"
    assert by_id[11].tokens_per_second == pytest.approx(91)
    assert by_id[5].guide_line() == "Worker 5: 2200 samples, 12 shards, in_progress"
    assert by_id[5].samples == 2300 and by_id[5].share == 2300 / TOTAL
    assert by_id[5].tokens_per_second == pytest.approx(950)
    assert by_id[5].eta_s == pytest.approx((TOTAL - 2300) / (2300 / 7140 * 119 / 120), rel=0.05)
    assert by_id[5].since_shard_s == 300


def test_problems_stand_first_and_decide_the_exit_code(fleet):
    found = states(fleet)
    table = [line.split()[:2] for line in details(found) if line and line.split()[0].isdigit()]
    problems = [["7", "failed"], ["17", "stalled"], ["21", "stalled"], ["25", "unreadable"]]
    assert table[:5] == [*problems, ["11", "slow"]]
    assert exit_code(found) == 2
    assert exit_code([state for state in found if state.state not in monitor.PROBLEMS]) == 1
    assert exit_code([state for state in found if state.state == "completed"]) == 0


def test_without_records_the_guides_lines_are_all(tmp_path):
    put(tmp_path, 0, None, checkpoint(1251, 3))
    (state,) = states(tmp_path, 1)
    assert (state.guide_line(), list(details([state]))) == (
        "Worker 0: 1251 samples, 3 shards, in_progress",
        [],
    )


def test_a_restarted_worker_is_not_failed_for_long(tmp_path):
    put(tmp_path, 0, record(0, status=TERMINATED, message="SIGTERM"), checkpoint(9, 1))
    assert states(tmp_path, 1)[0].state == "in_progress"
    put(tmp_path, 0, record(0, status=TERMINATED, updated_at=NOW - 901), checkpoint(9, 1))
    assert states(tmp_path, 1)[0].message == "no sign of life for 15 min after SIGTERM"


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"total_samples_processed": 1e999}'])
def test_a_torn_checkpoint_is_a_problem(tmp_path, text):
    put(tmp_path, 0, None, checkpoint(5, 1))
    path = tmp_path / "checkpoints" / "checkpoint_worker_0.json"
    path.write_text(text)
    assert states(tmp_path, 1)[0].state == "unreadable"
    path.unlink()
    path.mkdir()  # as good as a file without the right to read it
    (state,) = states(tmp_path, 1)
    assert (state.state, state.message) == ("unreadable", str(path))


def test_a_worker_that_failed_before_it_knew_its_stream(tmp_path):
    put(
        tmp_path, 0, record(0, status=FAILED, samples_done=0, samples_total=0, message="no such folder"), None
    )
    (state,) = states(tmp_path, 1)
    assert (state.state, state.total, state.share) == ("failed", None, None)
    assert state.guide_line() == "Worker 0: Not started"
    assert "no such folder" in "\n".join(details([state])) and "no such folder" in make_page([state], NOW)


def norms_of(text: str, size: str = "5", layer: str = "1") -> str:
    """metadata.json whose second layer's mean norm is `text`."""
    layers = f'{{"0": {{"norm_mean": 1.0}}, "{layer}": {{"norm_mean": {text}}}}}'
    return f'{{"statistics": {{"residual": {layers}}}, "totals": {{"bytes": {size}}}}}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"statistics": {}, "totals": {"bytes": 1e999}}',
        "[]",
        "null",
        "[" * 100_000,
        '{"worker_id": 0}',
        '"x"',
        json.dumps({"history": [[1, 2]]}),
        *(norms_of(text) for text in ("NaN", "Infinity", "-1", '"x"', "1e300", "1" * 400)),
        *(norms_of("1", size) for size in ("1" * 400, "1" * 5000, "-1", "1.5", "NaN", "true")),
        *(norms_of("1", layer=layer) for layer in ("-1", "1" * 400, "1.5")),
    ],
)
def test_torn_records_and_metadata_are_as_if_absent(tmp_path, text):
    """In the look, the table and the page, with others that are whole."""
    put(tmp_path, 0, None, checkpoint(5, 1))
    put(tmp_path, 1, record(1), checkpoint(5, 1))
    (tmp_path / "checkpoints" / "progress_worker_0.json").write_text(text)
    (tmp_path / "activations" / "worker_0" / "metadata.json").write_text(text)
    found = states(tmp_path, 2)
    state = found[0]
    assert (state.state, state.samples, state.total, state.bytes) == ("in_progress", 5, None, None)
    assert "2 workers" in make_page(found, NOW) and list(details(found))


def test_a_record_of_another_worker_is_as_if_absent(tmp_path):
    put(tmp_path, 0, record(7, status=FAILED), checkpoint(5, 1))
    assert states(tmp_path, 1)[0].state == "in_progress"


def test_a_checkpoint_of_another_worker_is_unreadable(tmp_path):
    put(tmp_path, 0, None, checkpoint(5, 1) | {"worker_id": 7})
    assert states(tmp_path, 1)[0].state == "unreadable"


def test_no_share_is_above_all(tmp_path):
    """A stream that was cut after its checkpoint was written."""
    put(tmp_path, 0, record(0), checkpoint(99_990 * TOTAL, 1))
    assert states(tmp_path, 1)[0].share == 1.0


def test_messages_are_one_line_of_plain_text(tmp_path):
    put(tmp_path, 0, record(0, status=FAILED, message="a\nWorker 1: done\r\x1b[2J\x00" + "x" * 9999), None)
    lines = list(details(states(tmp_path, 1)))
    assert len(lines) == 4 and all(line.isprintable() for line in lines) and len(lines[-1]) < 600
    assert lines[-1].strip().startswith(r"a Worker 1: done \x1b[2J\x00xxx")


def test_a_worker_that_starts_says_so(tmp_path):
    put(tmp_path, 0, record(0, status=STARTING), checkpoint(9, 1))
    (state,) = states(tmp_path, 1)
    assert (state.state, state.tokens_per_second) == ("in_progress", None)
    assert state.message.startswith("starting")


def test_a_start_is_not_stalled_for_the_time_before_it(tmp_path):
    """It stands where the last start ended, an hour ago."""
    now = record(0, history=[[NOW - 60, 2000, 0.0], [NOW - 20, 2000, 10.0]], tokens=10)
    now.earlier = [[NOW - 7200, 1000, 0.0], [NOW - 3600, 2000, 5e6]]
    put(tmp_path, 0, now, checkpoint(2000, 12))
    (state,) = states(tmp_path, 1)
    assert state.state == "in_progress" and state.tokens_per_second == 10 / 40
    assert state.history == [*now.earlier, [NOW - 60, 2000, 5e6], [NOW - 20, 2000, 5e6 + 10]]


@pytest.mark.parametrize("left, slow", [([3, 3, 3, 9], [3]), ([3, 3, 9], [2]), ([3, 9], []), ([3, 3, 5], [])])
def test_who_is_slow(left, slow):
    running = [WorkerState(worker, "in_progress", eta_s=3600.0 * hours) for worker, hours in enumerate(left)]
    assert [state.worker for state in mark_slow(running) if state.state == "slow"] == slow


def test_minutes_do_not_make_a_worker_slow():
    running = [
        WorkerState(worker, "in_progress", eta_s=60.0 * left) for worker, left in enumerate((1, 1, 1, 9))
    ]
    assert mark_slow(running) == running


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": float("nan")},
        {"samples_done": -1},
        {"samples_done": True},
        {"samples_done": 6251},
        {"message": 5},
        {"status": "dancing"},
        {"exit_code": ""},
        {"last_shard_at": ""},
        {"updated_at": 1e300},
        {"tokens": 1.5},
        {"history": [[1, 2]]},
        {"history": [[1, 2, 1e300]]},
        {"earlier": [[1, 2, float("nan")]]},
    ],
)
def test_impossible_records_are_as_if_absent(change):
    with pytest.raises(ValueError):
        ProgressRecord.parse(record(0, **change).to_bytes())


def test_a_history_stays_bounded_and_keeps_its_ends():
    made = record(0, history=[])
    for n in range(5000):
        made.samples_done = n
        made.add_point(float(n))
    assert len(made.history) <= HISTORY_POINTS
    assert (made.history[0][0], made.history[-1][0]) == (0.0, 4999.0)
    times = [point[0] for point in made.history]
    assert times == sorted(set(times)) and max(b - a for a, b in itertools.pairwise(times)) < 200


def test_the_command_reads_a_bucket(fleet, tmp_path, capsys):
    store = FolderStore(tmp_path / "bucket" / "activations")
    for worker in (0, 3):
        for name, path in {
            f"checkpoint_worker_{worker}.json": f"checkpoints/checkpoint_worker_{worker}.json",
            "progress.json": f"checkpoints/progress_worker_{worker}.json",
            "metadata.json": f"activations/worker_{worker}/metadata.json",
        }.items():
            store.put_bytes(f"tpu_{worker}/{name}", (fleet / path).read_bytes())
    file = tmp_path / "fleet.html"
    flags = [
        "--bucket",
        store.url,
        "--num_workers",
        "4",
        "--json",
        "--html",
        str(file),
        "--stalled_after",
        "1e8",
    ]
    assert main(["workers", *flags]) == 1
    seen = json.loads(capsys.readouterr().out)
    assert [each["state"] for each in seen] == ["in_progress", "not_started", "not_started", "completed"]
    assert seen[0]["bytes"] == 9_400_000_000 and seen[3]["share"] == 1.0
    assert "4 workers" in file.read_text()


@pytest.mark.parametrize(
    "bucket, prefix, url",
    [
        ("gs://your-bucket", "activations", "gs://your-bucket/activations"),
        ("gs://your-bucket/", "a/b/", "gs://your-bucket/a/b"),
        ("your-bucket", "activations", "gs://your-bucket/activations"),
        ("your-bucket/activations", "other", "gs://your-bucket/activations"),
        ("gs://your-bucket/activations/", "other", "gs://your-bucket/activations"),
        ("file:///folder", "activations", "file:///folder"),
    ],
)
def test_where_a_bucket_is_looked_at(bucket, prefix, url):
    assert shards_url(bucket, prefix) == url


@pytest.mark.parametrize("prefix", [None, "mine"])
def test_a_bucket_without_a_path(monkeypatch, capsys, prefix):
    if prefix:
        monkeypatch.setenv("GCS_PREFIX", prefix)
    with FakeGcs() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        assert main(["workers", "1", "--bucket", "gs://bucket"]) == 1
        said = capsys.readouterr().err
        assert f"nothing of any worker was found in gs://bucket/{prefix or 'activations'};" in said
        GcsStore("bucket", f"{prefix or 'activations'}/tpu_0").put_bytes(
            "checkpoint_worker_0.json", json.dumps(checkpoint(5, 1, "completed")).encode()
        )
        assert main(["workers", "1", "--bucket", "bucket"]) == 0
        assert capsys.readouterr().err == ""


def test_a_bucket_that_does_not_answer_is_said_at_once_and_looked_at_again(tmp_path, monkeypatch, capsys):
    """64 workers: not each waits for itself; --watch goes on."""
    monkeypatch.setattr(monitor, "_BUDGET_S", 0.0)
    put(tmp_path, 0, None, checkpoint(5, 1))
    with FakeGcs() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        store = GcsStore("bucket", "activations/tpu_0", budget_s=0.0)
        store.put_bytes("checkpoint_worker_0.json", json.dumps(checkpoint(5, 1, "completed")).encode())
        fault = Fault("status", method="GET", times=10**6)
        server.faults.append(fault)
        before = len(server.requests)
        with pytest.raises(StorageError):
            main(["workers", "640", "--bucket", "bucket"])
        assert len(server.requests) - before < 64
        monkeypatch.setattr("time.sleep", lambda seconds: server.faults.clear())
        assert main(["workers", "1", "--bucket", "bucket", "--watch", "30"]) == 0
    seen = capsys.readouterr()
    assert (
        "not seen this time: could not read gs://bucket" in seen.err
        and "1 of 1 workers completed" in seen.out
    )


def test_a_look_is_less_patient_than_a_worker(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    store = bucket_files("gs://bucket")._store
    assert store._budget_s == monitor._BUDGET_S < 60
    assert store._timeout_s == monitor._ANSWER_S < 60


def test_watch_ends_when_all_are_complete(tmp_path, monkeypatch, capsys):
    put(tmp_path, 0, None, checkpoint(5, 1))
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        put(tmp_path, 0, None, checkpoint(9, 2, "completed"))

    monkeypatch.setattr("time.sleep", nap)
    assert main(["workers", "1", "--checkpoint_dir", str(tmp_path / "checkpoints"), "--watch", "30"]) == 0
    assert naps == [30.0]
    assert capsys.readouterr().out.count("Worker 0:") == 2


class Checker(HTMLParser):
    """Collects the page's text and whatever it would load from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.foreign, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        if tag != "meta":
            self.open.append(tag)
        self.foreign += [value for key, value in attributes if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_loads_nothing(fleet):
    text = make_page(states(fleet), NOW, 30)
    checker = Checker()
    checker.feed(text.removeprefix("<!doctype html>"))
    assert checker.open == [] and checker.foreign == [] and "<script" not in text
    places = [
        checker.text.index(word) for word in ("Problems", "Throughput", "Mean norm by layer", "Workers")
    ]
    assert places == sorted(places)
    assert "403 <Forbidden> & no more" in checker.text and "Worker 21 stalled" in checker.text
    assert "Worker 11 slow: 2.1 d left" in checker.text
    assert text.count('class="worker ') == 32


def test_each_bar_is_as_wide_as_its_worker_is_far_and_says_so(fleet):
    found = states(fleet)
    text = make_page(found, NOW)
    bars = re.findall(
        r'(?s)class="worker (\w+)"><span>(\d+)<.*?width:([\d.]+)%.*?class="share">([^<]+)<', text
    )
    assert len(bars) == 32
    by_id = {state.worker: state for state in found}
    for state, worker, width, share in bars:
        seen = by_id[int(worker)]
        assert state == seen.state and width == f"{100 * (seen.share or 0):.1f}"
        assert share == ("?" if seen.share is None else f"{width} %")
    assert {worker: width for _, worker, width, _ in bars}["4"] == "100.0"


def tiles(found: list[WorkerState]) -> dict[str, str]:
    cells = re.findall(r'<div class="tile"><b>([^<]*)</b>([^<]*)</div>', make_page(found, NOW))
    return {name: value for value, name in cells}


def test_tiles_speak_of_all_workers():
    """Half of two are done, two have not begun: a quarter. One has failed: it has no end."""
    half = WorkerState(0, "in_progress", samples=50, total=100, eta_s=7200.0)
    found = [
        half,
        replace(half, worker=1, state="failed", eta_s=None),
        *(WorkerState(n, "not_started") for n in (2, 3)),
    ]
    seen = tiles(found)
    assert seen["of the samples; 2 streams of unknown length"] == "25.0 %"
    assert seen["until the last that runs is done; 3 others give no time"] == "2.0 h"
    done = [WorkerState(n, "completed", samples=100, total=100) for n in (0, 1)]
    assert (
        tiles(done)["of the samples"] == "100.0 %" and tiles(done)["until the last that runs is done"] == "?"
    )


def speeds(found: list[WorkerState]) -> tuple[list[float], float]:
    """All workers' tokens/s as the page shows it: the steps, and the hours."""
    drawn = throughput(found)
    return drawn.speeds, drawn.seconds / 3600


def steady(worker: int, begins: float, ends: float, state: str = "in_progress") -> WorkerState:
    """100 tokens/s, a point a minute."""
    times = range(int(begins), int(ends) + 1, 60)
    return WorkerState(worker, state, history=[[NOW + when, 0, 100.0 * (when - begins)] for when in times])


def test_throughput_does_not_fall_where_some_have_reported_later_than_others():
    values, _ = speeds([steady(0, -7200, -55), steady(1, -7200, -355), steady(2, -7200, 0)])
    assert values == pytest.approx([300.0] * len(values))


def test_throughput_is_of_all_starts():
    """A spot worker that was lost for an hour: a gap, not a beginning."""
    seen = record(0, history=[[NOW - 60 * n, 0, 6000.0 * (60 - n)] for n in range(60, -1, -1)])
    seen.earlier = [[NOW - 10800 + 60 * n, 0, 6000.0 * n] for n in range(61)]
    values, hours = speeds([WorkerState(0, "in_progress", history=seen.whole_history)])
    assert hours == pytest.approx(3, abs=0.1)
    assert values[5] == pytest.approx(100) and values[30] == 0 and values[-5] == pytest.approx(100)


def test_one_that_ended_days_ago_squeezes_nobody():
    days_ago = steady(0, -3 * 86400, -3 * 86400 + 600, state="failed")
    long_idle = steady(1, -3600, 0)
    long_idle.history.insert(0, [NOW - 3 * 86400, 0, 0.0])
    values, hours = speeds([days_ago, long_idle, *(steady(n, -3600, 0) for n in range(2, 6))])
    assert hours < 1.1 and values[-1] == pytest.approx(500)


def test_a_page_of_nothing_known(tmp_path):
    assert "2 workers" in make_page(states(tmp_path, 2), NOW)


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


# Written beside the page by the test: it frames the page at a width and says how wide that is inside.
FRAME = """<!doctype html><body><iframe src="{page}" style="width:{width}px;height:1600px;border:0"></iframe>
<script>onload = () => {{ const inner = document.querySelector("iframe").contentDocument.documentElement;
document.body.dataset.widths = inner.scrollWidth + " " + inner.clientWidth; }}</script>"""


def run_browser(*arguments: str) -> str:
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    return subprocess.run(command, check=True, capture_output=True, timeout=60, text=True).stdout


@pytest.mark.wide
@pytest.mark.skipif(browser() is None, reason="no Chromium on the PATH or in CHROMIUM")
@pytest.mark.parametrize("width", [390, 1000])
def test_a_browser_draws_the_page_and_nothing_sticks_out(fleet, tmp_path, width):
    file, picture = tmp_path / "fleet.html", tmp_path / "fleet.png"
    long = WorkerState(99, "failed", message="gs://a-bucket/" + "very-long-" * 50)
    file.write_text(make_page([*states(fleet), long], NOW))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=file.name, width=width))
    seen = run_browser("--allow-file-access-from-files", "--dump-dom", frame.as_uri())
    content, inside = map(int, re.search(r'data-widths="(\d+) (\d+)"', seen).groups())
    assert content <= inside == width
    run_browser(f"--window-size={width},1600", f"--screenshot={picture}", file.as_uri())
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 20_000
