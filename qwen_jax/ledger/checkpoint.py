"""What a checkpoint holds: how far a run is, for people and for the next start (Ledger.checkpoint makes it)."""

from dataclasses import dataclass
from typing import Any

from qwen_jax.ledger.checks import DamagedError, parse
from qwen_jax.ledger.schema import CHECKPOINT, IN_PROGRESS, SEEN_CHECKPOINT


@dataclass(frozen=True)
class CheckpointRecord:
    """What a stored checkpoint claims."""

    worker_id: int
    total_shards: int
    last_processed_sample_idx: int
    status: str
    fingerprint: dict[str, Any]


def parse_checkpoint(data: bytes) -> CheckpointRecord:
    """Reads a checkpoint file; raises DamagedError for anything that no run of ours wrote."""
    fields = parse(data, CHECKPOINT)
    return CheckpointRecord(**{name: fields[name] for name in CheckpointRecord.__dataclass_fields__})


@dataclass(frozen=True)
class SeenCheckpoint:
    """What those who watch take of a checkpoint. samples: stream lines dealt with."""

    samples: int
    shards: int
    status: str


def seen_checkpoint(data: bytes, worker_id: int) -> SeenCheckpoint:
    """The guide's keys alone; raises DamagedError for what this worker does not write."""
    fields = parse(data, SEEN_CHECKPOINT)
    if fields.get("worker_id", worker_id) != worker_id:
        raise DamagedError(f"worker_id is {fields['worker_id']}, not {worker_id}")
    return SeenCheckpoint(
        fields["total_samples_processed"], fields["total_shards"], fields.get("status", IN_PROGRESS)
    )
