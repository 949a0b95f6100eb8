"""A prompt format in a file: every cell is found, and the sandbox holds."""

import pytest

from qwen_jax.data.arc import Task
from qwen_jax.data.prompts import PromptEncoder
from qwen_jax.errors import ConfigError, UsageError
from tests.data.test_provenance import grids, shown

OWN = """\
{% set letters = "abcdefghij" %}
Which rule is it?
{% for pair in train %}
{{ loop.index }}. from
{{ pair.input }}
to
{% for row in pair.output %}
{{ loop.index }}) {% for cell in row %}{{ cell | shown(letters[cell]) }} {% endfor %}

{% endfor %}
{% endfor %}
Now:
{% for row in test_input %}{% for cell in row %}
{% if cell == 0 %}{{ cell | shown(".") }} {% else %}{{ cell }} {% endif %}
{% endfor %}|{% endfor %}
"""


def write(folder, text: str) -> str:
    path = folder / "mine.jinja"
    path.write_text(text)
    return str(path)


def test_every_cell_of_a_template_is_found(tokenizer, arc_tasks, tmp_path):
    encoder = PromptEncoder(tokenizer, write(tmp_path, OWN), max_seq_length=100_000, include_answer=True)
    for task in arc_tasks[::40]:
        sample = encoder.encode(0, task)
        for number, grid in enumerate(grids(task)):
            is_answer = number == 2 * len(task.train) + 1
            symbols = "0123456789" if is_answer or number % 2 == 0 else "abcdefghij"
            symbols = ".123456789" if number == 2 * len(task.train) else symbols
            assert shown(sample, tokenizer, number) == [[symbols[colour] for colour in row] for row in grid]


def test_the_text_is_what_the_template_says(demo_tokenizer, tmp_path):
    task = Task("t", [{"input": [[1, 2]], "output": [[3], [0]]}], [{"input": [[0, 5]]}])
    sample = PromptEncoder(demo_tokenizer, write(tmp_path, OWN)).encode(0, task)
    text = demo_tokenizer.decode(sample.token_ids)
    assert text == "Which rule is it?\n1. from\n12\n\nto\n1) d \n2) a \nNow:\n. 5 |"


def test_dropped_examples_keep_their_numbers(demo_tokenizer, tmp_path):
    wide = [[1] * 20] * 9
    task = Task("t", [{"input": wide, "output": wide}] * 3, [{"input": [[4, 2]]}])
    encoder = PromptEncoder(demo_tokenizer, write(tmp_path, OWN), max_seq_length=900)
    sample = encoder.encode(0, task)
    assert sample.dropped_examples > 0
    shown = set(sample.cells[sample.cells[:, 0] >= 0, 0].tolist())
    assert shown == set(range(2 * sample.dropped_examples, 7))


@pytest.mark.parametrize(
    "text, error",
    [
        ("no grid at all", UsageError),
        ("{{ test_input }}{{ test_input }}", UsageError),
        ("{% if %}", UsageError),
        ("{{ test_input.__class__.__mro__[1].__subclasses__() }}{{ test_input }}", ConfigError),
        ("{{ test_input.append(1) }}{{ test_input }}", ConfigError),
        ("{% include '/etc/hostname' %}{{ test_input }}", ConfigError),
        ("{{ test_input }}{{ 1 // 0 }}", ConfigError),
    ],
)
def test_what_is_no_format_is_refused_and_runs_no_code(demo_tokenizer, tmp_path, text, error):
    with pytest.raises(error, match="mine.jinja"):
        PromptEncoder(demo_tokenizer, write(tmp_path, text))


def test_a_file_that_is_not_there_is_named(demo_tokenizer, tmp_path):
    with pytest.raises(UsageError, match="gone.jinja"):
        PromptEncoder(demo_tokenizer, str(tmp_path / "gone.jinja"))
