"""A made-up fleet: checkpoints, progress records and metadata as workers leave them."""

import json
from pathlib import Path

from qwen_jax.ledger.names import progress_name
from qwen_jax.ledger.progress_record import ProgressRecord
from qwen_jax.ledger.schema import ENDED, FAILED, RUNNING

NOW = 1_800_000_000.0
TOTAL = 6250


def record(worker: int, *, pace: float = 1.0, **changes) -> ProgressRecord:
    """A worker two hours into its run; healthy, or at `pace` times a healthy one's speed."""
    speed = round(pace * (900 + 10 * worker))
    done = round(pace * (2000 + 60 * worker))
    history = [[NOW - 7200 + 60 * n, done * n // 120, float(speed * 60 * n)] for n in range(121)][1:]
    made = ProgressRecord(
        worker,
        RUNNING,
        samples_done=done,
        samples_total=TOTAL,
        shards=12,
        tokens=speed * 7200,
        raw_bytes=10**9,
        started_at=NOW - 7200,
        updated_at=NOW - 20,
        last_shard_at=NOW - 300,
        history=history,
    )
    for key, value in changes.items():
        setattr(made, key, value)
    return made


def metadata(worker: int, layers: int = 24) -> dict:
    norms = {str(layer): {"norm_mean": 8.0 + layer**1.4 + 0.05 * worker} for layer in range(layers)}
    return {"totals": {"bytes": 9_400_000_000 + worker}, "statistics": {"residual": norms}}


def checkpoint(samples: int, shards: int, status: str = "in_progress") -> dict:
    return {"total_samples_processed": samples, "total_shards": shards, "status": status}


def put(root: Path, worker: int, seen: ProgressRecord | None, durable: dict | None) -> None:
    """Writes a worker's files below `root`: checkpoints/ and activations/."""
    (root / "checkpoints").mkdir(parents=True, exist_ok=True)
    folder = root / "activations" / f"worker_{worker}"
    folder.mkdir(parents=True, exist_ok=True)
    if seen is not None:
        (root / "checkpoints" / progress_name(worker)).write_bytes(seen.to_bytes())
    if durable is not None:
        (root / "checkpoints" / f"checkpoint_worker_{worker}.json").write_text(
            json.dumps({"worker_id": worker} | durable)
        )
        (folder / "metadata.json").write_text(json.dumps(metadata(worker)))


def make_fleet(root: Path) -> None:
    """32 workers: some done, a straggler, one failed, two stalled, one unreadable, two not started."""
    for worker in range(30):
        put(root, worker, record(worker), checkpoint(1900 + 60 * worker, 12))
    for worker in (3, 4, 9):
        done = record(worker, status=ENDED, samples_done=TOTAL)
        put(root, worker, done, checkpoint(TOTAL, 40, "completed"))
    put(root, 11, record(11, pace=0.09), checkpoint(200, 1))
    failed = record(7, status=FAILED, message="gs://bucket/activations/tpu_7: 403 <Forbidden> & no more")
    put(root, 7, failed, checkpoint(2100, 11))
    put(root, 17, record(17, updated_at=NOW - 5400), checkpoint(2900, 12))
    stuck = record(21)
    stuck.history = [
        [NOW - 7200 + 60 * n, min(stuck.samples_done, 60 * n), 1e5 * min(n, 60)] for n in range(1, 121)
    ]
    put(root, 21, stuck, checkpoint(3000, 12))
    (root / "checkpoints" / "checkpoint_worker_25.json").write_text('{"total_sam')
