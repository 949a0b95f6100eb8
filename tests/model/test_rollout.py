"""The model goes on as Hugging Face's does, and each prompt's answer is its own."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qwen_jax.data.layouts import PROMPT_FORMATS
from qwen_jax.data.prompts import TokenizedSample
from qwen_jax.data.steps import StepShape
from qwen_jax.model.capture import Capture, Compilation
from qwen_jax.model.sharding import make_mesh
from qwen_jax.model.weights import load_model, open_checkpoint
from qwen_jax.roles import ROLLOUT
from qwen_jax.run.rollout import RolloutMaker
from tests.model.conftest import program_of, samples_of

MOST = 12


@pytest.fixture(scope="module")
def capture(small) -> Capture:
    model = load_model(
        open_checkpoint(small.folder), small.config, small.config.num_layers, "float32", make_mesh(), True
    )
    shape = StepShape(50, 400)
    return Capture(Compilation(program_of(model, [0], ["residual"], shape, with_answers=True)), model)


class Words:
    """A tokenizer as far as rollouts need one."""

    eos_token_id = 5

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def maker(capture, small):
    """By temperature and seed; each compiles programs of its own."""

    @cache
    def made(temperature: float = 0.0, seed: int = 0) -> RolloutMaker:
        settings = SimpleNamespace(
            rollout=MOST, rollout_temperature=temperature, rollout_seed=seed, prompt_format="rows"
        )
        program = capture._compilation.program
        job = SimpleNamespace(settings=settings, step=program, source=SimpleNamespace(folder=small.folder))
        return RolloutMaker(job, Words(), capture)

    return made


def prompts(small, lengths, first: int = 0) -> list[TokenizedSample]:
    rng = np.random.default_rng(11)
    return samples_of([rng.integers(6, small.config.vocab_size, n).astype(np.int32) for n in lengths], first)


def answers(made) -> dict[int, list[int]]:
    return {each.sample_idx: each.token_ids[each.roles == ROLLOUT].tolist() for each in made}


LENGTHS = (3, 77, 1, 130, 40, 5, 300, 51, 50, 49, 2, 8, 90, 33, 17, 64, 12, 7)


@pytest.fixture(scope="module")
def greedy(maker, small) -> dict[int, list[int]]:
    """More prompts than there are slots, of a token, of a step and of several."""
    made = list(maker()(prompts(small, LENGTHS), {}))
    assert [each.sample_idx for each in made] == list(range(len(LENGTHS)))
    return answers(made)


def test_greedy_answers_are_hugging_faces(small, greedy):
    for prompt in prompts(small, LENGTHS)[::3]:
        ids = torch.from_numpy(prompt.token_ids.astype(np.int64))[None]
        made = small.hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MOST,
            do_sample=False,
            eos_token_id=5,
            pad_token_id=0,
        )
        assert greedy[prompt.sample_idx] == made[0, len(prompt.token_ids) :].tolist(), prompt.sample_idx


def test_an_answer_is_the_same_alone_and_wherever_a_start_begins(maker, small, greedy):
    samples = prompts(small, LENGTHS)
    assert answers(maker()(samples[5:], {})) == {n: ids for n, ids in greedy.items() if n >= 5}
    assert answers(maker()([samples[6]], {})) == {6: greedy[6]}


@pytest.mark.wide
def test_drawn_tokens_follow_from_the_seed_and_the_sample(maker, small, greedy):
    samples = [*prompts(small, LENGTHS[:6]), *samples_of([prompts(small, LENGTHS[:1])[0].token_ids], 6)]
    drawn = answers(maker(30.0, 3)(samples, {}))
    assert drawn == answers(maker(30.0, 3)(samples, {}))
    assert answers(maker(30.0, 3)(samples[3:], {})) == {n: drawn[n] for n in (3, 4, 5, 6)}
    assert drawn != answers(maker(30.0, 4)(samples, {}))
    assert drawn[0] != drawn[6] and drawn[0] != greedy[0]


@pytest.mark.wide
def test_an_answer_ends_with_its_end(maker, small):
    made = answers(maker(30.0, 3)(prompts(small, [4] * 64), {}))
    ended = [ids for ids in made.values() if 5 in ids]
    assert ended and all(ids.index(5) == len(ids) - 1 for ids in ended)
    assert all(len(ids) == MOST for ids in made.values() if 5 not in ids)


def test_a_task_is_solved_where_the_answer_begins_with_its_output(maker, small, monkeypatch):
    made, grid = maker(), [[4, 2], [0, 1]]
    monkeypatch.setattr(made, "_tokenizer", SimpleNamespace(decode=lambda ids: "```\n1: 42\n2: 01\n```\n"))
    found = list(made(prompts(small, [9, 9, 9]), {0: grid, 1: [[4, 2]]}))
    assert [each.notes for each in found] == [{"solved": 1}, {"solved": 0}, {}]


@pytest.mark.parametrize("name", PROMPT_FORMATS)
def test_an_answers_grid_is_read_back(name):
    layout, grid = PROMPT_FORMATS[name], [[1, 0, 2], [9, 9, 4]]
    text = layout.show(0, 0, grid).text
    for answer in (text, text + "and so on", "\n" + text.rstrip()):
        assert layout.read(answer) == grid, answer
    assert layout.read("I do not know") is None and layout.read("") is None
