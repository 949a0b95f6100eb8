"""Supervision of TPU VMs, against a scripted gcloud on the PATH that writes down what it was asked."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qwen_jax.fleet.command import CommandError
from qwen_jax.fleet.gcloud import QUEUED, VM, Vms, machine_states, read_documents
from qwen_jax.fleet.supervise import BLIND_ROUNDS, Clock, Outcome, Policy, Supervisor
from qwen_jax.fleet.workers import listed, parse_workers
from tests.scripts.conftest import Fakes
from tests.scripts.test_launch_all import HARD

# Answers are files in $CLOUD, named by the verb; a file fail-VERB is what a failure says.
GCLOUD = """
case "$*" in
"storage cat "*checkpoint*) verb=checkpoints ;;
"storage cat "*) verb=records ;;
*"queued-resources list"*) verb=queued ;;
*" list "*) verb=vms ;;
*" create "*) verb=create ;;
*" delete "*) verb=delete ;;
*) verb=ssh ;;
esac
if [ -e "$CLOUD/fail-$verb" ]; then cat "$CLOUD/fail-$verb" >&2; exit 1; fi
if [ -e "$CLOUD/$verb" ]; then cat "$CLOUD/$verb"; fi
"""
NO_MATCH = "ERROR: (gcloud.storage.cat) The following URLs matched no objects or files:\n-gs://b/x"


@dataclass
class Cloud:
    """What gcloud answers, and what it was asked. rounds: what happens after each round of a supervisor."""

    folder: Path
    fakes: Fakes
    time: float = 1_000_000.0

    def answer(self, verb: str, text: str) -> None:
        (self.folder / verb).write_text(text)

    def fail(self, verb: str, says: str = "it broke") -> None:
        (self.folder / f"fail-{verb}").write_text(says)

    def mend(self, verb: str) -> None:
        (self.folder / f"fail-{verb}").unlink()

    def vms(self, **states: str) -> None:
        """By worker: w3="READY"."""
        nodes = [
            {"name": f"projects/p/locations/z/nodes/tpu-worker-{name[1:]}", "state": state}
            for name, state in states.items()
        ]
        self.answer("vms", json.dumps(nodes))

    def queued(self, **states: str) -> None:
        entries = [
            {
                "name": f"projects/p/locations/z/queuedResources/tpu-worker-{name[1:]}",
                "state": {"state": state},
            }
            for name, state in states.items()
        ]
        self.answer("queued", json.dumps(entries))

    def complete(self, *workers: int) -> None:
        documents = [json.dumps({"worker_id": worker, "status": "completed"}, indent=2) for worker in workers]
        self.answer("checkpoints", "\n".join(documents))

    def checkpoint(self, worker: int, samples: int) -> None:
        fields = {"worker_id": worker, "status": "in_progress", "total_samples_processed": samples}
        self.answer("checkpoints", json.dumps(fields))

    def record(self, worker: int, status: str = "running", **fields: object) -> None:
        record = {"worker_id": worker, "status": status, "updated_at": self.time} | fields
        self.answer("records", json.dumps(record))

    def asked(self) -> list[str]:
        """Verb and machine of each call that changes something, in order."""
        verbs = {"create", "delete", "ssh"}
        calls = [call.arguments for call in self.fakes.calls("gcloud")]
        return [
            f"{call[3]} {call[4]}" for call in calls if call[0] == "compute" and call[3] in verbs
        ]  # compute tpus KIND VERB NAME


class Rounds(Clock):
    """Time goes on by itself; after round i, steps[i] happens; a supervisor that wants more rounds fails."""

    def __init__(self, cloud: Cloud, steps: list[Callable[[], object]]):
        self._cloud, self._steps = cloud, steps

    def time(self) -> float:
        return self._cloud.time

    def sleep(self, seconds: float) -> None:
        self._cloud.time += seconds
        self._steps.pop(0)()


@pytest.fixture
def cloud(tmp_path, fakes, monkeypatch) -> Cloud:
    made = Cloud(tmp_path / "cloud", fakes)
    made.folder.mkdir()
    fakes.add("gcloud", GCLOUD)
    monkeypatch.setenv("PATH", fakes.environment()["PATH"])
    monkeypatch.setenv("CALLS", str(fakes.calls_folder))
    monkeypatch.setenv("CLOUD", str(made.folder))
    made.fail("checkpoints", NO_MATCH)
    made.fail("records", NO_MATCH)
    made.vms()
    return made


def supervise(
    cloud: Cloud, steps: list[Callable[[], object]], workers: tuple[int, ...] = (3,), kind: str = VM, **policy
) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    vms = Vms("zone", "tpu-worker-{}", "qwen", kind=kind)
    rules = Policy(**({"poll_s": 60.0, "backoff_s": 1.0, "max_attempts": 5, "parallel": 1} | policy))
    clock = Rounds(cloud, steps)
    outcome = Supervisor(vms, workers, {"GCS_BUCKET": "b"}, rules, clock, said.append).run()
    return outcome, said


def done(cloud: Cloud, *workers: int) -> Callable[[], None]:
    def step() -> None:
        (cloud.folder / "fail-checkpoints").unlink(missing_ok=True)
        cloud.complete(*workers)

    return step


def test_from_nothing_to_done(cloud):
    steps = [lambda: cloud.vms(w3="CREATING"), lambda: cloud.vms(w3="READY"), lambda: None, done(cloud, 3)]
    outcome, said = supervise(cloud, steps)
    assert outcome == Outcome(frozenset([3]), {})
    assert cloud.asked() == ["create tpu-worker-3", "ssh tpu-worker-3"]
    assert said[-1] == "worker 3: completed"


@pytest.mark.parametrize("word", ["PREEMPTED", "TERMINATED", "FAILED", "SUSPENDED"])
def test_a_lost_vm_is_deleted_made_again_and_its_worker_started_again(cloud, word):
    cloud.vms(w3="READY")
    steps = [lambda: cloud.vms(w3=word), lambda: cloud.vms(w3="READY"), done(cloud, 3)]
    supervise(cloud, steps)
    assert cloud.asked() == [
        *("ssh tpu-worker-3", "delete tpu-worker-3", "create tpu-worker-3", "ssh tpu-worker-3")
    ]


def test_a_vanished_vm_is_made_again(cloud):
    cloud.vms(w3="READY")
    supervise(cloud, [lambda: cloud.vms(), done(cloud, 3)])
    assert cloud.asked() == ["ssh tpu-worker-3", "create tpu-worker-3"]


@pytest.mark.parametrize(
    "word", ["CREATING", "STARTING", "REPAIRING", "DELETING", "STOPPED", "SOMETHING_NEW"]
)
def test_what_changes_by_itself_is_left_alone(cloud, word):
    cloud.vms(w3=word)
    supervise(cloud, [lambda: None, done(cloud, 3)])
    assert cloud.asked() == []


@pytest.mark.parametrize("word", ["PREEMPTED", "READY", ""])
def test_a_finished_worker_is_never_touched(cloud, word):
    done(cloud, 3)()
    cloud.vms(**({"w3": word} if word else {}))
    assert supervise(cloud, [])[0].finished == {3}
    assert cloud.asked() == []


@pytest.mark.parametrize("verb", ["checkpoints", "records", "vms"])
def test_nobody_is_touched_while_something_cannot_be_read(cloud, verb):
    cloud.vms(w3="PREEMPTED")
    was = (cloud.folder / f"fail-{verb}").read_text() if verb != "vms" else None
    cloud.fail(verb, "ERROR: no network")

    def mend() -> None:
        assert cloud.asked() == []
        cloud.mend(verb)
        if was is not None:
            cloud.fail(verb, was)

    _, said = supervise(cloud, [mend, done(cloud, 3)])
    assert said[0] == "nothing done this round: ERROR: no network"
    assert cloud.asked()[0] == "delete tpu-worker-3"


@pytest.mark.parametrize("text", ['[{"name": "tpu-wor', '{"a": 1}', "[3]"])
def test_a_torn_list_is_no_list(cloud, text):
    cloud.answer("vms", text)
    supervise(cloud, [done(cloud, 3)])
    assert cloud.asked() == []


def test_gcloud_that_is_of_no_use_ends_it(cloud):
    cloud.fail("vms", "ERROR: log in")
    with pytest.raises(CommandError, match="log in"):
        supervise(cloud, [lambda: None] * BLIND_ROUNDS)


def test_tries_are_spaced_and_capped(cloud):
    cloud.fail("create", "ERROR: no more capacity in the zone")
    rounds = [lambda: None] * 40
    outcome, said = supervise(cloud, rounds, backoff_s=60.0, max_attempts=4)
    assert outcome.given_up == {3: "4 tries without progress; its machine is absent"}
    assert cloud.asked() == ["create tpu-worker-3"] * 4
    assert 40 - len(rounds) == 1 + 2 + 4 + 8
    assert "worker 3: tpu-worker-3 not created: ERROR: no more capacity in the zone" in said


def test_a_worker_that_gets_on_has_its_tries_back(cloud):
    def lost() -> None:
        cloud.record(3)
        (cloud.folder / "fail-records").unlink(missing_ok=True)
        cloud.vms(w3="PREEMPTED")

    cloud.vms(w3="READY")
    steps = [step for _ in range(6) for step in (lost, lambda: cloud.vms(w3="READY"))]
    outcome, _ = supervise(cloud, [*steps, done(cloud, 3)], max_attempts=3)
    assert outcome.finished == {3}
    assert cloud.asked().count("create tpu-worker-3") == 6


def test_a_worker_without_records_is_known_by_its_checkpoint(cloud):
    """PROGRESS_INTERVAL_S=0: it gets on for twenty minutes, and is started once."""
    cloud.vms(w3="READY")
    (cloud.folder / "fail-checkpoints").unlink()
    grows = [lambda samples=samples: cloud.checkpoint(3, samples) for samples in range(1, 21)]
    outcome, _ = supervise(cloud, [*grows, done(cloud, 3)], max_attempts=3)
    assert outcome.finished == {3} and cloud.asked() == ["ssh tpu-worker-3"]


def test_a_start_that_fails_is_tried_again(cloud):
    cloud.vms(w3="READY")
    cloud.fail("ssh", "ssh: connect to host port 22: Connection refused")
    _, said = supervise(cloud, [lambda: cloud.mend("ssh"), done(cloud, 3)])
    assert cloud.asked() == ["ssh tpu-worker-3"] * 2
    assert "not started: ssh: connect to host" in said[0]


def test_a_worker_that_falls_silent_is_started_again(cloud):
    cloud.vms(w3="READY")
    supervise(cloud, [lambda: None] * 16 + [done(cloud, 3)])
    assert cloud.asked() == ["ssh tpu-worker-3"] * 2


def test_a_worker_that_failed_for_now_is_started_again_and_one_that_failed_for_good_is_not(cloud):
    def failed(exit_code: int) -> Callable[[], None]:
        def step() -> None:
            (cloud.folder / "fail-records").unlink(missing_ok=True)
            cloud.record(3, "failed", exit_code=exit_code, message="words")

        return step

    cloud.vms(w3="READY")
    outcome, _ = supervise(cloud, [failed(75), failed(78)])
    assert cloud.asked() == ["ssh tpu-worker-3"] * 2
    assert outcome.given_up == {3: "it failed with exit 78: words"}


def test_a_failure_before_this_supervisor_says_nothing_about_the_next_start(cloud):
    (cloud.folder / "fail-records").unlink()
    cloud.record(3, "failed", exit_code=78, message="a folder that is there by now")
    cloud.vms(w3="READY")
    outcome, _ = supervise(cloud, [done(cloud, 3)])
    assert cloud.asked() == ["ssh tpu-worker-3"] and outcome.finished == {3}


def test_only_the_chosen_workers(cloud):
    supervise(cloud, [done(cloud, 3, 8)], workers=(3, 8))
    assert sorted(cloud.asked()) == ["create tpu-worker-3", "create tpu-worker-8"]


@pytest.mark.parametrize("word", ["SUSPENDED", "FAILED"])
def test_queued_resources(cloud, word):
    cloud.queued()
    steps = [
        lambda: cloud.queued(w3="WAITING_FOR_RESOURCES"),
        lambda: (cloud.queued(w3="ACTIVE"), cloud.vms(w3="READY")),
        lambda: (cloud.queued(w3=word), cloud.vms()),
        lambda: (cloud.queued(w3="ACTIVE"), cloud.vms(w3="READY")),
        lambda: cloud.vms(),  # ACTIVE, but its VM has vanished
        done(cloud, 3),
    ]
    supervise(cloud, steps, kind=QUEUED)
    name = "tpu-worker-3"
    again = [f"delete {name}", f"create {name}"]
    assert cloud.asked() == [f"create {name}", f"ssh {name}", *again, f"ssh {name}", *again]
    kinds = {call.arguments[2] for call in cloud.fakes.calls("gcloud") if "create" in call.arguments}
    assert kinds == {"queued-resources"}


def test_any_value_reaches_gcloud_whole(cloud):
    vms = Vms(HARD, f"{HARD}-{{}}", HARD, HARD, HARD, HARD)
    for each in (vms, replace(vms, kind=QUEUED, on_demand=True)):
        for command in (each.create_command(5), each.delete_command(5), *each.list_commands()):
            assert HARD in command and shlex.split(shlex.join(command)) == command
        assert f"{HARD}-{{}}".replace("{}", "5") in each.create_command(5)
    assert "--spot" in vms.create_command(5) and "--spot" not in each.create_command(5)


def test_documents_of_a_folder_that_stands_in_for_a_bucket(tmp_path):
    for worker, text in enumerate(
        ['{"worker_id": 0, "a": {"b": 1}}', '{"worker_id": 1, "sta', "", '{"worker_id": 3}']
    ):
        (tmp_path / "activations" / f"tpu_{worker}").mkdir(parents=True)
        (tmp_path / "activations" / f"tpu_{worker}" / "progress.json").write_text(text)
    found = read_documents(tmp_path.as_uri(), "activations", "progress.json")
    assert found == {0: {"worker_id": 0, "a": {"b": 1}}, 3: {"worker_id": 3}}


def test_states_by_gclouds_words(cloud):
    cloud.vms(w1="READY", w2="PREEMPTED", w3="CREATING")
    found = machine_states(Vms("zone", "tpu-worker-{}", "qwen"))
    assert found == {
        **{"tpu-worker-1": ("ready", "READY"), "tpu-worker-2": ("lost", "PREEMPTED")},
        **{"tpu-worker-3": ("waiting", "CREATING")},
    }


@pytest.mark.parametrize("text, workers", [("3,7-9", (3, 7, 8, 9)), ("9, 1-2,2", (1, 2, 9)), ("0", (0,))])
def test_lists_of_workers(text, workers):
    assert parse_workers(text) == workers
    assert listed(workers) == " ".join(map(str, workers))
