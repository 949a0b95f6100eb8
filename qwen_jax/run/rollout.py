"""Prompts -> prompts with an answer of the model's own behind them."""

import json
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import replace
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.data.arc import Grid
from qwen_jax.data.prompts import SkippedSample, TokenizedSample, format_called
from qwen_jax.data.steps import Step, StepShape, lay_into_steps
from qwen_jax.model.capture import Capture
from qwen_jax.model.rollout import SLOTS, Prompts, PromptStep, Rollout, Sampling
from qwen_jax.roles import ROLLOUT
from qwen_jax.run.job import Job
from qwen_jax.run.sample_reader import PromptMaker

Encoded = TokenizedSample | SkippedSample


def prompt_maker(job: Job, tokenizer: Any, capture: Capture) -> PromptMaker:
    """The run's prompts, with the model's answers where they are asked for."""
    maker = None
    if job.settings.rollout:
        maker = RolloutMaker(job, tokenizer, capture)
    return PromptMaker(job.settings, tokenizer, job.stream.sha256, maker)


class RolloutMaker:
    """Lets the model go on with prompts.

    A sample's slot is its index modulo SLOTS, whatever samples a start begins with, so that its bits are its own.
    """

    def __init__(self, job: Job, tokenizer: Any, capture: Capture):
        settings = job.settings
        sampling = Sampling(
            settings.rollout_temperature, settings.rollout_seed, _ends(tokenizer, job.source.folder)
        )
        self._rollout = Rollout(job.step, capture.params, sampling)
        self._rows, self._most = job.step.shape.rows, settings.rollout
        self._tokenizer, self._ends = tokenizer, sampling.ends
        self._format = format_called(settings.prompt_format)

    def __call__(self, encoded: Iterable[Encoded], expected: MutableMapping[int, Grid]) -> Iterator[Encoded]:
        """In order. expected: by sample_idx the output that solves a task, where it is known."""
        for _, group in groupby(encoded, key=lambda each: each.sample_idx // (SLOTS * self._rows)):
            together = list(group)
            answers = self._answers([each for each in together if isinstance(each, TokenizedSample)])
            for each in together:
                if isinstance(each, TokenizedSample):
                    ids = answers[each.sample_idx]
                    yield with_rollout(each, ids, self._solved(ids, expected.pop(each.sample_idx, None)))
                else:
                    yield each

    def _solved(self, ids: np.ndarray, expected: Grid | None) -> int | None:
        if expected is None:
            return None
        text = self._tokenizer.decode(ids[~np.isin(ids, self._ends)])
        return int(self._format.read(text) == expected)

    def _answers(self, prompts: Sequence[TokenizedSample]) -> dict[int, np.ndarray]:
        """Tokens by sample_idx, of the samples of one group."""
        if not prompts:
            return {}
        table = Prompts(*(np.full((self._rows, SLOTS), value, np.int32) for value in (0, 1, 0, 0)))
        for prompt in prompts:
            slot = self._row_and_slot(prompt)
            values = (prompt.token_ids[-1], len(prompt.token_ids), self._most, prompt.sample_idx)
            for array, value in zip(table, values, strict=True):
                array[slot] = value
        found = self._rollout(list(self._steps(prompts)), table)
        rows = {prompt.sample_idx: found[self._row_and_slot(prompt)] for prompt in prompts}
        return {sample_idx: tokens[tokens >= 0] for sample_idx, tokens in rows.items()}

    def _row_and_slot(self, prompt: TokenizedSample) -> tuple[int, int]:
        return prompt.sample_idx // SLOTS % self._rows, prompt.sample_idx % SLOTS

    def _steps(self, prompts: Sequence[TokenizedSample]) -> Iterator[PromptStep]:
        """The prompts of each row in steps of its own."""
        by_row: list[list[TokenizedSample]] = [[] for _ in range(self._rows)]
        for prompt in prompts:
            by_row[self._row_and_slot(prompt)[0]].append(prompt)
        shape = self._rollout.shape
        rows = zip_longest(*(lay_into_steps(of_row, shape) for of_row in by_row))
        for steps in rows:
            yield PromptStep(*map(np.stack, zip(*(_row(step, shape) for step in steps), strict=True)))


class KnownRollouts:
    """Answers that need not be computed."""

    def __init__(self, answer_of: Callable[[int], np.ndarray | None]):
        """answer_of: of a sample_idx, the answer's tokens."""
        self._answer_of = answer_of

    def __call__(self, encoded: Iterable[Encoded], expected: MutableMapping[int, Grid]) -> Iterator[Encoded]:
        for each in encoded:
            ids = self._answer_of(each.sample_idx)
            yield with_rollout(each, ids) if isinstance(each, TokenizedSample) and ids is not None else each


def _row(step: Step | None, shape: StepShape) -> tuple[np.ndarray, ...]:
    """A row of a PromptStep; None is one without prompts."""
    starts, slots = np.zeros((2, SLOTS), np.int32)
    if step is None:
        nothing = np.zeros(shape.tokens, np.int32)
        return (
            nothing,
            np.arange(shape.tokens, dtype=np.int32) % shape.positions,
            starts,
            slots,
            np.zeros((), np.int32),
        )
    done = [part for part in step.parts if part.is_last]
    for number, part in enumerate(done):
        end = part.offset + part.stop - part.start
        starts[number] = shape.positions - shape.tokens + end - len(part.sample.token_ids)
        slots[number] = part.sample.sample_idx % SLOTS
    return step.tokens_XT[0], step.positions_XT[0], starts, slots, np.array(len(done), np.int32)


def with_rollout(prompt: TokenizedSample, ids: np.ndarray, solved: int | None = None) -> TokenizedSample:
    """The prompt with the model's answer behind it."""
    cells = (
        None if prompt.cells is None else np.pad(prompt.cells, ((0, len(ids)), (0, 0)), constant_values=-1)
    )
    return replace(
        prompt,
        token_ids=np.concatenate([prompt.token_ids, ids.astype(np.int32)]),
        roles=np.concatenate([prompt.roles, np.full(len(ids), ROLLOUT, np.int32)]),
        cells=cells,
        full_length=prompt.full_length + len(ids),
        with_answer=True,
        notes=prompt.notes if solved is None else {**prompt.notes, "solved": solved},
    )


def _ends(tokenizer: Any, folder: Path) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's, and what the model's generation_config.json says."""
    ends = {tokenizer.eos_token_id} - {None}
    path = folder / "generation_config.json"
    if path.is_file():
        said = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") or []
        ends |= {said} if isinstance(said, int) else set(said)
    return tuple(sorted(ends))
