"""Properties of the model that hold whatever the weights are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.data.steps import StepShape
from qwen_jax.model.capture import Compilation
from qwen_jax.model.config import parse_config
from qwen_jax.model.decoder import abstract_model, parameter_count
from qwen_jax.model.program import Program, block_sums, rows_from
from qwen_jax.model.published import OTHER_FAMILIES, PUBLISHED, config_fields
from tests.model.conftest import program_of, run, run_taps

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Parameters of the published checkpoints, as their model cards and safetensors headers count them.
KNOWN_COUNTS = {
    "0.5B": 494_032_768,
    "1.5B": 1_543_714_304,
    "3B": 3_085_938_688,
    "7B": 7_615_616_512,
    "14B": 14_770_033_664,
    "32B": 32_763_876_352,
    "72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Mistral-7B-v0.3": 7_248_023_552,
}


def published_config(size: str):
    return parse_config(config_fields(size))


@pytest.mark.parametrize("size", KNOWN_COUNTS)
def test_parameter_counts_of_all_published_sizes(size):
    assert KNOWN_COUNTS.keys() == PUBLISHED.keys() | OTHER_FAMILIES.keys()
    assert parameter_count(published_config(size)) == KNOWN_COUNTS[size]


def test_parameters_are_stacked_over_the_layers():
    model = abstract_model(published_config("72B"), 80, jnp.bfloat16)
    assert model.blocks.attn.q_NHD.shape == (80, 64, 128, 8192)
    assert model.blocks.mlp.down_DF.shape == (80, 8192, 29568)


@pytest.mark.wide
def test_a_later_token_changes_nothing_before_it(small):
    model = small.ours()
    tokens = small.tokens(1, 120)
    changed = tokens.copy()
    changed[0, 73] += 1
    before, after = (run(model, t, range(small.config.num_layers)) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :, :73], after[:, :, :73])
    assert np.abs(before[:, :, 73:] - after[:, :, 73:]).max() > 1e-3


@pytest.mark.wide
def test_taps_add_up_to_the_residual_stream(small):
    model, tokens = small.ours(), small.tokens(2, 15)
    layers = range(small.config.num_layers)
    residual, attn, mlp = run_taps(model, tokens, layers, ("residual", "attn", "mlp")).values()
    np.testing.assert_allclose(residual[1:], residual[:-1] + attn[1:] + mlp[1:], atol=1e-5)


@pytest.mark.wide
def test_chosen_layers_are_those_of_a_full_run(small):
    """Also with the deeper layers neither loaded nor run."""
    tokens = small.tokens(2, 15)
    full = np.asarray(run(small.ours(), tokens, range(small.config.num_layers)))
    chosen = np.asarray(run(small.ours(num_layers=3), tokens, (0, 2)))
    np.testing.assert_allclose(chosen, full[[0, 2]], rtol=0, atol=1e-6 * np.abs(full).max())


def abstract_step(config, num_layers: int, layers, tokens: int = 64):
    """The step over a model of shapes alone, lowered."""
    shape = StepShape(tokens, 64)
    model = abstract_model(config, num_layers, jnp.float32)
    return program_of(model, layers, ["residual"], shape).lower_step()


@pytest.mark.wide
def test_only_the_chosen_layers_are_held():
    """Of 24 layers, two requested: the compiled step needs less memory by the 22 others. Nothing is run."""
    config = published_config("0.5B")

    def bytes_needed(layers):
        memory = abstract_step(config, 24, layers).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    one_layer = 64 * config.hidden_size * 4
    assert bytes_needed((11, 23)) < bytes_needed(range(24)) - 21 * one_layer


def test_what_is_carried_on_takes_the_place_of_what_was_carried():
    """Beside it one layer's keys and values, old and new; of what the other layers carry, no copy."""
    model = abstract_model(published_config("0.5B"), 12, jnp.float32)

    def memory(positions: int):
        program = program_of(model, (11,), ["residual"], StepShape(64, positions))
        keys, rows = (
            sum(array.size * 4 for array in jax.tree.leaves(x))
            for x in (program.carried(), program.carried_rows())
        )
        return keys, rows, program.lower_step().compile().memory_analysis()

    (*_, few), (carried, rows, many) = memory(64), memory(8192)
    assert many.alias_size_in_bytes == carried + rows
    assert many.temp_size_in_bytes - few.temp_size_in_bytes < 1.1 * carried / 12


@pytest.mark.wide
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_stored_dtype_is_the_rounded_result(small, dtype):
    tokens = small.tokens(2, 15)
    layers = range(small.config.num_layers)
    exact = run(small.ours(), tokens, layers)
    stored = run(small.ours(), tokens, layers, stored_dtype=dtype)
    assert stored.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(stored.astype(np.float32), exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-5)


def test_the_program_is_as_long_for_one_layer_as_for_forty(small):
    """One traced layer, so compiling takes as long for any depth."""
    one, forty = (abstract_step(small.config, layers, range(layers)).as_text() for layers in (1, 40))
    assert one.count("dot_general") == forty.count("dot_general") > 0
    assert one.count("\n") == forty.count("\n")


@pytest.mark.parametrize("rows", [60, 9], ids=["", "fewer rows than a block"])
def test_blocks_sum_up_the_rows_that_count_and_no_other(rows):
    """Against float64; what stands before the rows belongs to blocks that began earlier, what stands behind to none."""
    rng = np.random.default_rng(0)
    size, stored = 16, rng.normal(300.0, 1.0, (2, 16 + rows, 8)).astype(np.float32)
    starts, counts = np.array([-16, -5, 3, rows - 3, 0], np.int32), np.array([16, 12, 4, 3, 0], np.int32)
    stored[1, 20, 5] = -4000.0
    before, here = jnp.asarray(stored[:, :size]), jnp.asarray(stored[:, size:])
    mean, squares, max_abs = block_sums(partial(rows_from, before, here), starts, counts, size)
    for block, (start, count) in enumerate(zip(starts[:-1] + size, counts[:-1], strict=True)):
        own = stored[:, start : start + count].astype(np.float64)
        np.testing.assert_allclose(mean[:, block], own.mean(axis=1), rtol=1e-5)
        np.testing.assert_allclose(squares[:, block], own.var(axis=1) * count, rtol=1e-4)
        np.testing.assert_array_equal(max_abs[:, block], np.abs(own).max(axis=1))
    assert max_abs[1, 2, 5] == 4000
    assert not np.any(max_abs[:, -1])
    np.testing.assert_array_equal(rows_from(before, here, rows - size), stored[:, rows:][:, :size])


def test_a_compilation_is_announced_and_said_again_while_it_lasts(small, caplog, monkeypatch):
    monkeypatch.setattr("qwen_jax.model.capture._SAID_EVERY_S", 0.005)
    with caplog.at_level("INFO", "qwen_jax.model.capture"):
        run(small.ours(), small.tokens(1, 70), [0])
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "compiling the step of 50 tokens: 4 layers, blocked attention"
    assert any(line.startswith("still compiling, for ") for line in said)
    assert said[-1].startswith("compiled in ") and sum(line.startswith("compiled") for line in said) == 1


def test_a_program_begun_early_is_compiled_once_and_its_failure_is_raised_where_it_is_wanted(
    small, caplog, monkeypatch
):
    compilation = Compilation(program_of(small.ours(), [0], ["residual"], StepShape(50, 70)))
    with caplog.at_level("INFO", "qwen_jax.model.capture"):
        compilation.begin()
        assert compilation.step(None) is compilation.step(None)
    assert sum("compiling" in record.getMessage() for record in caplog.records) == 1

    def refuses(*_):
        raise MemoryError("too large")

    monkeypatch.setattr(Program, "lower_step", refuses)
    compilation.begin(kept=10)
    with pytest.raises(MemoryError, match="too large"):
        compilation.step(10)
