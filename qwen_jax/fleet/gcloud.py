"""TPU VMs over the gcloud command: what it is asked, and what its answers mean.

A VM is made by the Cloud TPU API, at once or queued, or as an instance of Compute Engine.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from qwen_jax.accelerators import IMAGE_PROJECT, CloudTpu, cloud_tpu
from qwen_jax.data.streams import stream_name
from qwen_jax.errors import UsageError
from qwen_jax.fleet.command import CommandError, call
from qwen_jax.fleet.worker_variables import SECRETS, secrets_of, settings_of
from qwen_jax.ledger.checks import parse_json
from qwen_jax.ledger.names import bucket_folder

VM, QUEUED, INSTANCE = "vm", "queued", "instance"
_NOUNS = {
    VM: ("compute", "tpus", "tpu-vm"),
    QUEUED: ("compute", "tpus", "queued-resources"),
    INSTANCE: ("compute", "instances"),
}
_READY = {VM: "READY", QUEUED: "ACTIVE", INSTANCE: "RUNNING"}
BOOT_DISK = "100GB"
"""Of an instance: its image's own 10 GB do not hold the packages."""
READY, WAITING, LOST, ABSENT = "ready", "waiting", "lost", "absent"
_LOST = {"PREEMPTED", "TERMINATED", "FAILED", "SUSPENDED"}
_NOTHING_THERE = "matched no objects"
_FOLDER = f"/{bucket_folder('([0-9]+)')}/"


@dataclass(frozen=True)
class Vms:
    """Where the workers' VMs are and what they are like. name_pattern holds {} for the id.

    code_url, streams_url: gs:// addresses of a .tar.gz of the checkout and of the streams' folder; a VM fetches what
    it lacks. create_flags, ssh_flags: further words for gcloud.
    """

    zone: str
    name_pattern: str
    remote_dir: str
    code_url: str | None = None
    accelerator_type: str = "v4-8"
    runtime_version: str | None = None
    on_demand: bool = False
    kind: str = VM
    streams_url: str | None = None
    create_flags: tuple[str, ...] = ()
    ssh_flags: tuple[str, ...] = ()

    def name(self, worker: int) -> str:
        return self.name_pattern.replace("{}", str(worker))

    def start_command(self, worker: int, environment: Mapping[str, str]) -> list[str]:
        """ssh that leaves the worker running in the background, with the settings of `environment`.

        It reads the secrets among them, where there are any, from its input (`secrets_of`).
        """
        remote = self._remote_command(worker, environment)
        ssh = ["gcloud", "compute", "ssh"] if self.kind == INSTANCE else ["gcloud", *_NOUNS[VM], "ssh"]
        return [*ssh, self.name(worker), "--zone", self.zone, *self.ssh_flags, "--command", remote]

    def create_command(self, worker: int) -> list[str]:
        """A VM's creation is waited for: only then does gcloud say why there is none. Raises UsageError for what does
        not go together."""
        name = self.name(worker)
        command = ["gcloud", *_NOUNS[self.kind], "create", name, "--zone", self.zone]
        return [*command, *self._like(name), *self._price(), *self.create_flags, "--quiet"]

    def delete_command(self, worker: int) -> list[str]:
        force = ["--force"] if self.kind == QUEUED else []
        command = ["gcloud", *_NOUNS[self.kind], "delete", self.name(worker), "--zone", self.zone]
        return [*command, *force, "--quiet"]

    def list_commands(self) -> list[list[str]]:
        """Of VMs, and of queued resources where these are used."""
        kinds = (VM, QUEUED) if self.kind == QUEUED else (self.kind,)
        zone = "--zones" if self.kind == INSTANCE else "--zone"
        return [["gcloud", *_NOUNS[kind], "list", zone, self.zone, "--format", "json"] for kind in kinds]

    def _like(self, name: str) -> list[str]:
        """What a new one is."""
        if self.kind == INSTANCE:
            machine = instance_machine(self.accelerator_type, self.runtime_version)
            image = ["--image-family", str(machine.image_family), "--image-project", IMAGE_PROJECT]
            # cloud-platform: what instances may do by default is to read buckets, not to write to them.
            further = ["--boot-disk-size", BOOT_DISK, "--scopes", "cloud-platform"]
            return [
                "--machine-type",
                machine.machine_type,
                *image,
                *further,
                "--maintenance-policy",
                "TERMINATE",
            ]
        version = self.runtime_version or runtime_version(self.accelerator_type, self.kind)
        accelerator = ["--accelerator-type", self.accelerator_type]
        if self.kind == QUEUED:
            return ["--node-id", name, *accelerator, "--runtime-version", version]
        return [*accelerator, "--version", version]

    def _price(self) -> list[str]:
        if self.on_demand:
            return []
        if self.kind == INSTANCE:
            # One that is stopped instead would keep its name, and its disk would go on costing.
            return ["--provisioning-model", "SPOT", "--instance-termination-action", "DELETE"]
        return ["--spot"]

    def _remote_command(self, worker: int, environment: Mapping[str, str]) -> str:
        folder = shlex.quote(self.remote_dir)
        steps = []
        if self.code_url is not None:
            # Into a folder beside it first: what is cut off must not look like a checkout.
            new = shlex.quote(f"{self.remote_dir}.new")
            fetch = f"gcloud storage cat {shlex.quote(self.code_url)} | tar -xz -C {new}"
            unpack = f"{{ rm -rf {new} && mkdir -p {new} && {fetch} && mv -T {new} {folder}; }}"
            steps.append(f"{{ [ -e {folder}/launch_worker.sh ] || {unpack}; }}")
        # INSTALL_PYTHON: the Python of TPU images is older than ours.
        own = {"TPU_WORKER_ID": str(worker), "UPLOAD_TO_GCS": "true", "INSTALL_PYTHON": "true"}
        variables = own | settings_of(environment, without=SECRETS)
        exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
        steps.append(f"cd {folder}")
        if self.streams_url is not None:
            stream = Path(environment.get("DATASET_DIR") or "data/streams") / stream_name(worker)
            url = shlex.quote(f"{self.streams_url.rstrip('/')}/{stream.name}")
            there, parent = shlex.quote(str(stream)), shlex.quote(str(stream.parent))
            copy = f"gcloud storage cp {url} {there}"
            steps += [f"mkdir -p {parent}", f"{{ [ -e {there} ] || {copy}; }}"]
        for name in SECRETS:
            if environment.get(name):
                # From the input of ssh: an argument stands in every list of processes, here and there.
                steps.append(f"IFS= read -r {name} && export {name}")
        # ls: says so where the script is missing; what runs in the background could not.
        steps += ["ls launch_worker.sh > /dev/null", "mkdir -p logs", f"export {exports}"]
        # >>: a second start must not empty the log of a worker that runs.
        start = f"nohup ./launch_worker.sh >> logs/worker_{worker}.log 2>&1 < /dev/null"
        return " && ".join([*steps, f"{{ {start} & }}"])


class FirstAlone:
    """Calls gcloud, many at once, but none before a first one has succeeded: the first ssh makes the key that all
    use, and several first ones would each make it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._has_succeeded = False

    def __call__(self, command: Sequence[str], given: str = "") -> str:
        """As `call`."""
        with self._lock:
            if not self._has_succeeded:
                said = call(command, given=given)
                self._has_succeeded = True
                return said
        return call(command, given=given)


def runtime_version(accelerator_type: str, kind: str) -> str:
    """Of the Cloud TPU API's VMs; raises UsageError where that has no such machine."""
    found = cloud_tpu(accelerator_type).runtime_version
    if found is None:
        raise UsageError(f"--create {kind}: there is {accelerator_type} with --create {INSTANCE} only")
    return found


def instance_machine(accelerator_type: str, version: str | None) -> CloudTpu:
    """Of Compute Engine; raises UsageError where that has no such machine."""
    machine = cloud_tpu(accelerator_type)
    if machine.image_family is None:
        raise UsageError(
            f"--create {INSTANCE}: there is {accelerator_type} with --create {VM} and {QUEUED} only"
        )
    if version is not None:
        raise UsageError(
            f"--runtime_version does not go with --create {INSTANCE}, which has an image; leave it out"
        )
    return machine


def machine_states(vms: Vms) -> dict[str, tuple[str, str]]:
    """Name -> (one of our states, gcloud's word). What is not there is not in it. Raises CommandError."""
    answers = [_parse_list(call(command)) for command in vms.list_commands()]
    key = "status" if vms.kind == INSTANCE else "state"
    nodes = {_name(entry): str(entry.get(key)) for entry in answers[0]}
    if vms.kind != QUEUED:
        return {name: (_state(word, _READY[vms.kind]), word) for name, word in nodes.items()}
    found = {}
    for entry in answers[1]:
        state = entry.get("state")
        word = str(state.get("state")) if isinstance(state, dict) else str(state)
        name = _name(entry)
        if word == "ACTIVE" and nodes.get(name) in (None, *_LOST):
            found[name] = (LOST, f"ACTIVE without its VM ({nodes.get(name, 'vanished')})")
        else:
            found[name] = (_state(word, _READY[QUEUED]), word)
    return found


class Machines(Protocol):
    """What a supervisor needs of a cloud (Cloud): each method raises CommandError where it cannot."""

    def name(self, worker: int) -> str: ...
    def machines(self) -> dict[str, tuple[str, str]]: ...
    def documents(self, name: str) -> dict[int, dict[str, Any]]: ...
    def start(self, worker: int) -> None: ...
    def create(self, worker: int) -> None: ...
    def delete(self, worker: int) -> None: ...


@dataclass
class Cloud:
    """The supervisor's Google Cloud."""

    vms: Vms
    environment: Mapping[str, str]
    _ssh: FirstAlone = field(default_factory=FirstAlone)

    def name(self, worker: int) -> str:
        return self.vms.name(worker)

    def machines(self) -> dict[str, tuple[str, str]]:
        return machine_states(self.vms)

    def documents(self, name: str) -> dict[int, dict[str, Any]]:
        """As `read_documents`, of the bucket that the workers upload to."""
        bucket, prefix = self.environment["GCS_BUCKET"], self.environment.get("GCS_PREFIX") or "activations"
        return read_documents(bucket, prefix, name)

    def start(self, worker: int) -> None:
        self._ssh(self.vms.start_command(worker, self.environment), secrets_of(self.environment))

    def create(self, worker: int) -> None:
        call(self.vms.create_command(worker))

    def delete(self, worker: int) -> None:
        call(self.vms.delete_command(worker))


def _parse_list(text: str) -> list[dict[str, Any]]:
    try:
        entries = json.loads(text or "[]")
    except ValueError as error:
        raise CommandError(f"its list is not whole: {error}") from error
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and "name" in entry for entry in entries
    ):
        raise CommandError("its list is not one of machines with names")
    return entries


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry["name"]).rpartition("/")[2]


def _state(word: str, ready: str) -> str:
    """Waiting is all that will change by itself, or that somebody wanted so."""
    return READY if word == ready else LOST if word in _LOST else WAITING


def read_documents(bucket: str, prefix: str, name: str) -> dict[int, dict[str, Any]]:
    """worker_id -> content of each `tpu_*/name` in the bucket (a pattern), torn ones left out. Raises CommandError.

    With gcloud alone, so that a control machine needs no packages. Asks twice: it lists the objects before it reads
    them, and fails where one of them has been replaced in between.
    """
    parts = [
        bucket.rstrip("/"),
        *([prefix.strip("/")] if prefix.strip("/") else []),
        bucket_folder("*"),
        name,
    ]
    url = "/".join(parts)
    command = ["gcloud", "storage", "cat", "--display-url", url if "://" in url else f"gs://{url}"]
    with suppress(CommandError):
        return _documents(_cat(command))
    return _documents(_cat(command))


def _cat(command: list[str]) -> str:
    try:
        return call(command)
    except CommandError as error:
        if _NOTHING_THERE not in str(error):
            raise
        return ""


def _documents(text: str) -> dict[int, dict[str, Any]]:
    """JSON objects one after another; each of ours begins with its worker_id. Above each stands where it lies: one
    that lies in another worker's folder is not this worker's."""
    found, end = {}, 0
    for match in re.finditer(r'\{\s*"worker_id"', text):
        if match.start() < end:
            continue
        folders = re.findall(_FOLDER, text[end : match.start()])
        try:
            _, end = json.JSONDecoder().raw_decode(text, match.start())
            document = parse_json(text[match.start() : end].encode())
        except (ValueError, RecursionError):
            continue
        worker = document.get("worker_id")
        if type(worker) is int and folders[-1:] in ([], [str(worker)]):
            found[worker] = document
    return found
