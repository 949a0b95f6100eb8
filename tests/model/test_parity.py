"""Our hidden states are Hugging Face's: every layer of every tap, module by module and as a stack."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from qwen_jax.data.steps import StepShape
from qwen_jax.kinds import KINDS
from qwen_jax.model.attention import Blocked
from qwen_jax.model.capture import Capture
from qwen_jax.model.config import read_config
from qwen_jax.model.decoder import Shared, rope_tables
from qwen_jax.model.sharding import make_mesh
from qwen_jax.model.weights import load_model, open_checkpoint
from tests.hf_reference import load_reference, reference_taps
from tests.model.conftest import capture_samples, compilation, joined, program_of, run, run_taps, samples_of

MODULE_TOLERANCE = 1e-5
STACK_TOLERANCE = 1e-4
GOLDEN = Path(__file__).parent / "golden"
MODULES = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


def worst_error(ours, theirs) -> float:
    """The largest error, relative to the largest value of its own channel and of its own layer's typical one.

    Dividing by the layer's maximum alone would hide everything behind the outlier channels.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    error = np.abs(ours - theirs).reshape(-1, theirs.shape[-1])
    scale = np.abs(theirs).reshape(-1, theirs.shape[-1]).max(axis=0)
    return float((error.max(axis=0) / np.maximum(scale, np.median(scale))).max())


@pytest.mark.parametrize("rows, length", [(2, 130)])
def test_every_layer_of_every_tap(reference, rows, length):
    tokens = reference.tokens(rows, length)
    theirs = reference_taps(reference.hf, tokens)
    ours = run_taps(reference.ours(), tokens, range(reference.config.num_layers), tuple(KINDS))
    for tap in KINDS:
        for layer in range(reference.config.num_layers):
            assert worst_error(ours[tap][layer], theirs[tap][layer]) < STACK_TOLERANCE, (tap, layer)


@pytest.mark.wide
def test_long_samples_over_many_steps_and_blocks_of_keys(small):
    tokens = small.tokens(1, 1300)
    theirs = reference_taps(small.hf, tokens)["residual"]
    ours = run(small.ours(), tokens, range(small.config.num_layers), step_tokens=300)
    assert worst_error(ours, theirs) < STACK_TOLERANCE


def test_samples_of_unequal_lengths_in_one_row(reference):
    """Each equals the same prompt alone in Hugging Face, whatever stands beside it."""
    shape = StepShape(50, 130)
    prompts = [reference.tokens(1, n)[0] for n in (24, 5, 130, 1, 50, 102)]
    layers = range(reference.config.num_layers)
    capture = Capture(
        compilation(program_of(reference.ours(), layers, tuple(KINDS), shape)), reference.ours()
    )
    for sample in capture_samples(capture, shape, samples_of(prompts)):
        theirs = reference_taps(reference.hf, sample.tokenized.token_ids[None])
        for tap in KINDS:
            assert worst_error(joined(sample, tap), theirs[tap][:, 0]) < STACK_TOLERANCE, (
                tap,
                sample.sample_idx,
            )


def test_hidden_states_of_hugging_face_are_our_layers_shifted_by_one(reference):
    """hidden_states[i + 1] is our layer i, but for the last, which Hugging Face norms."""
    tokens = reference.tokens(2, 9)
    with torch.no_grad():
        theirs = reference.hf(
            torch.from_numpy(tokens.astype(np.int64)), output_hidden_states=True
        ).hidden_states
    last = reference.config.num_layers - 1
    ours = run_taps(reference.ours(), tokens, range(last + 1), tuple(KINDS), positions=130)["residual"]
    for layer in range(last):
        assert worst_error(ours[layer], theirs[layer + 1].numpy()) < STACK_TOLERANCE
    assert worst_error(ours[last], theirs[last + 1].numpy()) > 0.01


@pytest.mark.wide
def test_each_module_alone(reference):
    """Given Hugging Face's own input, each module's output is within the tighter module tolerance."""
    tokens = reference.tokens(1, 33)
    caught = _module_inputs_and_outputs(reference.hf, tokens)
    graph, params = nnx.split(reference.ours().blocks)
    form = Blocked()
    shapes = form.carried_shapes(8, reference.config.num_kv_heads, reference.config.head_dim)
    carried = tuple(jnp.zeros(shape) for shape in shapes)

    @jax.jit
    def modules(layer_params, given):
        block = nnx.merge(graph, layer_params)
        shared = Shared(*rope_tables(reference.config, 33), form(jnp.arange(33)))
        return {
            "input_layernorm": block.attn_norm(given["input_layernorm"]),
            "self_attn": block.attn(given["self_attn"], shared, carried)[0],
            "post_attention_layernorm": block.mlp_norm(given["post_attention_layernorm"]),
            "mlp": block.mlp(given["mlp"]),
        }

    for layer in range(reference.config.num_layers):
        given = {name: jnp.asarray(caught[layer, name][0][0]) for name in MODULES}
        found = modules(jax.tree.map(lambda leaf, i=layer: leaf[i], params), given)
        for name in MODULES:
            assert worst_error(found[name], caught[layer, name][1][0]) < MODULE_TOLERANCE, (layer, name)


def test_the_norm_of_a_tiny_input_uses_eps(small):
    """At 1e-4 the mean square is below eps, which then decides the scale."""
    tiny = np.random.default_rng(1).normal(0, 1e-4, (2, 3, small.config.hidden_size)).astype(np.float32)
    with torch.no_grad():
        expected = small.hf.model.layers[0].input_layernorm(torch.from_numpy(tiny)).numpy()
    graph, params = nnx.split(small.ours().blocks)
    block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], params))
    assert worst_error(block.attn_norm(jnp.asarray(tiny)), expected) < MODULE_TOLERANCE


def _module_inputs_and_outputs(hf, tokens) -> dict:
    caught = {}

    def keep(key):
        def hook(module, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            result = output[0] if isinstance(output, tuple) else output
            caught[key] = (given.detach().numpy().copy(), result.detach().numpy().copy())

        return hook

    handles = [
        getattr(block, name).register_forward_hook(keep((layer, name)), with_kwargs=True)
        for layer, block in enumerate(hf.model.layers)
        for name in MODULES
    ]
    with torch.no_grad():
        hf.model(torch.from_numpy(tokens.astype(np.int64)))
    for handle in handles:
        handle.remove()
    return caught


def test_bfloat16_is_as_close_to_float32_as_hugging_faces_own(reference):
    """bfloat16 rounds at the same points as Hugging Face: cosine above 0.999, and no worse than theirs."""
    tokens = reference.tokens(2, 40)
    exact = reference_taps(reference.hf, tokens)["residual"]
    theirs = reference_taps(load_reference(reference.folder, "bfloat16"), tokens)["residual"]
    ours = np.asarray(
        run(reference.ours(jnp.bfloat16), tokens, range(reference.config.num_layers)), np.float32
    )
    check_bfloat16(ours, theirs, exact)


def check_bfloat16(ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray) -> None:
    """[L, B, T, D] each, the first two computed in bfloat16."""
    for layer in range(len(exact)):
        our_error, their_error = (_relative_error(x[layer], exact[layer]) for x in (ours, theirs))
        print(f"layer {layer}: relative error ours {our_error:.2e}, Hugging Face {their_error:.2e}")
        assert _cosine(ours[layer], exact[layer]) > 0.999
        assert our_error < 0.02
        assert our_error < 1.5 * their_error


def _relative_error(x, exact) -> float:
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


def _cosine(x, exact) -> float:
    """The smallest cosine over the tokens."""
    dots = (x * exact).sum(-1)
    return float((dots / (np.linalg.norm(x, axis=-1) * np.linalg.norm(exact, axis=-1))).min())


@pytest.mark.wide
def test_golden_file_without_torch():
    """What tests/model/make_golden.py recorded from Hugging Face; needs neither torch nor transformers."""
    expected = np.load(GOLDEN / "taps.npz")
    config = read_config(GOLDEN)
    model = load_model(open_checkpoint(GOLDEN), config, config.num_layers, jnp.float32, make_mesh())
    taps = [name for name in expected.files if name != "tokens"]
    ours = run_taps(model, expected["tokens"], range(config.num_layers), taps)
    for tap in taps:
        assert worst_error(ours[tap], expected[tap]) < STACK_TOLERANCE, tap


def test_golden_file_states_its_source():
    assert json.loads((GOLDEN / "config.json").read_text())["model_type"] == "qwen2"
