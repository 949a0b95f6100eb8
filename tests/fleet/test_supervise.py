"""Supervision of TPU VMs, against a scripted gcloud on the PATH that writes down what it was asked."""

import itertools
import json
import shlex
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qwen_jax.accelerators import TPUS
from qwen_jax.errors import UsageError
from qwen_jax.fleet import gcloud
from qwen_jax.fleet.command import CommandError
from qwen_jax.fleet.gcloud import (
    INSTANCE,
    QUEUED,
    VM,
    Cloud,
    FirstAlone,
    Vms,
    machine_states,
    read_documents,
)
from qwen_jax.fleet.supervise import BLIND_ROUNDS, Clock, Outcome, Policy, Supervisor
from qwen_jax.fleet.worker_variables import listed, parse_workers
from tests.few import few
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
class ScriptedCloud:
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

    def instances(self, **states: str) -> None:
        entries = [{"name": f"tpu-worker-{name[1:]}", "status": state} for name, state in states.items()]
        self.answer("vms", json.dumps(entries))

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
        record = {"worker_id": worker, "status": status, "updated_at": self.time, "tokens": 9} | fields
        self.answer("records", json.dumps(record))

    def asked(self) -> list[str]:
        """Verb and machine of each call that changes something, in order."""
        verbs = {"create", "delete", "ssh"}
        calls = [call.arguments for call in self.fakes.calls("gcloud")]
        pairs = [pair for call in calls for pair in itertools.pairwise(call[:5])]
        return [f"{verb} {name}" for verb, name in pairs if verb in verbs]


class Rounds(Clock):
    """Time goes on by itself; after round i, steps[i] happens; a supervisor that wants more rounds fails."""

    def __init__(self, cloud: ScriptedCloud, steps: list[Callable[[], object]]):
        self._cloud, self._steps = cloud, steps

    def time(self) -> float:
        return self._cloud.time

    def sleep(self, seconds: float) -> None:
        self._cloud.time += seconds
        self._steps.pop(0)()


@pytest.fixture
def cloud(tmp_path, fakes, monkeypatch) -> ScriptedCloud:
    made = ScriptedCloud(tmp_path / "cloud", fakes)
    made.folder.mkdir()
    fakes.add("gcloud", GCLOUD)
    monkeypatch.setenv("PATH", fakes.environment()["PATH"])
    monkeypatch.setenv("CALLS", str(fakes.calls_folder))
    monkeypatch.setenv("CLOUD", str(made.folder))
    made.fail("checkpoints", NO_MATCH)
    made.fail("records", NO_MATCH)
    made.vms()
    return made


def run_supervisor(
    cloud: ScriptedCloud,
    steps: list[Callable[[], object]],
    workers: tuple[int, ...] = (3,),
    kind: str = VM,
    **policy,
) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    accelerator = "tpu7x-8" if kind == INSTANCE else "v4-8"
    vms = Vms("zone", "tpu-worker-{}", "qwen", kind=kind, accelerator_type=accelerator)
    rules = Policy(**({"poll_s": 60.0, "backoff_s": 1.0, "max_attempts": 5, "parallel": 1} | policy))
    clock = Rounds(cloud, steps)
    outcome = Supervisor(Cloud(vms, {"GCS_BUCKET": "b"}), workers, rules, clock, said.append).run()
    return outcome, said


def done(cloud: ScriptedCloud, *workers: int) -> Callable[[], None]:
    def step() -> None:
        (cloud.folder / "fail-checkpoints").unlink(missing_ok=True)
        cloud.complete(*workers)

    return step


def test_from_nothing_to_done(cloud):
    steps = [lambda: cloud.vms(w3="CREATING"), lambda: cloud.vms(w3="READY"), lambda: None, done(cloud, 3)]
    outcome, said = run_supervisor(cloud, steps)
    assert outcome == Outcome(frozenset([3]), {})
    assert cloud.asked() == ["create tpu-worker-3", "ssh tpu-worker-3"]
    assert said[-1] == "worker 3: completed"


@pytest.mark.parametrize("word", ["PREEMPTED", "TERMINATED", "FAILED", "SUSPENDED"])
def test_a_lost_vm_is_deleted_made_again_and_its_worker_started_again(cloud, word):
    cloud.vms(w3="READY")
    steps = [lambda: cloud.vms(w3=word), lambda: cloud.vms(w3="READY"), done(cloud, 3)]
    run_supervisor(cloud, steps)
    assert cloud.asked() == [
        *("ssh tpu-worker-3", "delete tpu-worker-3", "create tpu-worker-3", "ssh tpu-worker-3")
    ]


def test_a_vanished_vm_is_made_again(cloud):
    cloud.vms(w3="READY")
    run_supervisor(cloud, [lambda: cloud.vms(), done(cloud, 3)])
    assert cloud.asked() == ["ssh tpu-worker-3", "create tpu-worker-3"]


@pytest.mark.parametrize(
    "word", ["CREATING", "STARTING", "REPAIRING", "DELETING", "STOPPED", "SOMETHING_NEW"]
)
def test_what_changes_by_itself_is_left_alone(cloud, word):
    cloud.vms(w3=word)
    run_supervisor(cloud, [lambda: None, done(cloud, 3)])
    assert cloud.asked() == []


@pytest.mark.parametrize("word", ["PREEMPTED", "READY", ""])
def test_a_finished_worker_is_never_touched(cloud, word):
    done(cloud, 3)()
    cloud.vms(**({"w3": word} if word else {}))
    assert run_supervisor(cloud, [])[0].finished == {3}
    assert cloud.asked() == []


@pytest.mark.parametrize("verb", ["checkpoints", "vms"])
def test_nobody_is_touched_while_something_cannot_be_read(cloud, verb):
    cloud.vms(w3="PREEMPTED")
    was = (cloud.folder / f"fail-{verb}").read_text() if verb != "vms" else None
    cloud.fail(verb, "ERROR: no network")

    def mend() -> None:
        assert cloud.asked() == []
        cloud.mend(verb)
        if was is not None:
            cloud.fail(verb, was)

    _, said = run_supervisor(cloud, [mend, done(cloud, 3)])
    assert said[0] == "nothing done this round: ERROR: no network"
    assert cloud.asked()[0] == "delete tpu-worker-3"


@pytest.mark.parametrize("text", ['[{"name": "tpu-wor', '{"a": 1}', "[3]"])
def test_a_torn_list_is_no_list(cloud, text):
    cloud.answer("vms", text)
    run_supervisor(cloud, [done(cloud, 3)])
    assert cloud.asked() == []


def test_gcloud_that_is_of_no_use_ends_it(cloud):
    cloud.fail("vms", "ERROR: log in")
    with pytest.raises(CommandError, match="log in"):
        run_supervisor(cloud, [lambda: None] * BLIND_ROUNDS)


@pytest.mark.wide
def test_tries_are_spaced_and_capped(cloud):
    cloud.fail("create", "ERROR: no more capacity in the zone")
    rounds = [lambda: None] * 40
    outcome, said = run_supervisor(cloud, rounds, backoff_s=60.0, max_attempts=4)
    assert outcome.given_up == {3: "4 tries without progress; its machine is absent"}
    assert cloud.asked() == ["create tpu-worker-3"] * 4
    assert 40 - len(rounds) == 1 + 2 + 4 + 8
    assert "worker 3: tpu-worker-3 not created: ERROR: no more capacity in the zone" in said


@pytest.mark.wide
def test_a_worker_that_gets_on_has_its_tries_back(cloud):
    def lost() -> None:
        cloud.record(3)
        (cloud.folder / "fail-records").unlink(missing_ok=True)
        cloud.vms(w3="PREEMPTED")

    cloud.vms(w3="READY")
    steps = [step for _ in range(6) for step in (lost, lambda: cloud.vms(w3="READY"))]
    outcome, _ = run_supervisor(cloud, [*steps, done(cloud, 3)], max_attempts=3)
    assert outcome.finished == {3}
    assert cloud.asked().count("create tpu-worker-3") == 6


@pytest.mark.wide
def test_a_worker_without_records_is_known_by_its_checkpoint(cloud):
    """PROGRESS_INTERVAL_S=0: it gets on for twenty minutes, and is started once."""
    cloud.vms(w3="READY")
    (cloud.folder / "fail-checkpoints").unlink()
    grows = [lambda samples=samples: cloud.checkpoint(3, samples) for samples in range(1, 21)]
    outcome, _ = run_supervisor(cloud, [*grows, done(cloud, 3)], max_attempts=3)
    assert outcome.finished == {3} and cloud.asked() == ["ssh tpu-worker-3"]


def test_a_start_that_fails_is_tried_again(cloud):
    cloud.vms(w3="READY")
    cloud.fail("ssh", "ssh: connect to host port 22: Connection refused")
    _, said = run_supervisor(cloud, [lambda: cloud.mend("ssh"), done(cloud, 3)])
    assert cloud.asked() == ["ssh tpu-worker-3"] * 2
    assert any("not started: ssh: connect to host" in line for line in said)


@pytest.mark.wide
def test_a_worker_that_falls_silent_is_started_again(cloud):
    cloud.vms(w3="READY")
    run_supervisor(cloud, [lambda: None] * 16 + [done(cloud, 3)])
    assert cloud.asked() == ["ssh tpu-worker-3"] * 2


def test_a_worker_that_failed_for_now_is_started_again_and_one_that_failed_for_good_is_not(cloud):
    def failed(exit_code: int) -> Callable[[], None]:
        def step() -> None:
            (cloud.folder / "fail-records").unlink(missing_ok=True)
            cloud.record(3, "failed", exit_code=exit_code, message="words")

        return step

    cloud.vms(w3="READY")
    outcome, _ = run_supervisor(cloud, [failed(75), failed(78)])
    assert cloud.asked() == ["ssh tpu-worker-3"] * 2
    assert outcome.given_up == {3: "it failed with exit 78: words"}


def test_a_failure_before_this_supervisor_says_nothing_about_the_next_start(cloud):
    (cloud.folder / "fail-records").unlink()
    cloud.record(3, "failed", exit_code=78, message="a folder that is there by now")
    cloud.vms(w3="READY")
    outcome, _ = run_supervisor(cloud, [done(cloud, 3)])
    assert cloud.asked() == ["ssh tpu-worker-3"] and outcome.finished == {3}


def test_only_the_chosen_workers(cloud):
    run_supervisor(cloud, [done(cloud, 3, 8)], workers=(3, 8))
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
    run_supervisor(cloud, steps, kind=QUEUED)
    name = "tpu-worker-3"
    again = [f"delete {name}", f"create {name}"]
    assert cloud.asked() == [f"create {name}", f"ssh {name}", *again, f"ssh {name}", *again]
    kinds = {call.arguments[2] for call in cloud.fakes.calls("gcloud") if "create" in call.arguments}
    assert kinds == {"queued-resources"}


@pytest.mark.parametrize("word", ["TERMINATED", "SUSPENDED", None])
def test_instances(cloud, word):
    """One that was pre-empted is stopping first, and then it is gone."""
    cloud.instances()
    steps = [
        lambda: cloud.instances(w3="STAGING"),
        lambda: cloud.instances(w3="RUNNING"),
        lambda: cloud.instances(w3="STOPPING"),
        lambda: cloud.instances(**({"w3": word} if word else {})),
        lambda: cloud.instances(w3="RUNNING"),
        done(cloud, 3),
    ]
    run_supervisor(cloud, steps, kind=INSTANCE)
    name = "tpu-worker-3"
    lost = [f"delete {name}"] if word else []
    assert cloud.asked() == [f"create {name}", f"ssh {name}", *lost, f"create {name}", f"ssh {name}"]
    created = next(call.arguments for call in cloud.fakes.calls("gcloud") if "create" in call.arguments)
    assert created[created.index("--machine-type") + 1] == TPUS["tpu7x-8"].machine_type


@pytest.mark.parametrize("kind", [VM, QUEUED, INSTANCE])
@pytest.mark.parametrize("name", TPUS)
def test_what_does_not_go_together_is_refused(kind, name):
    """v4 and v5e are not instances, and TPU7x is nothing else."""
    vms = Vms("zone", "{}", "qwen", accelerator_type=name, kind=kind)
    if name in {"tpu7x-8"} if kind != INSTANCE else name.startswith(("v4", "v5lite")):
        with pytest.raises(UsageError, match=f"{name} with --create"):
            vms.create_command(3)
    else:
        words = vms.create_command(3)
        there = TPUS[name].machine_type if kind == INSTANCE else TPUS[name].runtime_version
        assert there in words and ("--spot" in words) == (kind != INSTANCE)


def test_an_unknown_machine_needs_a_runtime_version():
    vms = Vms("zone", "{}", "qwen", accelerator_type="v3-8")
    with pytest.raises(UsageError, match="known are v4-8"):
        vms.create_command(3)
    assert "mine" in replace(vms, runtime_version="mine").create_command(3)
    for each in (
        replace(vms, kind=INSTANCE),
        Vms("zone", "{}", "qwen", None, "v6e-4", "mine", kind=INSTANCE),
    ):
        with pytest.raises(UsageError):
            each.create_command(3)


def test_any_value_reaches_gcloud_whole(cloud):
    vms = Vms(HARD, f"{HARD}-{{}}", HARD, HARD, HARD, HARD)
    for each in (vms, replace(vms, kind=QUEUED, on_demand=True)):
        for command in (each.create_command(5), each.delete_command(5), *each.list_commands()):
            assert HARD in command and shlex.split(shlex.join(command)) == command
        assert f"{HARD}-{{}}".replace("{}", "5") in each.create_command(5)
    assert "--spot" in vms.create_command(5) and "--spot" not in each.create_command(5)


@pytest.mark.parametrize("words", [["READY"] * 6, []])
def test_no_more_at_once_than_the_limit(cloud, monkeypatch, words):
    """Starts, and creations: each waits for a third one at its side, which must not come."""
    running, peak, changed = 0, 0, threading.Condition()
    ask = gcloud.call

    def call(command: list[str]) -> str:
        nonlocal running, peak
        if not {"ssh", "create"} & set(command):
            return ask(command)
        with changed:
            running, peak = running + 1, max(peak, running + 1)
            changed.notify_all()
            changed.wait_for(lambda: peak > 2, timeout=0.2)
            running -= 1
        return ""

    monkeypatch.setattr(gcloud, "call", call)
    monkeypatch.setattr(FirstAlone, "__call__", lambda self, command, given: call(command))
    cloud.vms(**{f"w{worker}": word for worker, word in enumerate(words)})
    run_supervisor(cloud, [done(cloud, *range(6))], workers=tuple(range(6)), parallel=2)
    assert peak == 2


def test_until_an_ssh_has_succeeded_each_is_alone(monkeypatch):
    """The first fails, the second makes the key; then two run at once."""
    running, begun, met, changed = 0, 0, set(), threading.Condition()

    def call(command: list[str], given: str) -> str:
        nonlocal running, begun
        with changed:
            number, begun, running = begun, begun + 1, running + 1
            if running > 1:
                met.add(number)
            changed.notify_all()
            changed.wait_for(lambda: met, timeout=0.2 if number < 2 else 20)
            running -= 1
        if number == 0:
            raise CommandError("no such VM")
        return ""

    monkeypatch.setattr(gcloud, "call", call)
    ssh = FirstAlone()
    with ThreadPoolExecutor(4) as pool:
        ends = [pool.submit(ssh, ["gcloud"]) for _ in range(4)]
    assert met == {3}
    assert sum(isinstance(each.exception(), CommandError) for each in ends) == 1


def test_documents_in_a_bucket(cloud):
    """As gcloud prints them, one after another; torn ones are left out."""
    cloud.mend("records")
    texts = [
        '{"worker_id": 0, "a": {"b": 1}}',
        '{"worker_id": 1, "sta',
        "",
        '{"worker_id": 3}',
        '{"worker_id": "4"}',
    ]
    cloud.answer("records", "\n".join(texts))
    found = read_documents("bucket", "activations", "progress.json")
    assert found == {0: {"worker_id": 0, "a": {"b": 1}}, 3: {"worker_id": 3}}
    (call,) = cloud.fakes.calls("gcloud")
    assert call.arguments == [
        "storage",
        "cat",
        "--display-url",
        "gs://bucket/activations/tpu_*/progress.json",
    ]


def test_a_document_in_another_workers_folder_is_not_its_workers(cloud):
    """Somebody has copied the folder of a finished worker."""
    lines = [
        *("==> gs://bucket/activations/tpu_3/checkpoint_worker_3.json <==", '{"worker_id": 3, "sta'),
        *(
            "==> gs://bucket/activations/tpu_5/checkpoint_worker_3.json <==",
            '{"worker_id": 3, "status": "completed"}',
        ),
        *(
            "==> gs://bucket/activations/tpu_4/checkpoint_worker_4.json <==",
            '{"worker_id": 4, "status": "completed"}',
        ),
    ]
    cloud.mend("checkpoints")
    cloud.answer("checkpoints", "\n".join(lines))
    assert set(read_documents("bucket", "activations", "checkpoint_worker_*.json")) == {4}


# A record that is replaced between the listing and the reading is a 404, and the next reading finds the new one.
REPLACED_ONCE = """
case "$*" in
"storage cat "*progress*)
    if [ ! -e "$CLOUD/replaced" ]; then touch "$CLOUD/replaced"; echo 'HTTPError 404: not found' >&2; exit 1; fi ;;
esac
"""


def test_records_that_are_replaced_while_they_are_read_are_read_again(cloud):
    cloud.fakes.add("gcloud", REPLACED_ONCE + GCLOUD)
    cloud.mend("records")
    cloud.record(3)
    cloud.vms(w3="READY")
    _, said = run_supervisor(cloud, [done(cloud, 3)])
    assert cloud.asked() == ["ssh tpu-worker-3"] and not any("not read" in line for line in said)


@pytest.mark.wide
def test_without_records_machines_are_looked_after_and_nobody_is_called_silent(cloud):
    cloud.vms(w3="READY")
    cloud.fail("records", "ERROR: 404")
    steps = [*[lambda: None] * 20, lambda: cloud.vms(w3="PREEMPTED"), lambda: cloud.vms(w3="READY")]
    _, said = run_supervisor(cloud, [*steps, done(cloud, 3)])
    again = ["delete tpu-worker-3", "create tpu-worker-3", "ssh tpu-worker-3"]
    assert cloud.asked() == ["ssh tpu-worker-3", *again]
    assert "progress records not read this round: ERROR: 404" in said


@pytest.mark.parametrize("status, tokens", [("starting", 0), ("running", 0)])
def test_a_start_alone_is_no_progress(cloud, status, tokens):
    """A worker that is killed at its first batch, again and again, is given up in the end."""

    def dies() -> None:
        cloud.record(3, status, tokens=tokens)
        cloud.vms(w3="PREEMPTED")

    cloud.mend("records")
    cloud.vms(w3="READY")
    steps = [step for _ in range(9) for step in (dies, lambda: cloud.vms(w3="READY"))]
    outcome, _ = run_supervisor(cloud, steps, max_attempts=4)
    assert "4 tries without progress" in outcome.given_up[3]


@pytest.mark.parametrize("when", few(["1e999", "NaN", '"now"', "1e300"]))
def test_times_that_no_worker_writes_are_no_sign_of_life(cloud, when):
    cloud.mend("records")
    cloud.answer("records", f'{{"worker_id": 3, "status": "running", "updated_at": {when}}}')
    cloud.vms(w3="READY")
    run_supervisor(cloud, [lambda: None] * 16 + [done(cloud, 3)])
    assert cloud.asked() == ["ssh tpu-worker-3"] * 2


@pytest.mark.wide
def test_what_it_waits_for_is_said_once_and_counted_now_and_then(cloud):
    cloud.vms(w3="STOPPED", w8="CREATING")
    steps = [*[lambda: None] * 20, lambda: cloud.vms(w3="STOPPED", w8="STARTING"), done(cloud, 3, 8)]
    _, said = run_supervisor(cloud, steps, workers=(3, 8))
    waits = [line for line in said if line.startswith("worker") and " is " in line]
    assert waits == [
        "worker 3: tpu-worker-3 is STOPPED: somebody stopped it; start it, or delete it and it is made again",
        "worker 8: tpu-worker-8 is CREATING",
        "worker 8: tpu-worker-8 is STARTING",
    ]
    counts = [line for line in said if " workers completed, " in line]
    assert counts[0] == (
        "0 of 2 workers completed, 0 given up; machines of the others: 1 CREATING, 1 STOPPED"
    )
    assert len(counts) == 3  # 22 minutes


def test_a_record_of_somebody_else_cannot_write_on_the_terminal(cloud):
    def failed() -> None:
        cloud.mend("records")
        cloud.record(3, "failed", exit_code=65, message="bad\nworker 4: completed\x1b[2J")

    cloud.vms(w3="READY")
    outcome, said = run_supervisor(cloud, [failed])
    assert outcome.given_up == {3: "it failed with exit 65: bad worker 4: completed\\x1b[2J"}
    assert all(line.isprintable() for line in said)


# A creation that takes until $CLOUD/capacity is there; the machine is listed as soon as it has been asked for.
SLOW_CREATION = """
case "$*" in
*" create "*)
    echo '[{"name": "tpu-worker-3", "state": "CREATING"}, {"name": "tpu-worker-8", "state": "READY"}]' >"$CLOUD/vms"
    until [ -e "$CLOUD/capacity" ] || ((SECONDS > 20)); do sleep 0.01; done
    echo 'ERROR: { "code": 8, "message": "no more capacity" }' >&2; exit 1 ;;
esac
"""


def test_a_creation_that_takes_long_holds_nobody_up_and_its_error_is_said(cloud):
    cloud.fakes.add("gcloud", SLOW_CREATION + GCLOUD)
    cloud.vms(w8="READY")
    started: list[str] = []

    def until_started() -> None:
        started.extend(each for each in cloud.asked() if each.startswith("ssh"))
        if started:
            (cloud.folder / "capacity").touch()
            done(cloud, 3, 8)()

    # One call of a kind at once: the start does not stand behind the creation.
    _, said = run_supervisor(cloud, [until_started] * 9, workers=(3, 8), poll_s=0.5)
    assert started == ["ssh tpu-worker-8"] and cloud.asked().count("create tpu-worker-3") == 1
    assert any("tpu-worker-3 not created" in line and "no more capacity" in line for line in said)


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
