"""What a run would write and take, from the stream, the tokenizer and the model's configuration alone."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from qwen_jax.data.batching import Batch, BatchShapes, plan_batches, windows
from qwen_jax.data.prompts import TokenizedSample, load_tokenizer
from qwen_jax.data.streams import read_stream
from qwen_jax.model.capture import COMPUTE_DTYPES
from qwen_jax.model.sharding import planned_mesh
from qwen_jax.model.weights import parameter_bytes
from qwen_jax.run.devices import find_devices
from qwen_jax.run.job import Outline, outline
from qwen_jax.run.memory import activation_bytes_bound
from qwen_jax.run.plan_flags import Assumptions
from qwen_jax.run.prompts import BadRecordLimit, PromptMaker
from qwen_jax.run.settings import Settings

COMPRESSED_SHARE = {"float32": 0.92, "float16": 0.92, "bfloat16": 0.78}
"""Compressed bytes of a raw byte, measured on the demo model's residual stream (docs/reading.md)."""
_SEED = 0


@dataclass(frozen=True)
class Plan:
    """Counts of a run; scaled from a sample of the lines where `exact` is false.

    prompt_tokens: what the devices compute, without padding; real_share: their share of all positions, padding
    included, None for a sample of lines. kept_tokens: rows that are stored. Bytes are of activations, but for
    weight_bytes, of the parameters on each device. step_rows: the most rows that a full step keeps on a device.
    """

    outline: Outline
    assumptions: Assumptions
    tokenized_lines: int
    samples: int
    skipped: int
    shortened: int
    truncated: int
    prompt_tokens: int
    kept_tokens: int
    real_share: float | None
    step_rows: int
    devices: int
    weight_bytes: int

    @property
    def settings(self) -> Settings:
        return self.outline.settings

    @property
    def lines(self) -> int:
        return self.outline.lines

    @property
    def bytes_per_token(self) -> int:
        return self.outline.bytes_per_token

    @property
    def exact(self) -> bool:
        return self.lines == self.tokenized_lines

    @property
    def raw_bytes(self) -> int:
        return self.kept_tokens * self.bytes_per_token

    @property
    def compressed_bytes(self) -> int:
        return round(self.raw_bytes * COMPRESSED_SHARE[self.outline.activation_dtype])

    @property
    def shards(self) -> int:
        """A shard closes with the sample that fills it, so it is about half a sample larger than its size."""
        if not self.samples:
            return 0
        return max(1, round(self.raw_bytes / (self.settings.shard_bytes + self.raw_bytes / self.samples / 2)))

    @property
    def host_bytes(self) -> int:
        """Activations on the host at most; the programs come besides."""
        settings = self.settings
        return activation_bytes_bound(
            bytes_per_token=self.bytes_per_token,
            max_seq_length=settings.max_seq_length,
            tokens_per_step=_shapes(settings, self.devices).tokens_per_step,
            lookahead=settings.lookahead,
            shard_bytes=settings.shard_bytes,
        )

    @property
    def step_bytes(self) -> int:
        """Captured activations of one step on each device."""
        return self.step_rows * self.bytes_per_token

    @property
    def hours(self) -> float | None:
        speed = self.assumptions.tokens_per_second
        return None if speed is None else self.prompt_tokens / speed / 3600

    def lines_of_text(self) -> Iterator[str]:
        about = "" if self.exact else f" (from {self.tokenized_lines:,} lines drawn at random)"
        settings, lines = self.settings, max(self.lines, 1)
        yield f"plan for {settings.dataset_path} with {settings.model_path}{about}"
        yield f"  samples     {self.samples:,} of {self.lines:,} lines, {self.skipped:,} skipped"
        overlong = self.shortened + self.truncated
        yield f"  over-long   {overlong / lines:.1%}: {self.shortened:,} lose examples, {self.truncated:,} are cut"
        yield f"  tokens      {self.prompt_tokens:,} computed, {self.kept_tokens:,} kept ({settings.keep_tokens})"
        if self.real_share is not None:
            yield f"  padding     {1 - self.real_share:.1%} of the positions computed"
        yield (
            f"  activations {len(self.outline.layers)} layers, {' '.join(settings.taps)}, "
            f"{self.outline.activation_dtype}: {self.bytes_per_token:,} bytes a token"
        )
        yield f"  raw         {_bytes(self.raw_bytes)} in {self.shards:,} shards"
        yield f"  compressed  about {_bytes(self.compressed_bytes)}"
        yield f"  host RAM    at most {_bytes(self.host_bytes)} of activations"
        weights, step = _bytes(self.weight_bytes), _bytes(self.step_bytes)
        yield (
            f"  device RAM  {weights} of weights in {self.outline.dtype}, {step} of a step's activations, on each of "
            f"{self.devices}"
        )
        yield from self._costs()

    def _costs(self) -> Iterator[str]:
        assumed = self.assumptions
        if self.hours is not None:
            yield f"  time        {_time(self.hours)} at {assumed.tokens_per_second:,.0f} tokens/s"
            if assumed.price_per_hour is not None:
                yield f"  machine     {_amount(self.hours * assumed.price_per_hour)}"
        if assumed.price_per_gb_month is not None:
            monthly = self.compressed_bytes / 1e9 * assumed.price_per_gb_month
            yield f"  storage     {_amount(monthly)} a month"


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 1e3:,.2f} kB"


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.2f} h"
    return f"{hours * 60:.2f} min" if hours * 60 >= 1 else f"{hours * 3600:.2f} s"


def _amount(money: float) -> str:
    return f"{money:,.2f}" if money >= 1 else f"{money:.2g}"


def make_plan(settings: Settings, assumptions: Assumptions) -> Plan:
    """Tokenises the stream, or a seeded sample of its lines; loads no weights. Raises what a run would raise."""
    devices = assumptions.devices or len(find_devices())
    mesh = planned_mesh(devices, settings.model_parallel)
    planned = outline(settings, weights=False)
    chosen = _choose(planned.lines, assumptions.plan_samples)
    counts = _count(planned, chosen, devices)
    scale = planned.lines / max(len(chosen), 1)
    exact = len(chosen) == planned.lines and counts.samples
    weights = (
        planned.config,
        planned.layers_run,
        COMPUTE_DTYPES[planned.dtype],
        mesh,
        settings.include_answer,
    )
    return Plan(
        planned,
        assumptions,
        len(chosen),
        samples=round(counts.samples * scale),
        skipped=round(counts.skipped * scale),
        shortened=round(counts.shortened * scale),
        truncated=round(counts.truncated * scale),
        prompt_tokens=round(counts.prompt_tokens * scale),
        kept_tokens=round(counts.kept_tokens * scale),
        real_share=counts.prompt_tokens / counts.positions if exact else None,
        step_rows=counts.step_rows,
        devices=devices,
        weight_bytes=parameter_bytes(*weights),
    )


def _choose(lines: int, count: int | None) -> Collection[int]:
    if count is None or count >= lines:
        return range(lines)
    return frozenset(np.random.default_rng(_SEED).choice(lines, count, replace=False).tolist())


def _shapes(settings: Settings, devices: int) -> BatchShapes:
    return BatchShapes(settings.max_seq_length, settings.batch_size, devices // settings.model_parallel)


@dataclass
class _Counts:
    """What is counted as samples and batches go by; none of them is kept."""

    samples: int = 0
    skipped: int = 0
    shortened: int = 0
    truncated: int = 0
    prompt_tokens: int = 0
    kept_tokens: int = 0
    positions: int = 0
    step_rows: int = 0

    def add_sample(self, sample: TokenizedSample) -> None:
        self.samples += 1
        self.shortened += sample.dropped_examples > 0
        self.truncated += sample.truncated
        self.prompt_tokens += len(sample.token_ids)
        self.kept_tokens += sample.n_kept

    def add_batch(self, batch: Batch, shapes: BatchShapes) -> None:
        """A sample of the lines fills few batches, so the memory of a step is that of a full one."""
        length = batch.token_ids.shape[1]
        kept = length if batch.positions is None else batch.positions.shape[1]
        self.positions += batch.token_ids.size
        self.step_rows = max(self.step_rows, max(shapes.row_counts(length)) // shapes.devices * kept)


def _count(planned: Outline, chosen: Collection[int], devices: int) -> _Counts:
    """Everything that the run would make of the chosen lines, one window of samples at a time."""
    counts, shapes = _Counts(), _shapes(planned.settings, devices)
    samples = _tokenized(planned, chosen, counts)
    for window in windows(samples, planned.settings.lookahead * shapes.tokens_per_step):
        for batch in plan_batches(window, shapes):
            counts.add_batch(batch, shapes)
    return counts


def _tokenized(planned: Outline, chosen: Collection[int], counts: _Counts) -> Iterator[TokenizedSample]:
    """The samples of the chosen lines, counted; raises BadDataError past --max_bad_records."""
    settings = planned.settings
    make_prompt = PromptMaker(settings, load_tokenizer(str(planned.source.folder)), planned.stream.sha256)
    bad = BadRecordLimit(settings)
    records = islice(read_stream(settings.dataset_path), planned.lines)
    for result in (make_prompt(sample_idx, record) for sample_idx, record in records if sample_idx in chosen):
        if isinstance(result, TokenizedSample):
            counts.add_sample(result)
            yield result
        else:
            counts.skipped += 1
            bad.count(result)
