"""Quantised rows: what the device stores of them is what the definition says, and each sample's own."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from qwen_jax.data.steps import StepShape
from qwen_jax.kinds import EXACT_CHANNELS, STORED_DTYPES
from qwen_jax.model import quantise as on_device
from qwen_jax.model.attention import Blocked
from qwen_jax.model.capture import Capture
from qwen_jax.model.program import Program
from qwen_jax.model.sharding import make_mesh
from qwen_jax.run.device_check import TINY
from qwen_jax.shards import QuantisedRows
from qwen_jax.shards.rows import restored
from tests.few import few
from tests.model.conftest import capture_samples, joined, samples_of
from tests.model.test_invariance import LENGTHS, assert_equal_bits

DTYPES = ("int8", "float8_e4m3fn")


def rows_with_everything(dtype) -> np.ndarray:
    """[2, n, 48]: massive channels, ties, nothing but zeros, one value alone, values of every size."""
    rng = np.random.default_rng(0)
    x_CRD = rng.standard_normal((2, 200, 48)) * 10.0 ** rng.uniform(-6, 6, (2, 200, 1))
    x_CRD[:, :, 7] *= 300
    x_CRD[:, 0], x_CRD[:, 1], x_CRD[:, 2] = 0, 5, np.where(np.arange(48) % 2, -3, 2)
    x_CRD[:, 3] = np.eye(48)[11] * -1e-3
    x_CRD[:, 4] = rng.standard_normal(48) * 1e-33
    return x_CRD.astype(dtype)


def of_layer(rows: on_device.Quantised, layer: int) -> QuantisedRows:
    return QuantisedRows(*(np.asarray(array)[layer] for array in rows))


def half_steps(rows: QuantisedRows, x_RD: np.ndarray) -> np.ndarray:
    """Half the distance of the values round each x that can be stored."""
    scale_R1 = rows.scale_N[:, None].astype(np.float64)
    if rows.dtype == np.int8:
        return np.broadcast_to(scale_R1 / 2, x_RD.shape)
    codes_RD = np.abs(x_RD) / np.maximum(scale_R1, 1e-300)
    return scale_R1 * 2.0 ** (np.floor(np.log2(np.clip(codes_RD, 2.0**-6, 448))) - 4)


@pytest.mark.parametrize("computed", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", few(DTYPES))
def test_rows_come_back_within_half_a_step_and_the_largest_values_exactly(dtype, computed):
    x_CRD = rows_with_everything(computed)
    found = jax.jit(partial(on_device.quantise, dtype=dtype))(x_CRD)
    again = np.asarray(jax.jit(on_device.restored)(found))
    for layer, x_RD in enumerate(x_CRD):
        rows = of_layer(found, layer)
        assert rows.fault is None and rows.dtype == jnp.dtype(dtype)
        expected_RK = np.argsort(-np.abs(x_RD.astype(np.float64)), axis=1, kind="stable")[:, :EXACT_CHANNELS]
        np.testing.assert_array_equal(rows.channels_NK, expected_RK)
        exact_RK = np.take_along_axis(x_RD, expected_RK, axis=1)
        assert rows.exact_NK.dtype == computed and rows.exact_NK.tobytes() == exact_RK.tobytes()
        wide_RD, values_RD = x_RD.astype(np.float64), restored(rows)
        apart_RD = np.abs(values_RD - wide_RD)
        assert (apart_RD <= 1.00002 * half_steps(rows, wide_RD) + 2.0**-100).all()
        rest_RD = np.array(wide_RD)
        np.put_along_axis(rest_RD, expected_RK, 0, axis=1)
        assert (apart_RD[rest_RD == 0] == 0).all()
        largest = np.abs(rows.codes.astype(np.float32)).max(axis=1)
        assert set(largest[np.abs(rest_RD).max(axis=1) > 1e-30]) == {STORED_DTYPES[dtype].largest}
        np.testing.assert_array_equal(again[layer], values_RD)


class Looked:
    """Stands for a compiled step: a row is that of its token's table and that of its position's, in bfloat16."""

    def __init__(self, program):
        rng, width = np.random.default_rng(3), program.config.hidden_size
        shape = 2, len(program.layers), max(199, program.shape.positions), width
        self.program, self.finish = program, program.by_row(program.finish, 5)
        self.tables = jnp.asarray(rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3, (*shape[:3], 1)))

    def step(self, kept):
        return self

    def __call__(self, params, tables, carried, before, tokens_XT, positions_XT, kept_XR, answers, *sums):
        of_tokens, of_positions = self.tables[0][:, tokens_XT], self.tables[1][:, positions_XT]
        rows_XCTD = jnp.swapaxes(of_tokens + of_positions, 0, 1).astype(jnp.bfloat16)
        taps, sums, before = self.finish(before, {"residual": rows_XCTD.at[..., 9].multiply(100)}, *sums)
        return taps, sums, None, carried, before


def looked_capture(stored: str, mesh: Mesh) -> tuple[Capture, StepShape, list[np.ndarray]]:
    """A capture on the mesh's devices that stores such rows, and some prompts."""
    shape = StepShape(96, max(LENGTHS), mesh.shape["data"])
    program = Program(TINY, 3, (0, 2), ("residual",), "bfloat16", stored, mesh, shape, Blocked())
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 199, length).astype(np.int32) for length in LENGTHS]
    return Capture(Looked(program), nnx.Module()), shape, prompts


@pytest.fixture(scope="module", params=few(DTYPES))
def setting(request):
    """Each test takes the capture as another one left it."""
    return looked_capture(request.param, make_mesh())


def bits(capture, shape, prompts) -> dict[bytes, list[np.ndarray]]:
    found = {}
    for sample in capture_samples(capture, shape, samples_of(prompts)):
        arrays = [
            a
            for name, tap in sample.taps.items()
            for a in (joined(sample, name), *tap.beside, *tap.sums.arrays)
        ]
        found[sample.tokenized.token_ids.tobytes()] = arrays
    return found


def test_bits_are_each_samples_own(setting):
    """Among strangers in other orders, so that each begins and is cut elsewhere; and each alone."""
    capture, shape, prompts = setting
    expected = bits(capture, shape, prompts)
    rng = np.random.default_rng(1)
    strangers = [rng.integers(0, 199, length).astype(np.int32) for length in (17, 90, 3, 111)]
    for _ in range(2):
        mixed = [*prompts, *strangers]
        rng.shuffle(mixed)
        assert_equal_bits(bits(capture, shape, mixed), expected, prompts)
    for prompt in prompts:
        assert_equal_bits(bits(capture, shape, [prompt]), expected, [prompt])


def test_what_is_stored_and_said_of_it_follows_from_what_was_computed(setting, monkeypatch):
    """Against the rows that the step gave, in float64."""
    capture, shape, prompts = setting
    computed: list = []
    finish = capture._compilation.finish
    monkeypatch.setattr(
        capture._compilation,
        "finish",
        lambda before, x, *sums: (computed.append(x), finish(before, x, *sums))[1],
    )
    (sample,) = capture_samples(capture, shape, samples_of([prompts[2]]))
    for name, tap in sample.taps.items():
        x_CRD = np.concatenate([np.asarray(each[name])[0] for each in computed], axis=1)
        x_CRD = x_CRD[:, : len(prompts[2])].astype(np.float64)
        shard_rows = [restored(rows).astype(np.float64) for rows in tap.layers()]
        e_CRD = x_CRD - np.stack(shard_rows)
        errors = tap.sums.errors
        np.testing.assert_allclose(errors.squares_CR, np.square(x_CRD).sum(-1), rtol=1e-5)
        np.testing.assert_allclose(errors.error_squares_CR, np.square(e_CRD).sum(-1), rtol=1e-5)
        lengths_CR = np.linalg.norm(x_CRD, axis=-1) * np.linalg.norm(x_CRD - e_CRD, axis=-1)
        cosines_CR = (x_CRD * (x_CRD - e_CRD)).sum(-1) / lengths_CR
        np.testing.assert_allclose(errors.cosine_distance_CR, 1 - cosines_CR, rtol=1e-3, atol=1e-13)
        np.testing.assert_allclose(errors.max_CED.max(axis=1), np.abs(e_CRD).max(axis=1), rtol=1e-6)
        assert (errors.error_squares_CR > 0).all()
        np.testing.assert_allclose(
            tap.sums.norms_CR, np.linalg.norm(np.stack(shard_rows), axis=-1), rtol=1e-5
        )


@pytest.mark.parametrize("dtype", few(DTYPES))
def test_a_row_that_is_not_finite_does_not_become_so(dtype):
    """Or the run would not refuse it; with fewer such values than are kept exactly, and with more."""
    x_CRD = np.random.default_rng(0).standard_normal((1, 12, 48), np.float32)
    for number, bad in enumerate((np.nan, np.inf, -np.inf)):
        x_CRD[0, 4 * number + 1, :1] = bad
        x_CRD[0, 4 * number + 3, : EXACT_CHANNELS + 2] = bad
    rows = of_layer(on_device.quantise(x_CRD, dtype), 0)
    with np.errstate(invalid="ignore"):
        finite_R = np.isfinite(np.linalg.norm(restored(rows), axis=1))
    assert finite_R.tolist() == [True, False] * 6
