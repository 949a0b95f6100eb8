"""examples/train_sae_jax.py on a random model's activations: what it reaches, and that it goes on exactly."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.reading.conftest import ROOT, extract
from tests.reading.random_model import write_random_model
from tests.waiting import until

pytestmark = pytest.mark.slow

DICTIONARY_LEARNING = 0.073
"""Unexplained variance that examples/train_dictionary_learning.py reaches with the same k, size, rows and steps."""
TOPK = ("--d_sae", 256, "--k", 16, "--batch_size", 512)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    return extract(root, model=write_random_model(root / "model"))


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "examples/train_sae_jax.py", *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def train(*arguments: object) -> dict[int, tuple[float, float]]:
    """Unexplained variance before and after, by layer."""
    training = start(*arguments)
    output, _ = training.communicate()
    assert training.returncode == 0
    print(output)
    said = re.findall(r"layer (\d+): .* samples ([\d.]+) before, ([\d.]+) after; \d+ features dead", output)
    return {int(layer): (float(before), float(after)) for layer, before, after in said}


def weights(folder: Path, layer: int) -> dict[str, np.ndarray]:
    return load_file(folder / f"layer_{layer:02d}" / "sae_weights.safetensors")


def test_topk_is_as_good_as_the_torch_recipe(run_folder, tmp_path):
    found = train(run_folder, "--layers", 2, *TOPK, "--steps", 300, "--output", tmp_path)
    assert found[2][0] > 0.5 and found[2][1] < 1.1 * DICTIONARY_LEARNING


def test_jumprelu_learns_too(run_folder, tmp_path):
    flags = ("--kind", "jumprelu", "--d_sae", 256, "--batch_size", 512, "--steps", 600)
    found = train(run_folder, "--layers", 2, *flags, "--output", tmp_path)
    assert found[2][1] < 0.1 and (weights(tmp_path, 2)["threshold"] > 0).all()


def test_it_goes_on_as_if_it_had_not_been_stopped(run_folder, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    flags = ("--layers", 1, 3, *TOPK, "--steps", 60, "--save_every", 1)
    train(run_folder, *flags, "--output", whole)
    stopped = start(run_folder, *flags, "--output", halves)
    until((halves / "state.safetensors").exists, 120)
    stopped.kill()
    assert stopped.wait() != 0
    train(run_folder, *flags, "--output", halves)
    for layer in (1, 3):
        for name, array in weights(whole, layer).items():
            np.testing.assert_array_equal(array, weights(halves, layer)[name])
