"""The recipes of docs/reading.md with the trainers' own packages, which live in an environment of their own.

python3 -m venv .venv-sae && .venv-sae/bin/pip install -r tests/requirements-sae.txt
.venv-sae/bin/pip uninstall -y torchvision  # where its build does not fit torch's, which stops transformers
SAE_PYTHON=.venv-sae/bin/python tests/run -m slow tests/reading/test_recipes.py
"""

import os
import re
import subprocess

import pytest

from qwen_jax.__main__ import main
from tests.reading.conftest import ROOT, extract

PYTHON = os.environ.get("SAE_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None, reason="SAE_PYTHON names no python with sae-lens and dictionary-learning"
    ),
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return extract(tmp_path_factory.mktemp("recipes"), "--layers_to_extract", "2")


def peer(*arguments: object) -> str:
    done = subprocess.run([PYTHON, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def unexplained(output: str) -> tuple[float, float]:
    before, after = re.search(r"variance: ([\d.]+) before, ([\d.]+) after", output).groups()
    return float(before), float(after)


def test_sae_lens_trains_on_shards(run_folder, tmp_path):
    flags = ("--layer", 2, "--d_sae", 256, "--samples", 300_000, "--batch_size", 512)
    output = peer("examples/train_saelens.py", run_folder, *flags, "--output", tmp_path / "sae")
    before, after = unexplained(output)
    print(output)
    assert after < 0.5 < before


def test_dictionary_learning_trains_on_shards(run_folder, tmp_path):
    flags = ("--layer", 2, "--dict_size", 256, "--k", 16, "--steps", 300, "--batch_size", 512)
    output = peer(
        "examples/train_dictionary_learning.py", run_folder, *flags, "--output", tmp_path / "dictionary"
    )
    before, after = unexplained(output)
    print(output)
    assert after < 0.5 < before


STORE = """
import sys, torch
from sae_lens.training.activations_store import ActivationsStore

store = ActivationsStore(
    model=None, dataset=None, streaming=False, hook_name="blocks.2.hook_resid_post", hook_head_index=None,
    context_size=128, d_in=64, n_batches_in_buffer=8, total_training_tokens=4096, store_batch_size_prompts=4,
    train_batch_size_tokens=512, prepend_bos=False, normalize_activations="none", device=torch.device("cpu"),
    dtype="float32", cached_activations_path=sys.argv[1],
)
rows, tokens = store.get_raw_llm_batch()
print(tuple(rows.reshape(-1, 64).shape), tuple(tokens.shape), float(rows.norm(dim=-1).mean()))
"""


def test_sae_lens_reads_an_export_as_its_cached_activations(run_folder, tmp_path):
    export = [
        "export",
        str(run_folder),
        "--to",
        "hf_dataset",
        "--output",
        str(tmp_path),
        "--context_size",
        "128",
    ]
    assert main(export) == 0
    shape, norm = peer("-c", STORE, tmp_path / "layer_02").strip().rsplit(" ", 1)
    assert shape == "(512, 64) (512,)"
    assert 5 < float(norm) < 20
