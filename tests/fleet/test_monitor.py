"""Every state of a worker is told from every other, and no file can break the look."""

import itertools
import json
import os
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from qwen_jax.__main__ import main
from qwen_jax.fleet import monitor
from qwen_jax.fleet.monitor import LocalSource, WorkerState, details, exit_code, look
from qwen_jax.fleet.page import make_page
from qwen_jax.fleet.records import FAILED, HISTORY_POINTS, TERMINATED, ProgressRecord
from qwen_jax.storage.folder import FolderStore
from tests.fleet.fleets import NOW, TOTAL, checkpoint, make_fleet, put, record


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    root = tmp_path_factory.mktemp("fleet")
    make_fleet(root)
    return root


def states(root, count=32) -> list[WorkerState]:
    source = LocalSource(root / "checkpoints", root / "activations")
    return [look(source, worker, NOW) for worker in range(count)]


def test_every_state_of_a_fleet(fleet):
    found: dict[str, list[int]] = {}
    for state in states(fleet):
        found.setdefault(state.state, []).append(state.worker)
    assert found.pop("in_progress") == [n for n in range(30) if n not in (3, 4, 7, 9, 17, 21, 25)]
    assert found == {
        "completed": [3, 4, 9],
        "failed": [7],
        "stalled": [17, 21],
        "unreadable": [25],
        "not_started": [30, 31],
    }
    by_id = {state.worker: state for state in states(fleet)}
    assert by_id[17].message == "no sign of life for 1.5 h"
    assert by_id[21].message == "no sample for 65 min"
    assert "403 <Forbidden>" in by_id[7].message
    assert by_id[5].guide_line() == "Worker 5: 2200 samples, 12 shards, in_progress"
    assert by_id[5].samples == 2300 and by_id[5].share == 2300 / TOTAL
    assert by_id[5].tokens_per_second == pytest.approx(950)
    assert by_id[5].eta_s == pytest.approx((TOTAL - 2300) / (2300 / 7140 * 119 / 120), rel=0.05)
    assert by_id[5].since_shard_s == 300


def test_problems_stand_first_and_decide_the_exit_code(fleet):
    found = states(fleet)
    table = [line.split()[:2] for line in details(found) if line and line.split()[0].isdigit()]
    assert table[:4] == [["7", "failed"], ["17", "stalled"], ["21", "stalled"], ["25", "unreadable"]]
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
    assert "no such folder" in "\n".join(details([state])) and "no such folder" in make_page([state], NOW)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"layer_norms": {}, "totals": {"bytes": 1e999}}',
        "[]",
        "null",
        "[" * 100_000,
        '{"worker_id": 0}',
        '"x"',
        json.dumps({"history": [[1, 2]]}),
    ],
)
def test_torn_records_and_metadata_are_as_if_absent(tmp_path, text):
    put(tmp_path, 0, None, checkpoint(5, 1))
    (tmp_path / "checkpoints" / "progress_worker_0.json").write_text(text)
    (tmp_path / "activations" / "worker_0" / "metadata.json").write_text(text)
    (state,) = states(tmp_path, 1)
    assert (state.state, state.samples, state.total, state.bytes) == ("in_progress", 5, None, None)


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
    page = tmp_path / "fleet.html"
    flags = [
        "--bucket",
        store.url,
        "--num_workers",
        "4",
        "--json",
        "--html",
        str(page),
        "--stalled_after",
        "1e8",
    ]
    assert main(["workers", *flags]) == 1
    seen = json.loads(capsys.readouterr().out)
    assert [each["state"] for each in seen] == ["in_progress", "not_started", "not_started", "completed"]
    assert seen[0]["bytes"] == 9_400_000_000 and seen[3]["share"] == 1.0
    assert "4 workers" in page.read_text()


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
        if tag not in ("meta", "polyline", "line"):
            self.open.append(tag)
        self.foreign += [value for key, value in attributes if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_loads_nothing(fleet):
    page = make_page(states(fleet), NOW, 30)
    checker = Checker()
    checker.feed(page.removeprefix("<!doctype html>"))
    assert checker.open == [] and checker.foreign == [] and "<script" not in page
    assert checker.text.index("Problems") < checker.text.index("Workers")
    assert "403 <Forbidden> & no more" in checker.text and "Worker 21 stalled" in checker.text
    assert "Throughput" in checker.text and "Mean norm by layer" in checker.text
    assert page.count('class="worker ') == 32


def test_a_page_of_nothing_known(tmp_path):
    assert "2 workers" in make_page(states(tmp_path, 2), NOW)


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@pytest.mark.skipif(browser() is None, reason="no Chromium on the PATH or in CHROMIUM")
@pytest.mark.parametrize("width", [390, 1000])
def test_a_browser_draws_the_page(fleet, tmp_path, width):
    page, picture = tmp_path / "fleet.html", tmp_path / "fleet.png"
    page.write_text(make_page(states(fleet), NOW))
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size={width},1600", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 20_000
