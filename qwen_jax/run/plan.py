"""What a run would write and take, from the stream, the tokenizer and the model's configuration alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qwen_jax.data.batching import BatchShapes, plan_batches, windows
from qwen_jax.data.prompts import TokenizedSample, load_tokenizer
from qwen_jax.data.streams import read_stream, stream_summary
from qwen_jax.model.capture import ACTIVATION_DTYPES, resolve_dtype
from qwen_jax.model.config import read_config
from qwen_jax.model.source import fetch_model
from qwen_jax.run.devices import find_devices
from qwen_jax.run.job import choose_layers
from qwen_jax.run.memory import activation_bytes_bound
from qwen_jax.run.plan_flags import Assumptions
from qwen_jax.run.prompts import PromptMaker
from qwen_jax.run.settings import Settings

COMPRESSED_SHARE = {"float32": 0.92, "float16": 0.92, "bfloat16": 0.78}
"""Compressed bytes of a raw byte, measured on a trained model's residual stream (docs/reading.md)."""
_SEED = 0


@dataclass(frozen=True)
class Plan:
    """Counts of a run; scaled from a sample of the lines where `exact` is false.

    prompt_tokens: what the device computes, without padding; real_share: their share of all positions, padding
    included, None for a sample of lines. kept_tokens: rows that are stored. Bytes are of activations.
    """

    settings: Settings
    assumptions: Assumptions
    lines: int
    tokenized_lines: int
    samples: int
    skipped: int
    shortened: int
    truncated: int
    prompt_tokens: int
    kept_tokens: int
    real_share: float | None
    bytes_per_token: int
    activation_dtype: str
    layers: int
    devices: int

    @property
    def exact(self) -> bool:
        return self.lines == self.tokenized_lines

    @property
    def raw_bytes(self) -> int:
        return self.kept_tokens * self.bytes_per_token

    @property
    def compressed_bytes(self) -> int:
        return round(self.raw_bytes * COMPRESSED_SHARE[self.activation_dtype])

    @property
    def shards(self) -> int:
        """A shard closes with the sample that fills it, so it is about half a sample larger than its size."""
        if not self.samples:
            return 0
        return max(1, round(self.raw_bytes / (self.settings.shard_bytes + self.raw_bytes / self.samples / 2)))

    @property
    def memory_bytes(self) -> int:
        """Activations on the host; the model and the programs come besides."""
        settings = self.settings
        return activation_bytes_bound(
            bytes_per_token=self.bytes_per_token,
            max_seq_length=settings.max_seq_length,
            tokens_per_step=settings.batch_size * settings.max_seq_length * self.devices,
            lookahead=settings.lookahead,
            shard_bytes=settings.shard_bytes,
        )

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
            f"  activations {self.layers} layers, {' '.join(settings.taps)}, {self.activation_dtype}: "
            f"{self.bytes_per_token:,} bytes a token"
        )
        yield f"  raw         {_bytes(self.raw_bytes)} in {self.shards:,} shards"
        yield f"  compressed  about {_bytes(self.compressed_bytes)}"
        yield f"  memory      activations take at most {_bytes(self.memory_bytes)} of the host's"
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
    stream = stream_summary(settings.dataset_path)
    source = fetch_model(settings.model_path, settings.revision, weights=False)
    config = read_config(source.folder)
    tokenizer = load_tokenizer(str(source.folder))
    make_prompt = PromptMaker(settings, tokenizer, stream.sha256)
    lines = stream.lines if settings.max_samples is None else min(stream.lines, settings.max_samples)
    chosen = _choose(lines, assumptions.plan_samples)
    records = read_stream(settings.dataset_path)
    results = [make_prompt(sample_idx, record) for sample_idx, record in records if sample_idx in chosen]
    samples = [result for result in results if isinstance(result, TokenizedSample)]
    scale = lines / max(len(chosen), 1)
    devices = len(find_devices()) // settings.model_parallel
    activation_dtype = settings.activation_dtype
    if activation_dtype == "auto":
        activation_dtype = resolve_dtype(settings.dtype)
    layers = len(choose_layers(settings.layers_to_extract, config.num_layers))
    arrays = layers * len(settings.activation_types) + settings.include_embedding
    return Plan(
        settings,
        assumptions,
        lines,
        len(chosen),
        samples=round(len(samples) * scale),
        skipped=round((len(results) - len(samples)) * scale),
        shortened=round(sum(sample.dropped_examples > 0 for sample in samples) * scale),
        truncated=round(sum(sample.truncated for sample in samples) * scale),
        prompt_tokens=round(sum(len(sample.token_ids) for sample in samples) * scale),
        kept_tokens=round(sum(sample.n_kept for sample in samples) * scale),
        real_share=_real_share(settings, samples, devices) if len(chosen) == lines and samples else None,
        bytes_per_token=arrays * config.hidden_size * ACTIVATION_DTYPES[activation_dtype].dtype.itemsize,
        activation_dtype=activation_dtype,
        layers=layers,
        devices=devices,
    )


def _choose(lines: int, count: int | None) -> frozenset[int]:
    if count is None or count >= lines:
        return frozenset(range(lines))
    return frozenset(np.random.default_rng(_SEED).choice(lines, count, replace=False).tolist())


def _real_share(settings: Settings, samples: list[TokenizedSample], devices: int) -> float:
    shapes = BatchShapes(settings.max_seq_length, settings.batch_size, devices)
    positions = sum(
        batch.token_ids.size
        for window in windows(samples, settings.lookahead * shapes.tokens_per_step)
        for batch in plan_batches(window, shapes)
    )
    return sum(len(sample.token_ids) for sample in samples) / positions
