"""Properties of the model that hold whatever the weights are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen_jax.model.capture import Capture, summarise
from qwen_jax.model.config import parse_config
from qwen_jax.model.qwen2 import abstract_model, parameter_count
from qwen_jax.model.sharding import make_mesh
from tests.hf_reference import PUBLISHED
from tests.model.conftest import run

# Parameters of the published checkpoints, as their model cards and safetensors headers count them.
KNOWN_COUNTS = {
    "0.5B": 494_032_768,
    "1.5B": 1_543_714_304,
    "3B": 3_085_938_688,
    "7B": 7_615_616_512,
    "14B": 14_770_033_664,
    "32B": 32_763_876_352,
    "72B": 72_706_203_648,
}


def published_config(size: str):
    hidden, mlp, layers, heads, kv_heads, vocab, tied = PUBLISHED[size]
    return parse_config(
        {
            "model_type": "qwen2",
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "tie_word_embeddings": tied,
            "rope_theta": 1e6,
        }
    )


@pytest.mark.parametrize("size", KNOWN_COUNTS)
def test_parameter_counts_of_all_published_sizes(size):
    assert parameter_count(published_config(size)) == KNOWN_COUNTS[size]


def test_parameters_are_stacked_over_the_layers():
    model = abstract_model(published_config("72B"), 80, jnp.bfloat16)
    assert model.blocks.attn.q_NHD.shape == (80, 64, 128, 8192)
    assert model.blocks.mlp.down_DF.shape == (80, 8192, 29568)


def test_a_later_token_changes_nothing_before_it(small):
    model = small.ours()
    tokens = small.tokens(1, 20)
    changed = tokens.copy()
    changed[0, 13] += 1
    before, after = (np.asarray(run(model, t, range(small.config.num_layers))) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :, :13], after[:, :, :13])
    assert np.abs(before[:, :, 13:] - after[:, :, 13:]).max() > 1e-3


def test_a_row_is_bit_equal_whatever_its_batch_mates_its_place_and_the_padding(small):
    step = Capture(small.ours(), range(small.config.num_layers), ["residual"], "float32", make_mesh())
    tokens = small.tokens(4, 32)
    others = small.tokens(4, 32)[::-1] + 1
    others %= small.config.vocab_size
    others[2, :21] = tokens[0, :21]
    alone = np.asarray(step(tokens).taps["residual"].activations_CBRD)[:, 0, :21]
    among = np.asarray(step(others).taps["residual"].activations_CBRD)[:, 2, :21]
    np.testing.assert_array_equal(alone, among)


def test_jit_is_no_jit(small):
    model, tokens = small.ours(), small.tokens(2, 15)
    layers = range(small.config.num_layers)
    jitted = Capture(model, layers, ["mlp"], "float32", make_mesh())(tokens).taps["mlp"].activations_CBRD
    with jax.disable_jit():
        plain = run(model, tokens, layers, "mlp")
    np.testing.assert_allclose(jitted, plain, rtol=0, atol=1e-5 * float(jnp.abs(plain).max()))


def test_taps_add_up_to_the_residual_stream(small):
    model, tokens = small.ours(), small.tokens(2, 15)
    layers = range(small.config.num_layers)
    residual, attn, mlp = (np.asarray(run(model, tokens, layers, tap)) for tap in ("residual", "attn", "mlp"))
    np.testing.assert_allclose(residual[1:], residual[:-1] + attn[1:] + mlp[1:], atol=1e-5)


def test_chosen_layers_are_those_of_a_full_run(small):
    """Also with the deeper layers neither loaded nor run."""
    tokens = small.tokens(2, 15)
    full = np.asarray(run(small.ours(), tokens, range(small.config.num_layers)))
    chosen = np.asarray(run(small.ours(num_layers=3), tokens, (0, 2)))
    np.testing.assert_allclose(chosen, full[[0, 2]], rtol=0, atol=1e-6 * np.abs(full).max())


def test_only_the_chosen_layers_are_held():
    """Of 24 layers, two requested: the compiled step needs less memory by the 22 others. Nothing is run."""
    config = published_config("0.5B")
    graph, params = nnx.split(abstract_model(config, 24, jnp.float32))
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)

    def bytes_needed(layers):
        step = jax.jit(lambda params, tokens: run(nnx.merge(graph, params), tokens, layers))
        memory = step.lower(params, tokens).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    one_layer = tokens.size * config.hidden_size * 4
    assert bytes_needed((11, 23)) < bytes_needed(range(24)) - 21 * one_layer


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_stored_dtype_is_the_rounded_result(small, dtype):
    tokens = small.tokens(2, 9)
    layers = range(small.config.num_layers)
    exact = np.asarray(run(small.ours(), tokens, layers))
    captured = Capture(small.ours(), layers, ["residual"], dtype, make_mesh())(tokens).taps["residual"]
    stored = np.asarray(captured.activations_CBRD)
    assert stored.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(stored.astype(np.float32), exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-5)
    norms = np.linalg.norm(stored.astype(np.float32), axis=-1)
    np.testing.assert_allclose(captured.norms_CBR, norms, rtol=1e-5)


def test_the_program_is_as_long_for_one_layer_as_for_forty(small):
    """One traced layer, so compiling takes as long for any depth."""

    def program(num_layers: int) -> str:
        model = abstract_model(small.config, num_layers, jnp.float32)
        graph, params = nnx.split(model)
        jitted = jax.jit(lambda params, tokens: run(nnx.merge(graph, params), tokens, range(num_layers)))
        return jitted.lower(params, jax.ShapeDtypeStruct((2, 64), jnp.int32)).as_text()

    one, forty = program(1), program(40)
    assert one.count("dot_general") == forty.count("dot_general") > 0
    assert one.count("\n") == forty.count("\n")


def test_a_tap_sums_up_the_rows_that_count_and_no_other():
    """Against float64; the last rows of a sample and whole dummy samples hold what must not be seen."""
    rng = np.random.default_rng(0)
    stored = rng.normal(300.0, 1.0, (2, 3, 50, 8)).astype(np.float32)
    counts = np.array([50, 7, 0], np.int32)
    for sample, count in enumerate(counts):
        stored[:, sample, count:] = -1e6
    stored[1, 1, 3, 5] = -4000.0
    tap = summarise(jnp.asarray(stored), jnp.asarray(counts))
    for sample, count in enumerate(counts[:2]):
        rows = stored[:, sample, :count].astype(np.float64)
        np.testing.assert_allclose(tap.mean_CBD[:, sample], rows.mean(axis=1), rtol=1e-5)
        np.testing.assert_allclose(tap.squares_CBD[:, sample], rows.var(axis=1) * count, rtol=1e-5)
        np.testing.assert_array_equal(tap.max_abs_CBD[:, sample], np.abs(rows).max(axis=1))
    assert tap.max_abs_CBD[1, 1, 5] == 4000
    assert not np.any(tap.max_abs_CBD[:, 2])
