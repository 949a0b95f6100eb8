"""Whether devices keep the promises: values near those of float32 on the CPU, and bits that are each sample's own.

On random weights made from a seed, without any file: a tiny model, and a few layers as wide as the run's.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qwen_jax.data.prompts import TokenizedSample
from qwen_jax.data.steps import StepShape, lay_into_steps
from qwen_jax.errors import ConfigError
from qwen_jax.kinds import ALL_KINDS
from qwen_jax.model.attention import Blocked, Form, make_form, resolve_attention
from qwen_jax.model.capture import Capture, Compilation
from qwen_jax.model.config import ModelConfig
from qwen_jax.model.decoder import Decoder
from qwen_jax.model.program import Program
from qwen_jax.model.rope import Rope
from qwen_jax.model.sharding import make_mesh
from qwen_jax.model.weights import expected_shapes
from qwen_jax.run.cache import use_cache
from qwen_jax.run.certify import Closeness, ClosenessSum, tolerance_of
from qwen_jax.run.job import Job
from qwen_jax.run.pipeline import CapturedSample, SampleTap, captured_samples
from qwen_jax.run.written_by import DEVICE_CHECK, FAILED, PASSED, remember_check, says_passed

log = logging.getLogger(__name__)

COMMAND = "python -m qwen_jax certify --self"
ALL_TAPS = tuple(ALL_KINDS)
TINY = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rope=Rope(1e6),
    rms_norm_eps=1e-6,
    max_positions=1024,
    tied_embeddings=True,
    qkv_bias=True,
)
# Samples of one token, of less than a step, of several steps, and of more than a block of keys.
_LENGTHS = (40, 1, 300, 77, 130, 64, 5, 299, 33)
_STRANGERS = (17, 90, 3, 111)
_STEP_TOKENS = 96
_ORDERS = 2
_MOST_WEIGHTS = 300_000_000
_RNG = np.random.default_rng

Found = dict[bytes, CapturedSample]
"""Samples by their tokens."""


class NoCpuError(ConfigError):
    """jax offers no CPU to compare with."""


@dataclass(frozen=True)
class Verdict:
    """What came out for one model.

    worst: of each tap the layer that is furthest from the reference, and how far; unlike: what had other bits among
    other neighbours or where steps ended elsewhere.
    """

    model: str
    dtype: str
    attention: str
    tolerance: float
    worst: Mapping[str, tuple[int, Closeness]]
    unlike: tuple[str, ...]

    @property
    def faults(self) -> list[str]:
        far = [
            f"{tap} of layer {layer}: {_away(close)}"
            for tap, (layer, close) in self.worst.items()
            if not close.within(self.tolerance)
        ]
        return [*far, *(f"{what}: other bits elsewhere" for what in self.unlike)]

    def __str__(self) -> str:
        furthest = max((close for _, close in self.worst.values()), key=_distance)
        well = f"within {self.tolerance:.1e} of float32 on the CPU ({_away(furthest)}), bits are each sample's own"
        return f"{self.model}, {self.dtype}, {self.attention} attention: {'; '.join(self.faults) or well}"


def check_devices(config: ModelConfig, dtype: str, model_parallel: int = 1) -> Iterator[Verdict]:
    """A verdict on each of three models, on all local devices: tiny ones, and layers of `config` in `dtype`.

    model_parallel: devices that share the weights of the latter. Raises NoCpuError.
    """
    few = few_layers(config)
    yield from check_model("tiny model", TINY, ("float32", "bfloat16"), make_mesh())
    name = f"{few.num_layers} layers of width {few.hidden_size}"
    yield from check_model(name, few, (dtype,), make_mesh(model_parallel))


def checked(job: Job, writer: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """`writer` (written_by) with what is known of the job's devices, or is found out now; on a CPU nothing is.

    before: that of the run so far, which stands for a check on another machine of the kind.
    """
    if job.step.mesh.devices.flat[0].platform == "cpu" or writer[DEVICE_CHECK] == PASSED:
        return writer
    if not says_passed(before, writer):
        log.info("%s is new here: looking whether it keeps the promises (%s)", writer["device_kind"], COMMAND)
        use_cache(job.settings.compilation_cache_dir)
        try:
            faults = list(_faults(check_devices(job.config, job.dtype, job.settings.model_parallel)))
        except NoCpuError as error:
            log.warning("%s", error)
            return writer
        if faults:
            log.warning("%s does not keep the promises: %s", writer["device_kind"], "; ".join(faults))
            return {**writer, DEVICE_CHECK: FAILED}
    passed = {**writer, DEVICE_CHECK: PASSED}
    remember_check(job.settings.compilation_cache_dir, passed)
    return passed


def _faults(verdicts: Iterable[Verdict]) -> Iterator[str]:
    for verdict in verdicts:
        if verdict.faults:
            yield str(verdict)


def few_layers(config: ModelConfig) -> ModelConfig:
    """As wide, with a small vocabulary and so few layers that random weights are made in seconds."""
    small = replace(config, vocab_size=min(config.vocab_size, TINY.vocab_size), tied_embeddings=True)
    of_layer = sum(map(prod, expected_shapes(small, 1).values()))
    layers = max(1, min(config.num_layers, TINY.num_layers, _MOST_WEIGHTS // of_layer))
    return replace(small, num_layers=layers)


def check_model(name: str, config: ModelConfig, dtypes: Iterable[str], mesh: Mesh) -> Iterator[Verdict]:
    """A verdict on each dtype of a random model on the devices of `mesh`; raises NoCpuError."""
    prompts, strangers = (
        [_RNG(length).integers(0, config.vocab_size, length).astype(np.int32) for length in lengths]
        for lengths in (_LENGTHS, _STRANGERS)
    )
    arrangements = [prompts, *_elsewhere(prompts, strangers)]
    (reference,) = _run(_program(config, "float32", _cpu_mesh(), Blocked()), [prompts])
    platform = mesh.devices.flat[0].platform
    for dtype in dtypes:
        attention = resolve_attention("auto", dtype, platform)
        form = make_form(attention, platform, _STEP_TOKENS, max(_LENGTHS))
        first, *others = _run(_program(config, dtype, mesh, form), arrangements)
        unlike = dict.fromkeys(what for other in others for what in _unlike(first, other))
        tolerance = tolerance_of(dtype, dtype, config.hidden_size)
        yield Verdict(name, dtype, form.name, tolerance, _worst(first, reference), tuple(unlike))


def _cpu_mesh() -> Mesh:
    try:
        devices = jax.local_devices(backend="cpu")
    except RuntimeError as error:
        raise NoCpuError(
            f"{COMMAND} compares with the CPU, which jax does not offer here; add it to JAX_PLATFORMS (tpu,cpu)"
        ) from error
    return Mesh(np.array(devices[:1]).reshape(1, 1), ("data", "model"))


def _program(config: ModelConfig, dtype: str, mesh: Mesh, form: Form) -> Program[StepShape]:
    shape = StepShape.of(_STEP_TOKENS, max(_LENGTHS), mesh.shape["data"], form.page)
    layers = tuple(range(config.num_layers))
    return Program(config, len(layers), layers, ALL_TAPS, dtype, dtype, mesh, shape, form)


def _elsewhere(prompts: Sequence[np.ndarray], strangers: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Among strangers in other orders, so that each begins and is cut elsewhere; and each alone."""
    mixed = [*prompts, *strangers]
    for seed in range(_ORDERS):
        yield [mixed[number] for number in _RNG(seed).permutation(len(mixed))]
    yield from ([prompt] for prompt in prompts)


def _run(program: Program[StepShape], arrangements: Iterable[Sequence[np.ndarray]]) -> list[Found]:
    """One after the other, each with what the one before has left on the device."""
    capture = Capture(Compilation(program), random_model(program))
    found = []
    for prompts in arrangements:
        samples = [_sample(number, ids) for number, ids in enumerate(prompts)]
        captured = captured_samples(lay_into_steps(samples, program.shape), capture)
        found.append({sample.tokenized.token_ids.tobytes(): sample for sample in captured})
    return found


def _sample(number: int, ids: np.ndarray) -> TokenizedSample:
    return TokenizedSample(number, ids, np.zeros(len(ids), np.int32), None, "", COMMAND, False, 0, len(ids))


def random_model(program: Program) -> Decoder:
    """The program's model, every value random; bfloat16 holds them all, so that each dtype has the same model."""
    graph, abstract = program.model
    filled = []
    for number, (path, leaf) in enumerate(nnx.to_flat_state(abstract)):
        values = _random(str(path[-1]), leaf.shape, np.random.default_rng(number)).astype(jnp.bfloat16)
        filled.append((path, leaf.replace(jax.device_put(values.astype(leaf.dtype), leaf.sharding))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _random(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """name: ends in the dimension letters of the parameter, what it gives first (decoder.py)."""
    letters = name.rpartition("_")[2]
    values = rng.standard_normal(shape, np.float32)
    if name.startswith("scale"):
        return 1 + 0.2 * values
    if "bias" in name or name.startswith("embed"):
        return values
    taken_in = prod(shape[-1:] if letters[0] != "D" else shape[1 - len(letters) :])
    return values * np.float32(taken_in**-0.5)


def _worst(found: Found, reference: Found) -> dict[str, tuple[int, Closeness]]:
    worst = {}
    for tap in ALL_TAPS:
        sums: list[ClosenessSum] = []
        for ids, sample in found.items():
            pairs = list(zip(_rows(sample.taps[tap]), _rows(reference[ids].taps[tap]), strict=True))
            sums = sums or [ClosenessSum() for _ in pairs]
            for total, (ours, theirs) in zip(sums, pairs, strict=True):
                total.add(ours, theirs)
        worst[tap] = max(enumerate(total.closeness() for total in sums), key=lambda each: _distance(each[1]))
    return worst


def _distance(close: Closeness) -> float:
    return inf if close.relative is None else close.relative


def _away(close: Closeness) -> str:
    return "not finite" if close.relative is None else f"{close.relative:.1e} away"


def _rows(tap: SampleTap) -> np.ndarray:
    """[C, n, D]"""
    return np.concatenate(tap.pieces, axis=1)


def _unlike(first: Found, other: Found) -> Iterator[str]:
    for ids in first.keys() & other.keys():
        for tap in ALL_TAPS:
            if _bits(first[ids].taps[tap]) != _bits(other[ids].taps[tap]):
                yield f"{tap} of the sample of {len(first[ids].tokenized.token_ids)} tokens"


def _bits(tap: SampleTap) -> bytes:
    """Of what is stored, and of its statistics."""
    return b"".join(array.tobytes() for array in (_rows(tap), *tap.beside, *tap.sums.arrays))
