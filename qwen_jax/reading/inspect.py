"""What is in a run or a shard, in lines for a person."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax.errors import UsageError
from qwen_jax.kinds import NOTES
from qwen_jax.ledger.metadata import row_widths
from qwen_jax.reading.runs import DescribedRun, Run, runs_with_layer, stored_layers
from qwen_jax.reading.samples import NOT_KNOWN, Layer, row_arrays, shard_samples
from qwen_jax.roles import role_name
from qwen_jax.shards import EMBEDDING, KIND_KEYS, load_shard, shard_layers, stored_bytes


def describe(runs: Sequence[Run]) -> Iterator[str]:
    """Model, layers, samples, tokens, dtype and size of runs and shards, and of several runs together."""
    for run in runs:
        if isinstance(run, DescribedRun) and not run.is_part:
            yield from _describe_run(run)
        else:
            for name in run.shards:
                yield from _describe_shard(run, name)
    whole = [run.ledger.totals() for run in runs if isinstance(run, DescribedRun) and not run.is_part]
    if len(whole) > 1:
        totals = {key: sum(each[key] for each in whole) for key in whole[0]}
        yield f"together: {len(whole)} workers"
        yield f"  tokens   {totals['tokens']:,} kept"
        yield f"  samples  {_samples(totals)}"
        yield f"  size     {_size(totals)}"


def _describe_run(run: DescribedRun) -> Iterator[str]:
    metadata, totals, fingerprint = run.metadata, run.ledger.totals(), run.metadata["fingerprint"]
    kinds = list(metadata["activation_types"])
    kinds += [EMBEDDING] if fingerprint["include_embedding"] else []
    kinds += ["log-probabilities of answers"] if fingerprint["include_answer"] else []
    kinds += ["answers of the model's own"] if fingerprint.get("rollout") else []
    yield f"{run.where}: worker {metadata['worker_id']}, {metadata['status']}"
    yield f"  model    {_model(metadata)}"
    yield f"  layers   {_ranges(metadata['layers'])} of {metadata['model']['num_layers']}: {', '.join(kinds)}"
    yield f"  values   {metadata['activation_dtype']}, width {_widths(metadata)}"
    yield from _losses(metadata["statistics"])
    yield f"  tokens   {totals['tokens']:,} kept ({fingerprint['keep_tokens']})"
    dataset = metadata["dataset"]
    yield f"  samples  {_samples(totals)}, of {dataset['lines']:,} in {dataset['path']}"
    yield f"  size     {_size(totals)}"


def _losses(statistics: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What quantising lost of each kind, in its worst layer."""
    for kind, layers in statistics.items():
        known = [layer for layer in layers.values() if {"relative_error", "cosine"} <= layer.keys()]
        if known:
            error = max(layer["relative_error"] for layer in known)
            cosine = min(layer["cosine"] for layer in known)
            yield f"  lost     of {kind} at most: relative error {error:.2g}, mean cosine {cosine:.7f}"


def _model(metadata: Mapping[str, Any]) -> str:
    return f"{metadata['model']['name']}, revision {metadata['model']['revision'] or 'local folder'}"


def _widths(metadata: Mapping[str, Any]) -> str:
    """One where all kinds have the same."""
    widths = row_widths(metadata)
    if len(set(widths.values())) == 1:
        return str(next(iter(widths.values())))
    return ", ".join(f"{width} ({kind})" for kind, width in widths.items())


def _samples(totals: Mapping[str, int]) -> str:
    return (
        f"{totals['samples']:,} stored, {totals['skipped']:,} skipped, {totals['truncated']:,} cut, "
        f"{totals['shortened']:,} shortened"
    )


def _size(totals: Mapping[str, int]) -> str:
    raw, size = totals["raw_bytes"], totals["bytes"]
    return f"{raw / 1e9:.3f} GB, {size / 1e9:.3f} GB compressed, in {totals['shards']} shards"


def _describe_shard(run: Run, name: str) -> Iterator[str]:
    """Of its layers the first is read: all have the same samples and shapes, but for the embedding."""
    with run.files.local(name, layers=()) as path:
        stored = shard_layers(path)
    read = {stored[0], *([EMBEDDING] if EMBEDDING in stored else [])}
    with run.files.local(name, read) as path:
        shard = load_shard(path, layers=read, name=f"{run.where}/{name}", raw=True)
    first, layers = shard[stored[0]], [layer for layer in stored if isinstance(layer, int)]
    raw = sum(
        (1 if layer == EMBEDDING else len(layers)) * stored_bytes(record)
        for layer, records in shard.items()
        for record in records
    )
    kinds = [key for key in KIND_KEYS if key in first[0]] or run.kinds
    besides = [EMBEDDING] if EMBEDDING in stored else []
    yield f"{run.where}/{name}"
    yield f"  model    {_model(run.metadata) if run.metadata else 'not known: there is no metadata.json beside it'}"
    yield f"  layers   {_ranges(layers)}: {', '.join([*kinds, *besides])}"
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


def find_sample(
    runs: Sequence[Run], sample_idx: int, layer: Layer | None = None, kind: str | None = None
) -> tuple[Run, dict[str, Any]]:
    """The sample, as iter_samples gives it with one layer (None: the first one stored), and its run.

    Raises UsageError if none of `runs` has it, or several have.
    """
    if layer is not None:
        runs = runs_with_layer(runs, layer)
    found = [
        (run, sample)
        for run in runs
        for name in _shards_with(run, sample_idx)
        for sample in shard_samples(run, name, [stored_layers(run)[0] if layer is None else layer], kind)
        if sample["sample_idx"] == sample_idx
    ]
    if not found and (notes := list(_skip_notes(runs, sample_idx))):
        raise UsageError(f"sample {sample_idx} was skipped: {'; '.join(notes)}")
    if len(found) != 1:
        where = ", ".join(run.where for run, _ in found) or "no shard"
        raise UsageError(f"sample {sample_idx} is in {where}; name the folder of one worker that stores it")
    return found[0]


def _skip_notes(runs: Sequence[Run], sample_idx: int) -> Iterator[str]:
    """Why the workers skipped the line, each with its name where there are several."""
    for run in runs:
        for note in run.ledger.skipped if run.ledger else ():
            if note["sample_idx"] == sample_idx:
                reason = note.get("reason", "no reason is recorded")
                yield reason if len(runs) == 1 else f"{reason} ({run.where})"


def _shards_with(run: Run, sample_idx: int) -> list[str]:
    def may_have(name: str) -> bool:
        entry = run.entry(name)
        return entry is None or entry["first_sample_idx"] <= sample_idx <= entry["last_sample_idx"]

    return list(filter(may_have, run.shards))


def _role(code: int) -> str:
    try:
        return "" if code == NOT_KNOWN else role_name(code)
    except ValueError:
        return f"no role: {code}"


def token_table(sample: dict[str, Any], tokenizer: Any = None) -> Iterator[str]:
    """One line a kept token of a sample with one layer: position, id, text (with a tokenizer), role, cell, norm; then
    the log-probabilities of the answer, where they are stored."""
    ((layer, activations),) = sample["activations"].items()
    rows = row_arrays(sample)
    tokens, positions, cells = rows["token_ids"], rows["token_positions"], rows["token_cells"]
    roles = [_role(int(code)) for code in rows["token_roles"]]
    norms = np.linalg.norm(activations.astype(np.float32), axis=1)
    texts = [repr(tokenizer.decode([int(token)])) if tokenizer else "" for token in tokens]
    yield f"sample {sample['sample_idx']}, task {sample['task_id']}, layer {layer}, {len(tokens)} tokens"
    yield from (f"{key}: {sample[key]}" for key in NOTES if key in sample)
    yield f"{'position':>6} {'id':>7}  {'text':<16} {'role':<18} {'grid row col colour':<20} norm"
    for position, token, text, role, cell, norm in zip(
        positions, tokens, texts, roles, cells, norms, strict=True
    ):
        shown = "{:>4} {:>3} {:>3} {:>6}".format(*cell) if cell[0] >= 0 else ""
        yield f"{position:>6} {token:>7}  {text:<16} {role:<18} {shown:<20} {norm:.4g}"
    if "answer_logprobs" in sample:
        logprobs = sample["answer_logprobs"]
        yield f"answer: {len(logprobs)} tokens, log-probability {logprobs.sum(dtype=np.float64):.4g} together"
