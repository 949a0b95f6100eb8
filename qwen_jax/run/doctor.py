"""Looks whether a worker would run here, before it is started: each check gives one line, and what to do."""

import importlib.util
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path

from qwen_jax.data.arc import BadRecord
from qwen_jax.data.streams import read_stream, stream_summary
from qwen_jax.errors import BadDataError, ConfigError, StorageError, ToolkitError, first_line
from qwen_jax.files import storage_errors
from qwen_jax.ledger.checkpoint import CheckpointRecord, parse_checkpoint
from qwen_jax.ledger.checks import DamagedError
from qwen_jax.ledger.names import METADATA_NAME, SHARD_PREFIX
from qwen_jax.model.source import fetch_model
from qwen_jax.run.background import SHARDS_ON_DISK
from qwen_jax.run.cache import why_not_used
from qwen_jax.run.fingerprint import check_fingerprint
from qwen_jax.settings import Settings
from qwen_jax.storage.opening import open_store
from qwen_jax.storage.store import PreconditionFailedError, Store

PASS, NOTE, FAIL = "pass", "note", "fail"
PACKAGES = (
    *("jax", "flax", "transformers", "jinja2", "datasets", "google.cloud.storage", "numpy", "tqdm", "isal"),
    *("safetensors", "ml_dtypes", "huggingface_hub", "google_crc32c"),
)
_PLANNED_LINES = 200
_SKEW_NOTE_S, _SKEW_FAIL_S = 30.0, 300.0
_ANSWER_S, _BUDGET_S = 5.0, 20.0
"""A person waits: less than a worker's patience."""


class Remark(Exception):
    """Nothing that stops a run, but something to know."""


@dataclass(frozen=True)
class Finding:
    """What a check saw. error: what a worker would end with for it; None unless `outcome` is FAIL."""

    check: str
    outcome: str
    text: str
    error: ToolkitError | None = None

    def __str__(self) -> str:
        return f"{self.outcome}  {self.check:<11} {self.text}"


Check = Callable[[Settings], str]
"""Returns what is well; raises ToolkitError for what is not, Remark for a note."""


def examine(settings: Settings, *, quick: bool = False) -> Iterator[Finding]:
    """Every check in order, or those that need neither jax nor the network. A check that fails stops no other; what
    several fail by is said once."""
    failures: dict[str, str] = {}
    for name, check in (QUICK if quick else THOROUGH).items():
        try:
            yield Finding(name, PASS, check(settings))
        except Remark as remark:
            yield Finding(name, NOTE, str(remark))
        except ToolkitError as error:
            if str(error) in failures:
                yield Finding(name, NOTE, f"not checked, for what is wrong with {failures[str(error)]}")
                continue
            failures[str(error)] = name
            yield Finding(name, FAIL, str(error), error)


def _python(settings: Settings) -> str:
    missing = [name for name in PACKAGES if not _is_installed(name)]
    if missing:
        raise ConfigError(f"missing packages: {', '.join(missing)}; pip install -r requirements.txt")
    return f"{sys.version.split()[0]} with all packages"


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _stream_begins(settings: Settings) -> str:
    limit, path = settings.max_bad_records, settings.stream_path
    lines = [
        record for _, record in islice(read_stream(path), min(limit + 1, settings.max_samples or limit + 1))
    ]
    if not lines:
        raise Remark(f"{path} is empty: nothing to do")
    bad = [record for record in lines if isinstance(record, BadRecord)]
    if len(bad) > limit:
        raise BadDataError(
            f"{path}: its first {len(bad)} lines are bad, more than --max_bad_records {limit}; line 1: {bad[0]}"
        )
    if bad and bad[0] is lines[0]:
        raise Remark(f"{path}: line 1 is bad: {bad[0]}")
    return f"{path} can be read"


def _folders(settings: Settings) -> str:
    folders = {settings.worker_dir, settings.compilation_cache_dir}
    if not settings.no_checkpointing:
        folders.add(settings.checkpoint_dir)
    for folder in sorted(folders):
        with storage_errors("write in", folder):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".doctor-{uuid.uuid4().hex}"
            probe.write_bytes(b"x")
            probe.unlink()
    obstacle = why_not_used(settings.compilation_cache_dir)
    if obstacle is not None:
        raise Remark(f"compiled programs will not be kept in {settings.compilation_cache_dir}: {obstacle}")
    return f"can write in {', '.join(map(str, sorted(folders)))}"


def _model_folder(settings: Settings) -> str:
    """As far as it can be looked at without jax and the network."""
    folder = Path(settings.model_path).expanduser()
    if not folder.is_dir() and not settings.model_path.startswith((".", "/", "~")):
        return f"{settings.model_path} comes from the Hugging Face Hub"
    fetch_model(settings.model_path, settings.revision)  # complains of a folder that is not there
    names = ("config.json", "tokenizer.json")
    missing = [name for name in names if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.append("weights (*.safetensors)")
    if missing:
        raise ConfigError(f"{folder} lacks {' and '.join(missing)}; give a complete checkpoint")
    for name in names:
        _read_json(folder / name)
    return f"{folder} is a model's folder"


def _read_json(path: Path) -> None:
    """Raises ConfigError for what is torn."""
    with storage_errors("read", path):
        data = path.read_bytes()
    try:
        json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}); fetch the model again") from error


def _parsed(data: bytes, settings: Settings) -> CheckpointRecord:
    """Raises Remark for a damaged checkpoint that may be rebuilt, ConfigError for one that cannot."""
    try:
        return parse_checkpoint(data)
    except DamagedError as error:
        if settings.bucket_url is None and not (settings.worker_dir / METADATA_NAME).is_file():
            raise ConfigError(
                f"the checkpoint is damaged ({error}), and there is no {METADATA_NAME} to rebuild it from; "
                "restore one of them, or pass --force_restart to overwrite it all"
            ) from error
        raise Remark(f"the checkpoint is damaged ({error}); the worker rebuilds it") from error


def _checkpoint(settings: Settings) -> str:
    """The one here and the bucket's are this worker's, of a run with these settings."""
    found = [] if settings.force_restart else [*_checkpoints(settings)]
    if not found:
        return "none to go on from: a new run"
    from qwen_jax.run.job import make_fingerprint, prepare

    ours = {"worker_id": settings.worker_id, **make_fingerprint(prepare(settings))}
    for source, data in found:
        record = _parsed(data, settings)
        check_fingerprint({"worker_id": record.worker_id, **record.fingerprint}, ours, source)
    return f"goes on after {record.total_shards} shards"


def _checkpoints(settings: Settings) -> Iterator[tuple[str, bytes]]:
    """What to call each, and its content."""
    path = settings.checkpoint_path
    if path is not None and path.is_file():
        with storage_errors("read", path):
            yield f"the checkpoint {path}", path.read_bytes()
    if settings.bucket_url is not None and (stored := _store(settings).get_bytes(settings.checkpoint_name)):
        yield f"the checkpoint in {settings.bucket_url}", stored[0]


def _store(settings: Settings) -> Store:
    assert settings.bucket_url is not None
    return open_store(settings.bucket_url, budget_s=min(settings.gcs_retry_budget_s, _BUDGET_S))


def _devices(settings: Settings) -> str:
    import jax

    from qwen_jax.run.devices import find_devices

    devices = find_devices()
    return f"jax {jax.__version__}: {len(devices)} x {devices[0].device_kind}"


def _stream(settings: Settings) -> str:
    return f"{settings.stream_path}: {stream_summary(settings.stream_path).lines:,} lines"


def _model(settings: Settings) -> str:
    from qwen_jax.data.prompts import load_tokenizer
    from qwen_jax.run.job import prepare

    job = prepare(settings)
    load_tokenizer(str(job.source.folder))
    return (
        f"{settings.model_path}: {job.config.num_layers} layers, width {job.config.hidden_size}, {job.dtype}"
    )


def _self_check(settings: Settings) -> str:
    from qwen_jax.run.device_check import COMMAND, checked
    from qwen_jax.run.job import prepare
    from qwen_jax.run.written_by import DEVICE_CHECK, FAILED, written_by

    job = prepare(settings)
    devices = list(job.step.mesh.devices.flat)
    if devices[0].platform == "cpu":
        return f"not made on a CPU; {COMMAND} makes it"
    writer = checked(job, written_by(devices, settings.compilation_cache_dir), {})
    text = f"{writer['device_kind']}: {writer[DEVICE_CHECK]}"
    if writer[DEVICE_CHECK] == FAILED:
        raise ToolkitError(f"{text}; {COMMAND} says what differs: do not trust values from here")
    return text


def _disk(settings: Settings) -> str:
    from qwen_jax.run.plan import Assumptions, make_plan

    plan = make_plan(settings, Assumptions(plan_samples=_PLANNED_LINES))
    needed, what = plan.compressed_bytes, "what is left of the run"
    if settings.bucket_url and settings.delete_local_after_upload:
        needed, what = SHARDS_ON_DISK * settings.shard_bytes, "the shards on their way to the bucket"
    else:
        needed = max(
            needed - sum(path.stat().st_size for path in settings.worker_dir.glob(f"{SHARD_PREFIX}*")), 0
        )
    there = next(
        folder for folder in (settings.worker_dir, *settings.worker_dir.absolute().parents) if folder.exists()
    )
    free = shutil.disk_usage(there).free
    text = f"{free / 1e9:,.1f} GB free, {what} needs about {needed / 1e9:,.1f} GB"
    if free < needed:
        raise StorageError(
            f"{text} in {settings.worker_dir}; free some space, or upload with --delete_local_after_upload"
        )
    return text


def _credentials(settings: Settings) -> str:
    if settings.bucket_url is None or not settings.bucket_url.startswith("gs://"):
        raise Remark("no Cloud Storage bucket: none needed")
    _store(settings)  # complains where there are none
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return "an emulator of Cloud Storage needs none"
    import google.auth
    import google.auth.exceptions
    from google.auth.transport.requests import Request

    try:
        found, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/devstorage.read_write"])
        found.refresh(Request())
    except google.auth.exceptions.GoogleAuthError as error:
        raise StorageError(
            f"the login is refused ({first_line(error)}); gcloud auth application-default login"
        ) from error
    return f"logged in as {getattr(found, 'service_account_email', '') or 'a user'}"


def _bucket(settings: Settings) -> str:
    if settings.bucket_url is None:
        raise Remark("none: shards stay on this machine (--upload_to_gcs)")
    store, name = _store(settings), f"doctor-{uuid.uuid4().hex}"
    store.put_bytes(name, b"x", if_generation=0)
    try:
        store.put_bytes(name, b"y", if_generation=0)
    except PreconditionFailedError:
        refused = True
    else:
        refused = False
    store.delete(name)
    if not refused:
        raise ConfigError(
            f"{settings.bucket_url} overwrote an object that it was told not to; use another bucket"
        )
    return f"{settings.bucket_url}: writes, refuses to overwrite, deletes"


def _region(settings: Settings) -> str:
    if settings.bucket_url is None or not settings.bucket_url.startswith("gs://"):
        raise Remark("no Cloud Storage bucket to compare with")
    from qwen_jax.storage.gcs import GcsStore

    store = _store(settings)
    assert isinstance(store, GcsStore)
    try:
        region = store.location()
    except StorageError as error:
        raise Remark(f"the bucket does not say where it is (needs storage.buckets.get): {error}") from error
    zone = _this_machines_zone()
    if zone is None:
        raise Remark(f"the bucket is in {region}; this is no Google Cloud VM")
    if zone.rpartition("-")[0] != region and not zone.startswith(f"{region}-"):
        raise Remark(f"the bucket is in {region}, this VM in {zone}: uploads are slower and cost egress")
    return f"bucket in {region}, VM in {zone}"


def _this_machines_zone() -> str | None:
    """From Google's metadata server; None elsewhere."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/zone"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=_ANSWER_S
        ) as answer:
            return answer.read().decode().rpartition("/")[2]
    except OSError:
        return None


def _clock(settings: Settings) -> str:
    if not (settings.bucket_url or "").startswith("gs://"):
        raise Remark("no Cloud Storage to compare with")
    url = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_S) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:  # any answer has the time
        date = error.headers["Date"]
    except OSError as error:
        raise StorageError(f"{url} does not answer: {error}; check the network") from error
    try:
        skew = time.time() - parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError) as error:
        raise Remark(f"{url} does not say what time it is") from error
    text = f"this clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}"
    if abs(skew) > _SKEW_FAIL_S:
        raise ConfigError(f"{text}: logins will be refused; set the clock (timedatectl set-ntp true)")
    if abs(skew) > _SKEW_NOTE_S:
        raise Remark(f"{text}; set it (timedatectl set-ntp true)")
    return text


QUICK: dict[str, Check] = {
    "python": _python,
    "stream": _stream_begins,
    "model": _model_folder,
}
THOROUGH: dict[str, Check] = {
    "python": _python,
    "stream": _stream,
    "folders": _folders,
    "devices": _devices,
    "model": _model,
    "self-check": _self_check,
    "disk": _disk,
    "credentials": _credentials,
    "bucket": _bucket,
    "checkpoint": _checkpoint,
    "region": _region,
    "clock": _clock,
}
