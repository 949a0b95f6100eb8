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
from tests.reading.random_model import write_random_model

PYTHON = os.environ.get("SAE_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None, reason="SAE_PYTHON names no python with sae-lens and dictionary-learning"
    ),
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    return extract(root, "--layers_to_extract", "2", model=write_random_model(root / "model"))


def peer(*arguments: object) -> str:
    done = subprocess.run([PYTHON, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(output: str) -> None:
    """The loss falls from each part of the training to the next, and samples that were not trained on are told apart
    better than by their mean, which the untrained autoencoder is not."""
    print(output)
    losses = [float(loss) for loss in re.search(r"loss by .*: (.*)", output).group(1).split()]
    assert len(losses) == 10 and losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 3
    before, after = re.search(r"of held-out samples: ([\d.]+) before, ([\d.]+) after", output).groups()
    assert float(after) < 0.5 < 1 < float(before)


LOADED = """
import sys, torch
sys.path[:0] = ["examples"]
from recipe import held_out_rows, training_rows, unexplained
from sae_lens import SAE

sae = SAE.load_from_disk(sys.argv[2])
held_out = held_out_rows(sys.argv[1], 2, 4096)
trained = torch.cat(list(training_rows(sys.argv[1], 2, 512, epochs=1)))
print(unexplained(sae, held_out), sae.cfg.metadata.hook_name)
print(len({tuple(row) for row in held_out.tolist()} & {tuple(row) for row in trained.tolist()}))
"""


def test_sae_lens_trains_on_shards(run_folder, tmp_path):
    flags = ("--layer", 2, "--d_sae", 256, "--samples", 300_000, "--batch_size", 512)
    check(peer("examples/train_saelens.py", run_folder, *flags, "--output", tmp_path / "sae"))
    left, hook, common = peer("-c", LOADED, run_folder, tmp_path / "sae").split()
    assert float(left) < 0.5 and hook == "blocks.2.hook_resid_post"  # it takes rows as they are stored
    # Samples begin with the same tokens, so they share those rows, and no others.
    assert int(common) < 100


def test_dictionary_learning_trains_on_shards(run_folder, tmp_path):
    flags = ("--layer", 2, "--dict_size", 256, "--k", 16, "--steps", 300, "--batch_size", 512)
    check(
        peer("examples/train_dictionary_learning.py", run_folder, *flags, "--output", tmp_path / "dictionary")
    )


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
