"""The loader reads every layout of checkpoint alike, and closes the books on everything else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qwen_jax.errors import ConfigError, StorageError
from qwen_jax.model.sharding import make_mesh
from qwen_jax.model.source import fetch_model
from qwen_jax.model.weights import load_model, open_checkpoint
from tests.hf_reference import load_reference, make_reference, save_reference


def load(folder, config, dtype=jnp.float32, num_layers=None):
    return load_model(open_checkpoint(folder), config, num_layers or config.num_layers, dtype, make_mesh())


def leaves(model) -> dict:
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_same(model, other):
    ours, theirs = leaves(model), leaves(other)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=str(path))


@pytest.fixture
def copy(small, tmp_path):
    """A checkpoint of its own to spoil: (folder, tensors, save)."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(small.folder, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    return folder, tensors, lambda: save_file(tensors, file)


def test_a_checkpoint_of_many_files_equals_a_single_file(small, tmp_path):
    save_reference(load_reference(small.folder), tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(load(tmp_path, small.config), small.ours())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_are_read_exactly(small, tmp_path, dtype):
    rounded = load_reference(small.folder)
    save_reference(rounded, tmp_path, dtype)
    model = leaves(load(tmp_path, small.config))
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = rounded.state_dict()[name].float().numpy()
    np.testing.assert_array_equal(model["blocks", "attn", "q_NHD"][1].reshape(expected.shape), expected)


def test_weights_lie_on_the_device_in_the_compute_dtype(small):
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(small.ours(jnp.bfloat16)))} == {
        jnp.dtype("bfloat16")
    }


def test_deeper_layers_are_not_loaded(small):
    assert small.ours(num_layers=2).blocks.mlp.up_FD.shape[0] == 2


def test_an_untied_lm_head_is_left_out_on_purpose(reference):
    """reference covers tied and untied; neither has a parameter of the head."""
    assert ("embed_VD",) in leaves(reference.ours())
    assert len(leaves(reference.ours())) == 13


def test_all_faults_are_raised_at_once_by_name(small, copy):
    folder, tensors, save = copy
    del tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(3, np.float32)
    tensors["model.layers.1.mlp.extra.weight"] = np.zeros(3, np.float32)
    tensors["model.layers.1.self_attn.v_proj.bias"] = tensors["model.layers.1.self_attn.v_proj.bias"].astype(
        int
    )
    save()
    with pytest.raises(ConfigError) as caught:
        load(folder, small.config)
    for words in (
        "missing model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias has shape (3,)",
        "unknown model.layers.1.mlp.extra.weight",
        "v_proj.bias is I64",
    ):
        assert words in str(caught.value)


def test_a_tensor_in_two_files_is_refused(small, copy):
    folder, tensors, _ = copy
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "more.safetensors")
    files = dict.fromkeys(tensors, "model.safetensors") | {"x": "more.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(ConfigError, match="twice: model.norm.weight"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "index, words",
    [("{", "not a safetensors index"), ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors")],
)
def test_a_broken_index_is_named(copy, index, words):
    folder, _, _ = copy
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match=words):
        open_checkpoint(folder)


def test_a_torn_file_is_named(copy):
    folder, _, _ = copy
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        open_checkpoint(folder)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(ConfigError, match="neither"):
        open_checkpoint(tmp_path)


def test_digest_sees_a_single_changed_weight(small, copy):
    folder, tensors, save = copy
    before = open_checkpoint(folder).digest()
    assert before == open_checkpoint(small.folder).digest()
    tensors["model.norm.weight"][0] += 1
    save()
    assert open_checkpoint(folder).digest() != before


def test_sources(tmp_path):
    """A folder is itself; a folder that is not there and a hub out of reach are told apart."""
    assert fetch_model(str(tmp_path)).folder == tmp_path
    with pytest.raises(ConfigError, match="no such folder"):
        fetch_model(str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="revision"):
        fetch_model(str(tmp_path), "main")
    with pytest.raises(StorageError, match="hub|Hub"):
        fetch_model("Qwen/Qwen2.5-0.5B")
    with pytest.raises(ConfigError, match="neither a local folder"):
        fetch_model("not a valid id!")


def test_a_cached_hub_model_is_found_by_its_commit(small, tmp_path, monkeypatch):
    """The hub's own cache layout: refs name the commit, snapshots hold the files."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--Qwen--Qwen2.5-tiny"
    shutil.copytree(small.folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision in (None, "main", commit):
        source = fetch_model("Qwen/Qwen2.5-tiny", revision)
        assert (source.revision, source.folder) == (commit, repo / "snapshots" / commit)


LOADING = """
import json, sys, threading
import jax, jax.numpy as jnp
from qwen_jax.model.config import read_config
from qwen_jax.model.sharding import make_mesh
from qwen_jax.model.weights import load_model, open_checkpoint

def anonymous():  # without the pages of the mapped checkpoint, which the kernel may drop at any time
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

folder, done, seen = sys.argv[1], threading.Event(), []
config, mesh, checkpoint = read_config(folder), make_mesh(), open_checkpoint(folder)
jnp.zeros(1).block_until_ready()
before = anonymous()

def watch():
    while not done.is_set():
        seen.append(anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(checkpoint, config, config.num_layers, jnp.float32, mesh)
jax.block_until_ready(jax.tree.leaves(model))
done.set()
watcher.join()
held = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
layer = sum(leaf.nbytes for leaf in jax.tree.leaves(model.blocks)) // config.num_layers
print(json.dumps([max(seen) - before, held, layer]))
"""


@pytest.mark.wide
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_loading_takes_little_more_memory_than_the_model(stored, tmp_path):
    """On a CPU the model itself lies in host memory; beside it there is less than a layer."""
    folder = save_reference(make_reference(512, 4096, 6, 4, 2, 9999, True), tmp_path / "model", stored)
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(folder)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak, held, layer = json.loads(done.stdout)
    assert held < peak < held + layer
