"""The bundled demo model is what its script records; tests/reading/test_reading_doc.py has what it solves."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from examples.demo import train_model
from qwen_jax.model.attention import make_form

MODEL = train_model.DEMO / "model"


def test_the_model_is_the_recorded_one_and_its_other_files_are_what_the_script_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # the script sets it; this gives it back
    recorded = json.loads((train_model.DEMO / "trained.json").read_text())
    assert hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest() == recorded["sha256"]
    assert json.loads((MODEL / "config.json").read_text()) == train_model.CONFIG
    train_model.write_tokenizer(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (MODEL / path.name).read_bytes(), path.name


def test_the_tokenizer_is_trained_on_whole_prompts():
    prompts = train_model.demo_prompts()
    assert len(prompts) == 96
    assert all("Example 1\nInput:\n```\n1: " in prompt and prompt.endswith("Output:\n") for prompt in prompts)


def test_a_lesson_wants_every_output_and_the_end():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    stages = [train_model.Stage(1, ("copy", "count"), 3)]
    (lesson,) = train_model.Teacher(tokenizer).lessons(stages)
    for tokens, wanted, weights in zip(*lesson, strict=True):
        *_, text = tokenizer.decode(tokens).split("Output:\n")
        answer, _, _ = text.partition("<|im_end|>")
        next_tokens = tokens[wanted[weights > 0] + 1]
        assert tokenizer.decode(next_tokens).endswith(answer + "<|im_end|>")
        assert tokenizer.decode(next_tokens).count("```") == 2 * 3  # three grids
    assert set(np.unique(lesson.weights_BM)) == {0, np.float32(train_model.FIRST_OUTPUT_WEIGHT), 1}


@pytest.mark.wide
def test_attention_in_training_is_that_of_the_worker():
    rng = np.random.default_rng(0)
    q_TNH, k_TKH, v_TKH = (jnp.asarray(rng.normal(size=(150, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    nothing = tuple(
        jnp.zeros(shape) for shape in make_form("blocked", "cpu", 150, 8).carried_shapes(8, 2, 16)
    )
    theirs, _ = make_form("blocked", "cpu", 150, 8)(jnp.arange(150))(q_TNH, k_TKH, v_TKH, nothing)
    ours, _ = train_model.attend(q_TNH, k_TKH, v_TKH, ())
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_loss_falls():
    stages = [train_model.Stage(60, ("copy",), 2)]
    _, losses = train_model.train(AutoTokenizer.from_pretrained(MODEL), stages)
    assert len(losses) == 60 and np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
