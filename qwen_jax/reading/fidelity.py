"""What certify needs of a run: some of its stored samples, and a place for the result."""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np

from qwen_jax.ledger.names import METADATA_NAME
from qwen_jax.ledger.schema import COMPLETED
from qwen_jax.reading.runs import DescribedRun
from qwen_jax.reading.samples import listed_shard
from qwen_jax.shards import EMBEDDING, record_keys


def drawn_samples(run: DescribedRun, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """At most `count` stored samples in order, drawn by `seed` from all of the run's; one shard is in memory at a time.

    A sample: `sample_idx`, `token_ids` and `kinds`, `{kind: {layer: [n, hidden] in the stored dtype}}`; the embedding
    stands under `{"embedding": {"embedding": ...}}`.
    """
    counts = [run.entries[name]["samples"] for name in run.shards]
    ends = list(accumulate(counts))
    drawn = np.random.default_rng(seed).choice(ends[-1], min(count, ends[-1]), replace=False)
    for name, count_here, end in zip(run.shards, counts, ends, strict=True):
        first = end - count_here
        chosen = sorted(int(index - first) for index in drawn if first <= index < end)
        if chosen:
            shard = listed_shard(run, name)
            yield from (_sample(shard, run.kinds, index) for index in chosen)


def _sample(shard: dict, kinds: list[str], index: int) -> dict[str, Any]:
    records = {layer: shard[layer][index] for layer in shard}
    first = next(iter(records.values()))
    of_kind = {
        kind: {layer: record[key] for layer, record in records.items() if layer != EMBEDDING}
        for kind, key in record_keys(kinds).items()
    }
    if EMBEDDING in records:
        of_kind[EMBEDDING] = {EMBEDDING: records[EMBEDDING]["activation"]}
    about = {key: first[key] for key in ("sample_idx", "token_ids", "answer_token_ids") if key in first}
    return {**about, "kinds": of_kind}


def why_not_recorded(run: DescribedRun) -> str | None:
    """Why metadata.json cannot take the fidelity of what was looked at; None where it can."""
    if run.ledger.status != COMPLETED:
        return "the run is unfinished, so metadata.json is its worker's to write"
    if run.is_part:
        return "this is one shard, and metadata.json speaks of the whole run"
    return None


def record_fidelity(run: DescribedRun, record: dict[str, Any]) -> None:
    """Puts `record` (run.certify.certify) into the run's metadata.json under `fidelity`; the rest stays as it is."""
    from qwen_jax.storage.atomic import json_bytes

    run.files.replace(METADATA_NAME, json_bytes({**run.metadata, "fidelity": record}))
