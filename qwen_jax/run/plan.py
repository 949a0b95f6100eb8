"""What a run would write and take, from the stream, the tokenizer and the model's configuration alone."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from jax.errors import JaxRuntimeError

from qwen_jax.accelerators import Accelerator, accelerator
from qwen_jax.data.prompts import SkippedSample, TokenizedSample, load_tokenizer
from qwen_jax.data.steps import StepShape
from qwen_jax.data.streams import read_stream
from qwen_jax.errors import UsageError
from qwen_jax.kinds import STORED_DTYPES
from qwen_jax.model.compiled import absent_mesh, compile_now
from qwen_jax.model.program import Program
from qwen_jax.model.sharding import planned_mesh
from qwen_jax.run.devices import find_devices
from qwen_jax.run.job import Outline, outline
from qwen_jax.run.memory import activation_bytes_bound
from qwen_jax.run.rollout import KnownRollouts
from qwen_jax.run.roof import Roof, as_on_an_accelerator, complaint, device_memory, machine_mesh
from qwen_jax.run.sample_reader import BadRecordLimit, PromptMaker
from qwen_jax.settings import Settings

USUAL_LENGTHS = (2048, 8192, 16384, 32768)
"""Values of --max_seq_length that a plan compares."""
_PERCENTILES = (5, 50, 95)
_SEED = 0


@dataclass(frozen=True)
class Assumptions:
    """plan_samples: lines to tokenise, None for all. accelerator: a name of accelerators.py, the machine planned for;
    None for this machine or one with so many `devices`. compile: asks that machine's compiler. roof_share: of what its
    devices could do, where tokens_per_second is not given. Prices in any currency; a GB is 10**9 bytes."""

    plan_samples: int | None = None
    accelerator: str | None = None
    devices: int | None = None
    compile: bool = False
    roof_share: float = 0.4
    tokens_per_second: float | None = None
    price_per_hour: float | None = None
    price_per_gb_month: float | None = None


@dataclass(frozen=True)
class Plan:
    """Counts of a run; scaled from a sample of the lines where `exact` is false.

    prompt_tokens: what the devices compute. kept_tokens: rows that are stored. lengths: tokens of the whole prompts
    that were looked at, ascending. step: what is compiled. Bytes are of activations, where nothing else is said.
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
    lengths: np.ndarray
    step: Program[StepShape]
    roof: Roof | None = None
    compiled: tuple[str, ...] = ()

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
        return round(self.raw_bytes * STORED_DTYPES[self.outline.activation_dtype].compressed)

    @property
    def shards(self) -> int:
        """A shard closes with the sample that fills it, so it is about half a sample larger than its size."""
        if not self.samples:
            return 0
        return max(1, round(self.raw_bytes / (self.settings.shard_bytes + self.raw_bytes / self.samples / 2)))

    @property
    def host_bytes(self) -> int:
        """Activations on the host at most; the programs come besides."""
        return activation_bytes_bound(self.step.shape, self.bytes_per_token, self.settings.shard_bytes)

    @property
    def step_bytes(self) -> int:
        """Captured activations of the steps that are in flight, on each device."""
        return device_memory(self.step).steps

    @property
    def tokens_per_second(self) -> float | None:
        """As given, else a share of the accelerator's roof."""
        given = self.assumptions.tokens_per_second
        if given is not None or self.roof is None:
            return given
        return self.roof.tokens_per_second(self.assumptions.roof_share)

    @property
    def hours(self) -> float | None:
        speed = self.tokens_per_second
        return None if speed is None else self.prompt_tokens / speed / 3600

    def lines_of_text(self) -> Iterator[str]:
        about = "" if self.exact else f" (from {self.tokenized_lines:,} lines drawn at random)"
        settings, lines = self.settings, max(self.lines, 1)
        yield f"plan for {settings.stream_path} with {settings.model_path}{about}"
        yield f"  samples     {self.samples:,} of {self.lines:,} lines, {self.skipped:,} skipped"
        overlong = self.shortened + self.truncated
        yield f"  over-long   {overlong / lines:.1%}: {self.shortened:,} lose examples, {self.truncated:,} are cut"
        yield f"  tokens      {self.prompt_tokens:,} computed, {self.kept_tokens:,} kept ({settings.keep_tokens})"
        yield from self._lengths()
        yield (
            f"  activations {len(self.outline.layers)} layers, {' '.join(settings.taps)}, "
            f"{self.outline.activation_dtype}: {self.bytes_per_token:,} bytes a token"
        )
        yield f"  raw         {_bytes(self.raw_bytes)} in {self.shards:,} shards"
        yield f"  compressed  about {_bytes(self.compressed_bytes)}"
        yield f"  host RAM    at most {_bytes(self.host_bytes)} of activations"
        weights, carried, steps = map(
            _bytes, (self.step.weight_bytes, self.step.carried_bytes, self.step_bytes)
        )
        yield (
            f"  device RAM  {weights} of weights in {self.outline.dtype}, {carried} of carried keys and values, "
            f"{steps} of steps in flight, on each of {self.step.mesh.size}"
        )
        if self.roof is not None:
            yield from self._machine(self.roof)
        yield from self._costs()

    def _lengths(self) -> Iterator[str]:
        """The lengths of whole prompts, and what the usual values of --max_seq_length would mean, up to all whole."""
        if not len(self.lengths):
            return
        shown = ", ".join(f"{share}% {np.percentile(self.lengths, share):,.0f}" for share in _PERCENTILES)
        yield f"  lengths     {shown}, longest {self.lengths[-1]:,} tokens"
        scale = self.lines / max(self.tokenized_lines, 1)
        for limit in USUAL_LENGTHS:
            if limit > self.outline.config.max_positions:
                return
            whole = np.searchsorted(self.lengths, limit, side="right") / len(self.lengths)
            tokens = round(np.minimum(self.lengths, limit).sum() * scale)
            cost = _bytes(tokens * self.bytes_per_token)
            name = f"at {limit:,}"
            yield f"  {name:<11} {whole:.1%} of the prompts whole, at most {tokens:,} tokens, {cost} raw if all kept"
            if whole == 1:
                return

    def _machine(self, roof: Roof) -> Iterator[str]:
        """Whether it fits that machine, and what its devices could do."""
        machine, needed = roof.machine, device_memory(self.step, roof.machine).total
        if (said := complaint(self.outline, machine)) is None:
            have = f"{_bytes(machine.chip.memory)} of each of the {machine.devices} devices of {machine.name}"
            yield f"  fits        {_bytes(needed)} with temporaries, of {have}: {_bytes(roof.spare)} to spare"
        else:
            yield f"  no room     {said}"
        yield from self.compiled
        at_most = roof.tokens_per_second(1)
        yield f"  roof        {at_most:,.0f} tokens/s, set by the {roof.bound}; nothing was measured there"

    def _costs(self) -> Iterator[str]:
        assumed = self.assumptions
        if self.hours is not None:
            yield f"  time        {_time(self.hours)} at {self.tokens_per_second:,.0f} tokens/s{self._share()}"
            if assumed.price_per_hour is not None:
                yield f"  machine     {_amount(self.hours * assumed.price_per_hour)}"
        if assumed.price_per_gb_month is not None:
            monthly = self.compressed_bytes / 1e9 * assumed.price_per_gb_month
            yield f"  storage     {_amount(monthly)} a month"

    def _share(self) -> str:
        assumed = self.assumptions
        return "" if assumed.tokens_per_second else f", {assumed.roof_share:.0%} of the roof"


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
    machine, settings = _machine(settings, assumptions)
    if machine is None:
        found = find_devices()
        mesh = planned_mesh(assumptions.devices or len(found), settings.model_parallel)
    else:
        mesh = machine_mesh(machine, settings.model_parallel)
    platform = found[0].platform if machine is None else machine.platform
    planned = outline(settings, weights=False)
    chosen = _choose(planned.lines, assumptions.plan_samples)
    counts = _count(planned, chosen)
    scale = planned.lines / max(len(chosen), 1)
    lengths, step = np.sort(np.array(counts.lengths, np.int64)), planned.program(mesh, platform)
    kept = counts.kept_tokens / max(counts.prompt_tokens, 1)
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
        lengths=lengths,
        step=step,
        roof=None if machine is None else Roof(step, machine, _context(lengths, step.shape.positions), kept),
        compiled=_compiled(planned, machine) if machine is not None and assumptions.compile else (),
    )


def _machine(settings: Settings, assumptions: Assumptions) -> tuple[Accelerator | None, Settings]:
    """The accelerator planned for, and the settings as they are meant there."""
    if assumptions.accelerator is None:
        if assumptions.compile:
            raise UsageError("--compile needs --accelerator")
        return None, settings
    if assumptions.devices is not None:
        raise UsageError("--accelerator says how many devices there are: leave --devices out")
    return accelerator(assumptions.accelerator), as_on_an_accelerator(settings)


def _context(lengths: np.ndarray, positions: int) -> float:
    """Keys that a query sees on average: those of its own sample up to itself."""
    cut = np.minimum(lengths, positions).astype(float)
    return float((cut * (cut + 1) / 2).sum() / cut.sum()) if cut.sum() else positions / 2


def _compiled(planned: Outline, machine: Accelerator) -> tuple[str, ...]:
    """What the machine's own compiler says of the step."""
    step = planned.program(absent_mesh(machine, planned.settings.model_parallel), machine.platform)
    try:
        found = compile_now(step.lower_step())
    except JaxRuntimeError as error:
        return (f"  compiler    refuses: {(str(error).splitlines() or [''])[0]}",)
    return (
        f"  compiler    {found.seconds:.0f} s: {_bytes(found.arguments)} of arguments, {_bytes(found.outputs)} of a "
        f"step's activations, {_bytes(found.temporaries)} of temporaries, {_bytes(found.code)} of program",
    )


def _choose(lines: int, count: int | None) -> Collection[int]:
    if count is None or count >= lines:
        return range(lines)
    return frozenset(np.random.default_rng(_SEED).choice(lines, count, replace=False).tolist())


@dataclass
class _Counts:
    """What is counted as samples go by; of each only its length is kept."""

    samples: int = 0
    skipped: int = 0
    shortened: int = 0
    truncated: int = 0
    prompt_tokens: int = 0
    kept_tokens: int = 0
    lengths: list[int] = field(default_factory=list)

    def add(self, result: TokenizedSample | SkippedSample) -> None:
        if result.full_length:
            self.lengths.append(result.full_length)
        if isinstance(result, SkippedSample):
            self.skipped += 1
            return
        self.samples += 1
        self.shortened += result.dropped_examples > 0
        self.truncated += result.truncated
        self.prompt_tokens += len(result.token_ids)
        self.kept_tokens += result.n_kept


def _count(planned: Outline, chosen: Collection[int]) -> _Counts:
    """Everything that the run would make of the chosen lines, answers of the model's own as long as they may be; raises
    BadDataError past --max_bad_records."""
    settings, counts = planned.settings, _Counts()
    longest = KnownRollouts(lambda sample_idx: np.zeros(settings.rollout, np.int32))
    tokenizer = load_tokenizer(str(planned.source.folder))
    rollout = longest if settings.rollout else None
    make_prompt = PromptMaker(settings, tokenizer, planned.stream.sha256, rollout)
    bad = BadRecordLimit(settings)
    records = islice(read_stream(settings.stream_path), planned.lines)
    for result in make_prompt.many(record for record in records if record[0] in chosen):
        counts.add(result)
        if isinstance(result, SkippedSample):
            bad.count(result)
    return counts
