"""Texts put together from pieces have the very tokens that the tokenizer gives to the whole."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.data import tokens
from qwen_jax.data.layouts import PROMPT_FORMATS, Prompt
from qwen_jax.data.tokens import batch_tokenizer

# What the pattern treats in ways of its own: contractions, blanks of all kinds, marks before letters, special tokens.
PARTS = (
    *("0", "7", "42", "'s", "'LL", "'", " ", "  ", "\n", "\r\n", "\t", "\x0b", "a", "Grid", " the", "_x"),
    *("```", ":", " :", "],[", "<|im_end|>", "<|im_start|>", "\x00", "\x7f"),
)
ODD = ("é", "e\u0301", "0\u0338", "²", "世", "\u2003", "👋", "٣")


def check(tokenizer, texts: list[str]) -> None:
    for text, found in zip(texts, batch_tokenizer(tokenizer)(texts), strict=True):
        wanted = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert found.ids.tolist() == wanted["input_ids"], text
        assert found.spans.tolist() == [list(span) for span in wanted["offset_mapping"]], text
        assert found.ids.dtype == found.spans.dtype == np.int32
        assert found.spans.shape == (len(found.ids), 2)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(PARTS + ODD), max_size=25).map("".join), max_size=4))
def test_any_text(tokenizer, texts):
    check(tokenizer, texts)


@settings(max_examples=150, deadline=None)
@given(text=st.lists(st.sampled_from(PARTS), max_size=40).map("".join))
def test_any_ascii_text(tokenizer, text):
    check(tokenizer, [text, "1" + text, text + "2", "3" + text + "4"])


def test_no_text(tokenizer):
    assert batch_tokenizer(tokenizer)([]) == []
    check(tokenizer, ["", "7", ""])


@pytest.mark.parametrize("prompt_format", PROMPT_FORMATS)
def test_prompts(tokenizer, arc_tasks, prompt_format):
    prompts = [Prompt(PROMPT_FORMATS[prompt_format].segments(task)) for task in arc_tasks[::40]]
    check(tokenizer, [prompt.text for prompt in prompts])


def test_what_was_learnt_is_forgotten_in_time(demo_tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "_KEPT_TOKENS", 50)
    tokenize = batch_tokenizer(demo_tokenizer)
    for number in range(30):
        text = f"1 word{'s' * number} 2"
        assert tokenize([text])[0].ids.tolist() == demo_tokenizer(text)["input_ids"]
        assert len(tokenize._ids) < 200


class Asked:
    """A tokenizer that counts the texts that it is asked for."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.texts = []

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, texts, **settings):
        self.texts += texts
        return self._tokenizer(texts, **settings)


def test_prompts_of_grids_are_made_of_few_pieces(tokenizer, arc_tasks):
    asked = Asked(tokenizer)
    tokenize = batch_tokenizer(asked)
    texts = [Prompt(PROMPT_FORMATS["rows"].segments(task)).text for task in arc_tasks]
    tokenize(texts[:20])
    few = len(asked.texts)
    tokenize(texts[20:])
    assert few < 50 and len(asked.texts) < few + 10


def unlike_qwen(tokenizer, name: str):
    """The tokenizer with one property less than it takes."""
    from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

    changed = copy.deepcopy(tokenizer)
    backend = changed.backend_tokenizer
    if name == "digits in pairs":
        split = pre_tokenizers.Split(Regex(r"\p{N}{1,2}|\P{N}+"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    if name == "another normalizer":
        backend.normalizer = normalizers.Lowercase()
    if name == "a special token of digits":
        changed.add_tokens([AddedToken("<|12|>")])
    if name == "a special token that looks around":
        changed.add_tokens([AddedToken("abc", single_word=True)])
    return changed


@pytest.mark.parametrize(
    "name",
    [
        "digits in pairs",
        "another normalizer",
        "a special token of digits",
        "a special token that looks around",
    ],
)
def test_other_tokenizers_read_whole_texts(demo_tokenizer, name):
    asked = Asked(unlike_qwen(demo_tokenizer, name))
    texts = ["AB 12 <|12|> 1abc2 abc", "12"]
    check(asked._tokenizer, texts)
    batch_tokenizer(asked)(texts)
    assert asked.texts == texts
