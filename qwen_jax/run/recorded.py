"""A run's settings, read back from its metadata.json: to compute some of its samples again."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_jax import __version__
from qwen_jax.cli import non_negative_float, non_negative_int, positive_float, positive_int
from qwen_jax.errors import ConfigError
from qwen_jax.ledger.checks import (
    Check,
    DamagedError,
    distinct,
    list_of,
    number,
    or_null,
    record,
    text,
    whole,
    yes_or_no,
)
from qwen_jax.ledger.names import METADATA_NAME
from qwen_jax.run.devices import find_devices
from qwen_jax.run.fingerprint import check_fingerprint
from qwen_jax.run.job import Job, make_fingerprint, prepare
from qwen_jax.settings import AUTO, BYTES, ENTRIES, HOW, Entry, Settings, length_or_auto, recalled

_REFERENCE_BATCH = 8
_MOST = 10**6
_NAME = text(r"[^\0]*")


def _check_of(entry: Entry) -> Check:
    """Of a setting as metadata.json has it (settings.recorded)."""
    if isinstance(entry.default, bool):
        return yes_or_no
    if entry.read in (int, positive_int, non_negative_int, length_or_auto):
        least = entry.read in (positive_int, length_or_auto)
        check = distinct(whole(most=_MOST)) if entry.many else whole(least, _MOST)
    elif entry.read in (positive_float, non_negative_float):
        check = number(0)
    elif entry.choices and not entry.many:
        check = _chosen(entry.choices())
    else:
        check = text(r"[a-z_]+( [a-z_]+)*" if entry.many else None)
    return or_null(check) if entry.default is None and not entry.many else check


def _chosen(choices: Sequence[str]) -> Check:
    def check(value: object, name: str) -> None:
        text()(value, name)
        if value == AUTO or value not in choices:
            raise DamagedError(f"{name} is none of {', '.join(each for each in choices if each != AUTO)}")

    return check


def _checks(where: str) -> Check:
    recorded = [(entry.key or name, entry) for name, entry in ENTRIES.items() if entry.recorded == where]
    always, if_set = (
        {key: _check_of(entry) for key, entry in recorded if entry.if_set == each} for each in (False, True)
    )
    return record(always, optional=if_set, others=None)


_RECORDED = record(
    {
        "worker_id": whole(),
        "model": record(
            {"name": _NAME, "revision": _NAME}, optional={"adapter": _NAME, "adapter_revision": _NAME}
        ),
        "dataset": record({"path": _NAME}),
        "skipped": list_of(record({}, others=None)),
        "fingerprint": _checks(BYTES),
        "settings": _checks(HOW),
    },
    others=None,
)
"""metadata.json as far as it says how to make the run's samples again."""


def recorded_settings(
    metadata: dict[str, Any],
    model_path: str | None,
    dataset_path: str | None,
    adapter_path: str | None = None,
) -> Settings:
    """The settings of the run that wrote `metadata`; paths as given, else as they were then.

    Raises ConfigError where they are not all recorded.
    """
    try:
        _RECORDED(metadata, "")
    except DamagedError as error:
        writer = metadata.get("written_by", {}).get("toolkit", "0.1.0 or before")
        raise ConfigError(
            f"{METADATA_NAME} does not record a whole run: {error}; it was written by toolkit {writer}, this is "
            f"{__version__}: use the one that wrote it"
        ) from error
    return Settings(
        **recalled(metadata["fingerprint"], BYTES),
        **recalled(metadata["settings"], HOW),
        worker_id=metadata["worker_id"],
        dataset_path=Path(dataset_path or metadata["dataset"]["path"]),
        model_path=model_path or metadata["model"]["name"],
        revision=None if model_path else metadata["model"]["revision"],
        adapter_path=adapter_path or _adapter_of(metadata["model"]),
        no_checkpointing=True,
        max_bad_records=len(metadata["skipped"]),
    )


def _adapter_of(model: dict[str, Any]) -> str | None:
    """As --adapter_path takes it; None where the run had none."""
    name, revision = model.get("adapter"), model.get("adapter_revision")
    return f"{name}@{revision}" if name and revision else name


def recorded_job(
    metadata: dict[str, Any],
    model_path: str | None,
    dataset_path: str | None,
    adapter_path: str | None = None,
) -> Job:
    """The same run once more, for the same bytes: model, stream and tokenizer are those of `metadata`, and this
    machine can compute as the run did, or ConfigError says what differs."""
    return _job(metadata, recorded_settings(metadata, model_path, dataset_path, adapter_path))


def reference_job(
    metadata: dict[str, Any],
    model_path: str | None,
    dataset_path: str | None,
    adapter_path: str | None = None,
) -> Job:
    """The same samples once more, on any machine, for a float32 reference that is exact however it is computed.

    So no fused kernel, and the weights are shared over several devices only where this machine has as many.
    Raises ConfigError where model, stream or tokenizer are not those of `metadata`.
    """
    settings = recorded_settings(metadata, model_path, dataset_path, adapter_path)
    parts = 1 if len(find_devices()) % settings.model_parallel else settings.model_parallel
    few = min(settings.batch_size, _REFERENCE_BATCH)
    return _job(metadata, replace(settings, attention="blocked", model_parallel=parts, batch_size=few))


def _job(metadata: dict[str, Any], settings: Settings) -> Job:
    job = prepare(settings)
    check_fingerprint(metadata["fingerprint"], make_fingerprint(job), METADATA_NAME)
    return job
