"""How far stored activations are from a float32 run of the same prompts: the fidelity of a dataset."""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwen_jax.data.prompts import SkippedSample, TokenizedSample, load_tokenizer
from qwen_jax.data.steps import lay_into_steps
from qwen_jax.data.streams import read_stream
from qwen_jax.errors import BadDataError
from qwen_jax.kinds import EMBEDDING, STORED_DTYPES
from qwen_jax.model.capture import Capture, Compilation
from qwen_jax.model.weights import load_model
from qwen_jax.run.devices import device_errors
from qwen_jax.run.job import Job
from qwen_jax.run.pipeline import captured_samples
from qwen_jax.run.rollout import KnownRollouts
from qwen_jax.run.sample_reader import PromptMaker

log = logging.getLogger(__name__)

TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
"""Allowed relative error of a layer by compute dtype; the rounding of the stored dtype comes on top."""

# A prompt -> {tap: [layers, tokens, hidden] float32}.
Reference = Callable[[TokenizedSample], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Closeness:
    """Stored rows against the reference's, over all samples looked at.

    max_abs: largest difference of two values; relative: Euclidean norm of the differences by that of the
    reference; min_cosine: of the row that points away most. None where that is no finite number, because a value
    is infinite or not a number.
    """

    max_abs: float | None
    relative: float | None
    min_cosine: float | None

    def within(self, tolerance: float) -> bool:
        """Whether all is finite and the relative error at most `tolerance`."""
        if self.max_abs is None or self.relative is None or self.min_cosine is None:
            return False
        return self.relative <= tolerance


def tolerance_of(compute_dtype: str, activation_dtype: str, width: int) -> float:
    """The relative error that a layer may have. width: of its rows."""
    return TOLERANCES[compute_dtype] + STORED_DTYPES[activation_dtype].rounding(width)


@device_errors()
def certify(job: Job, stored: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Recomputes `stored` samples in float32 and compares them layer by layer: against our own model, and against
    Hugging Face's where torch is installed. Returns the fidelity record for metadata.json.

    job: see recorded.reference_job. stored: of each sample `sample_idx`, `token_ids` int32 [n] of its kept tokens,
    `kinds`, `{kind: {layer: [n, hidden]}}`, the embedding as `{"embedding": {"embedding": ...}}`, and where they are
    stored `answer_token_ids`.

    Raises BadDataError where a sample's tokens are not those of the stream's line.
    """
    prompts = _prompts(job, {sample["sample_idx"]: sample.get("answer_token_ids") for sample in stored})
    references = {"qwen_jax float32": _own_reference(job)}
    if importlib.util.find_spec("torch") is not None:
        from qwen_jax.run.hugging_face import hugging_face_reference

        references["Hugging Face float32"] = hugging_face_reference(job.source.folder, job.checkpoint.adapter)
    tolerance = tolerance_of(job.dtype, job.activation_dtype, max(job.widths.values()))
    compared = {name: _compare(job, stored, prompts, run) for name, run in references.items()}
    return {
        "samples": sorted(prompts),
        "references": {name: _by_kind(layers) for name, layers in compared.items()},
        "tolerance": tolerance,
        "passed": all(each.within(tolerance) for layers in compared.values() for each in layers.values()),
    }


def _prompts(job: Job, wanted: Mapping[int, np.ndarray | None]) -> dict[int, TokenizedSample | SkippedSample]:
    """The samples once more, from the stream, and from what is `wanted` of it the answers of the model's own."""
    prompts: dict[int, TokenizedSample | SkippedSample] = {}
    tokenizer = load_tokenizer(str(job.source.folder))
    rollout = KnownRollouts(wanted.get) if job.settings.rollout else None
    make_prompt = PromptMaker(job.settings, tokenizer, job.stream.sha256, rollout)
    for sample_idx, record in read_stream(job.settings.stream_path):
        if sample_idx in wanted:
            made = make_prompt(sample_idx, record)
            if not isinstance(made, TokenizedSample):
                raise BadDataError(
                    f"sample {sample_idx} is stored, but its line in {job.settings.dataset_path} gives no prompt now: "
                    f"{made.reason}; give the stream that the shards were made from"
                )
            prompts[sample_idx] = made
        if len(prompts) == len(wanted):
            break
    return prompts


def _own_reference(job: Job) -> Reference:
    """In float32, all tokens kept; exact however it is computed."""
    program = replace(
        job.step, dtype="float32", stored_dtype="float32", num_layers=job.layers[-1] + 1, with_answers=False
    )
    model = load_model(job.checkpoint, job.config, program.num_layers, jnp.float32, program.mesh)
    capture = Capture(Compilation(program), model)

    def run(prompt: TokenizedSample) -> dict[str, np.ndarray]:
        whole = replace(prompt, positions=None, with_answer=False)
        (captured,) = captured_samples(lay_into_steps([whole], program.shape), capture)
        return {name: np.concatenate(tap.pieces, axis=1) for name, tap in captured.taps.items()}

    return run


def _compare(
    job: Job,
    stored: Sequence[dict[str, Any]],
    prompts: dict[int, TokenizedSample | SkippedSample],
    run: Reference,
) -> dict[tuple[str, int | str], Closeness]:
    """By kind and layer, over all samples."""
    sums = {(kind, layer): ClosenessSum() for kind, layer in _entries(job)}
    for sample in stored:
        prompt = _prompt_of(sample, prompts, job)
        log.info("sample %d: %d tokens", prompt.sample_idx, len(prompt.token_ids))
        reference = run(prompt)
        for kind, layer in sums:
            expected = reference[kind]
            row = 0 if isinstance(layer, str) else _row_of(job, layer, len(expected))
            rows = expected[row] if prompt.positions is None else expected[row][prompt.positions]
            sums[kind, layer].add(_stored_rows(sample, kind, layer, rows.shape), rows)
    return {entry: total.closeness() for entry, total in sums.items()}


def _prompt_of(
    sample: dict[str, Any], prompts: dict[int, TokenizedSample | SkippedSample], job: Job
) -> TokenizedSample:
    prompt = prompts.get(sample["sample_idx"])
    if isinstance(prompt, TokenizedSample) and np.array_equal(
        prompt.kept(prompt.token_ids), sample["token_ids"]
    ):
        return prompt
    raise BadDataError(
        f"sample {sample['sample_idx']}: its tokens are not those of its line in {job.settings.stream_path}; verify "
        "the shards, and give the stream that they were made from"
    )


def _stored_rows(sample: dict[str, Any], kind: str, layer: int | str, shape: tuple[int, ...]) -> np.ndarray:
    rows = sample["kinds"].get(kind, {}).get(layer)
    if rows is None or rows.shape != shape:
        raise BadDataError(
            f"sample {sample['sample_idx']} has no {kind} {list(shape)} of layer {layer}, as such a run has; verify "
            "the shards"
        )
    return rows


def _by_kind(closeness: dict[tuple[str, int | str], Closeness]) -> dict[str, dict[str, dict]]:
    """{kind: {layer: ...}}, as JSON has it."""
    result: dict[str, dict[str, dict]] = {}
    for (kind, layer), close in closeness.items():
        result.setdefault(kind, {})[str(layer)] = asdict(close)
    return result


def _entries(job: Job) -> Iterator[tuple[str, int | str]]:
    yield from ((kind, layer) for kind in job.settings.activation_type for layer in job.layers)
    if job.settings.include_embedding:
        yield EMBEDDING, EMBEDDING


def _row_of(job: Job, layer: int, available: int) -> int:
    """Our reference holds the captured layers, Hugging Face's every layer."""
    return layer if available > len(job.layers) else job.layers.index(layer)


class ClosenessSum:
    """Collects what Closeness needs, of `[rows, hidden]` arrays. NumPy's maximum and minimum keep what is not a number;
    Python's may drop it."""

    def __init__(self) -> None:
        self._max_abs = self._difference = self._size = 0.0
        self._min_cosine = 1.0

    def add(self, stored_RD: np.ndarray, expected_RD: np.ndarray) -> None:
        ours, theirs = stored_RD.astype(np.float64), expected_RD.astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinite values, which the result shows
            self._max_abs = np.maximum(self._max_abs, np.abs(ours - theirs).max())
            self._difference += np.square(ours - theirs).sum()
            self._size += np.square(theirs).sum()
            lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
            cosines = (ours * theirs).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
            self._min_cosine = np.minimum(self._min_cosine, cosines.min())

    def closeness(self) -> Closeness:
        relative = (self._difference / max(self._size, np.finfo(np.float64).tiny)) ** 0.5
        return Closeness(*map(_finite, (self._max_abs, relative, self._min_cosine)))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
