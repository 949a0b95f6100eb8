"""Other people's tools on our rows, each in its newest release, in the environment of tests/reading/test_recipes.py."""

import os
import subprocess

import pytest

from tests.reading.conftest import ROOT, extract
from tests.reading.random_model import write_random_model
from tests.reading.test_train_jax import train

PYTHON = os.environ.get("SAE_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="SAE_PYTHON names no python with these"),
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("doors")
    return extract(root, "--layers_to_extract", "2", model=write_random_model(root / "model"))


def peer(program: str, *arguments: object) -> str:
    """The last line that it prints: some tools speak first."""
    done = subprocess.run(
        [PYTHON, "-c", program, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


SPARSIFY = """
import sys, torch
from sparsify import SparseCoder, SparseCoderConfig
from qwen_jax.reading.torch import ActivationDataset

torch.manual_seed(0)
coder = SparseCoder(64, SparseCoderConfig(num_latents=256, k=16))
optimizer = torch.optim.Adam(coder.parameters(), lr=1e-3)
left = []
dataset = ActivationDataset(sys.argv[1], 2, 512)
for _ in range(4):
    for rows in dataset:
        loss = coder(rows).fvu
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        coder.set_decoder_norm_to_unit_norm()
        left.append(loss.item())
coder.save_to_disk(sys.argv[2])
print(left[0], left[-1], SparseCoder.load_from_disk(sys.argv[2])(rows).fvu.item())
"""


def test_sparsifys_coder_trains_on_rows(run_folder, tmp_path):
    first, last, loaded = map(float, peer(SPARSIFY, run_folder, tmp_path).split())
    assert last < 0.3 * first and loaded < 0.3 * first


DELPHI = """
import sys
from pathlib import Path
import torch
from delphi.latents.cache import LatentCache
from safetensors.numpy import load_file
from sparsify import SparseCoder, SparseCoderConfig
from qwen_jax.reading import iter_samples

torch.manual_seed(0)
coder = SparseCoder(64, SparseCoderConfig(num_latents=256, k=16))
cache = LatentCache(None, {"layers.2": coder.encode}, batch_size=1)
cache.width = coder.num_latents
rows = 0
for number, sample in enumerate(iter_samples(sys.argv[1], layers=[2])):
    context = torch.from_numpy(sample["activations"][2][:128])[None]
    tokens = torch.from_numpy(sample["token_ids"][:128])[None]
    acts, places, _ = coder.encode(context)
    latents = torch.zeros(1, context.shape[1], coder.num_latents).scatter_(-1, places, acts)
    cache.cache.add(latents.detach(), tokens, number, "layers.2")
    rows += context.shape[1]
cache.cache.save()
cache.save_splits(2, Path(sys.argv[2]))
parts = [load_file(path) for path in sorted(Path(sys.argv[2]).rglob("*.safetensors"))]
print(rows, sum(len(part["activations"]) for part in parts), *parts[0]["tokens"].shape)
"""


def test_delphi_caches_latents_of_samples(run_folder, tmp_path):
    rows, latents, samples, context = map(int, peer(DELPHI, run_folder, tmp_path).split())
    assert (samples, context, rows) == (36, 128, 36 * 128) and 0.9 * 16 * rows < latents <= 16 * rows


RECONSTRUCTION = """
import sys, torch
from sae_lens import SAE
from qwen_jax.reading import iter_activations

sae = SAE.load_from_disk(sys.argv[2])
(rows,) = map(torch.from_numpy, iter_activations(sys.argv[1], 2, 10**6))
with torch.no_grad():
    left = (sae(rows) - rows).square().sum() / (rows - rows.mean(0)).square().sum()
print(type(sae).__name__, float(left), sae.cfg.metadata.hook_name)
"""


@pytest.mark.parametrize("kind, name", [("topk", "TopKSAE"), ("jumprelu", "JumpReLUSAE")])
def test_sae_lens_loads_what_the_jax_example_saves(run_folder, tmp_path, kind, name):
    flags = [
        "--layers",
        "2",
        "--kind",
        kind,
        "--d_sae",
        "256",
        "--k",
        "16",
        "--batch_size",
        "512",
        "--steps",
        "300",
    ]
    train(run_folder, *flags, "--output", tmp_path)
    found, left, hook = peer(RECONSTRUCTION, run_folder, tmp_path / "layer_02").split()
    assert found == name and float(left) < 0.15 and hook == "blocks.2.hook_resid_post"
