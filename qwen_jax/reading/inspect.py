"""What is in a run or a shard, in lines for a person."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qwen_jax.errors import UsageError
from qwen_jax.reading.runs import Run
from qwen_jax.reading.samples import Layer, shard_samples
from qwen_jax.roles import role_name
from qwen_jax.shards import EMBEDDING, KIND_KEYS, load_shard


def describe(run: Run) -> Iterator[str]:
    """Model, layers, samples, tokens, dtype and size of a run, or of a shard without metadata.json."""
    if run.metadata is None:
        yield from (line for name in run.shards for line in _describe_shard(run, name))
        return
    metadata, totals = run.metadata, run.metadata["totals"]
    print_kinds = ", ".join(metadata["activation_types"])
    yield f"{run.where}: worker {metadata['worker_id']}, {metadata['status']}"
    yield f"  model    {metadata['model']['name']}, revision {metadata['model']['revision'] or 'local folder'}"
    yield f"  layers   {_ranges(metadata['layers'])} of {metadata['model']['num_layers']}: {print_kinds}"
    yield f"  values   {metadata['activation_dtype']}, width {metadata['model']['hidden_size']}"
    yield f"  tokens   {totals['tokens']:,} kept ({metadata['fingerprint']['keep_tokens']})"
    yield (
        f"  samples  {totals['samples']:,} stored, {totals['skipped']:,} skipped, {totals['truncated']:,} cut, "
        f"{totals['shortened']:,} shortened, of {metadata['dataset']['lines']:,} in {metadata['dataset']['path']}"
    )
    raw, size = totals["raw_bytes"], totals["bytes"]
    yield f"  size     {raw / 1e9:.3f} GB, {size / 1e9:.3f} GB compressed, in {totals['shards']} shards"


def _describe_shard(run: Run, name: str) -> Iterator[str]:
    with run.place.local(name) as path:
        shard = load_shard(path)
    first = next(iter(shard.values()))
    raw = sum(record["activation"].nbytes for records in shard.values() for record in records)
    layers = [layer for layer in shard if layer != EMBEDDING]
    besides = [*(key for key in KIND_KEYS if key in first[0]), *([EMBEDDING] if EMBEDDING in shard else [])]
    yield f"{run.where}/{name}"
    yield f"  layers   {_ranges(layers)}{''.join(f', {name}' for name in besides)}"
    yield f"  values   {first[0]['activation'].dtype}, width {first[0]['activation'].shape[1]}"
    yield (
        f"  samples  {len(first)}, {first[0]['sample_idx']} to {first[-1]['sample_idx']}; "
        f"{sum(len(record['token_ids']) for record in first):,} tokens; {raw / 1e9:.3f} GB"
    )


def _ranges(layers: Sequence[int]) -> str:
    """`0-3, 7`."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1] = [parts[-1][0], layer]
        else:
            parts.append([layer])
    return ", ".join("-".join(map(str, part)) for part in parts)


def find_sample(runs: Sequence[Run], sample_idx: int, layer: Layer) -> tuple[Run, dict[str, Any]]:
    """The sample and its run; raises UsageError if none of `runs` has it, or several have."""
    found = [
        (run, sample)
        for run in runs
        for name in _shards_with(run, sample_idx)
        for sample in shard_samples(run, name, [layer])
        if sample["sample_idx"] == sample_idx
    ]
    if len(found) != 1:
        where = ", ".join(run.where for run, _ in found) or "no shard"
        raise UsageError(f"sample {sample_idx} is in {where}; name the folder of one worker that stores it")
    return found[0]


def _shards_with(run: Run, sample_idx: int) -> list[str]:
    if run.metadata is None:
        return run.shards
    return [
        entry["filename"]
        for entry in run.metadata["shards"]
        if entry["first_sample_idx"] <= sample_idx <= entry["last_sample_idx"]
    ]


def token_table(sample: dict[str, Any], layer: Layer, tokenizer: Any = None) -> Iterator[str]:
    """One line a kept token: position, id, text (with a tokenizer), role, cell, norm."""
    tokens = sample["token_ids"]
    positions = sample.get("token_positions", np.arange(len(tokens)))
    roles = (
        [role_name(int(code)) for code in sample["token_roles"]]
        if "token_roles" in sample
        else [""] * len(tokens)
    )
    cells = sample.get("token_cells", np.full((len(tokens), 4), -1))
    norms = np.linalg.norm(sample["activations"][layer].astype(np.float32), axis=1)
    texts = [repr(tokenizer.decode([int(token)])) if tokenizer else "" for token in tokens]
    yield f"sample {sample['sample_idx']}, task {sample['task_id']}, layer {layer}, {len(tokens)} tokens"
    yield f"{'place':>6} {'id':>7}  {'text':<16} {'role':<18} {'grid row col colour':<20} norm"
    for place, token, text, role, cell, norm in zip(
        positions, tokens, texts, roles, cells, norms, strict=True
    ):
        shown = "{:>4} {:>3} {:>3} {:>6}".format(*cell) if cell[0] >= 0 else ""
        yield f"{place:>6} {token:>7}  {text:<16} {role:<18} {shown:<20} {norm:.4g}"
