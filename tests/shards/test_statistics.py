"""Statistics of parts, merged, are those of all rows together; a channel that is massive at few rows is found."""

import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, save

from qwen_jax.errors import BadDataError
from qwen_jax.shards import statistics
from qwen_jax.shards.statistics import (
    MASSIVE,
    KindStats,
    RowErrors,
    RowSums,
    merge_stats,
    parse_stats,
    stats_bytes,
)

LAYERS = (3, 7)


def of_rows(samples: list[np.ndarray]) -> KindStats:
    """From samples [layers, rows, hidden], by way of the float32 numbers that a device gives of blocks of 70 rows."""
    return KindStats.of_samples(LAYERS, [row_sums(sample.astype(np.float32)) for sample in samples])


def row_sums(rows: np.ndarray) -> RowSums:
    blocks = [rows[:, start : start + 70] for start in range(0, rows.shape[1], 70)]
    return RowSums(
        np.linalg.norm(rows, axis=-1),
        np.array([block.shape[1] for block in blocks]),
        np.stack([block.mean(axis=1) for block in blocks], axis=1),
        np.stack(
            [np.square(block - block.mean(axis=1, keepdims=True)).sum(axis=1) for block in blocks], axis=1
        ),
        np.stack([np.abs(block).max(axis=1) for block in blocks], axis=1),
    )


def random_samples(count: int, seed: int = 0) -> list[np.ndarray]:
    """Samples of 1 to 300 rows; the channels' means and spreads differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    mean, spread = rng.normal(0, 50, (2, 1, 16)), 10.0 ** rng.uniform(-2, 2, (2, 1, 16))
    return [rng.normal(mean, spread, (2, rng.integers(1, 300), 16)) for _ in range(count)]


@pytest.mark.parametrize("parts", [1, 2, 7, 40])
def test_merged_parts_equal_a_float64_recomputation(parts):
    samples = random_samples(40)
    pieces = [of_rows(samples[number::parts]) for number in range(parts)]
    merged = merge_stats([{"mlp": piece} for piece in pieces])["mlp"]
    rows = np.concatenate(samples, axis=1).astype(np.float32).astype(np.float64)
    norms = np.linalg.norm(rows, axis=-1)
    assert (merged.layers, merged.count) == (LAYERS, rows.shape[1])
    exact = (rows.mean(1), rows.var(1), np.abs(rows).max(1), norms.mean(1), norms.max(1))
    for ours, theirs in zip(merged.arrays, exact, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
    np.testing.assert_array_equal(merged.max_abs_CD, exact[2])
    rms = np.sqrt(np.square(rows).mean(axis=1))
    np.testing.assert_allclose(merged.median_rms_C, np.median(rms, axis=1), rtol=1e-5)


def test_a_channel_that_is_massive_at_few_rows_is_found_whatever_part_they_are_in():
    """Its root mean square over all rows is far below the bound."""
    rng = np.random.default_rng(1)
    samples = [rng.normal(0, 1, (2, 500, 64)) for _ in range(8)]
    samples[5][1, 17, 9] = -2 * MASSIVE
    samples[5][1, 30, 11] = 0.8 * MASSIVE
    rms = np.sqrt(np.square(np.concatenate(samples, axis=1)[1, :, 9]).mean())
    assert rms < 5
    merged = of_rows(samples[:3]).merge(of_rows(samples[3:]))
    assert (merged.massive_channels(0), merged.massive_channels(1)) == ([], [9])
    assert merged.summary()["7"]["massive_channels"] == [9]


def test_a_file_gives_back_what_was_put_in():
    stats = {"residual": of_rows(random_samples(3)), "mlp": of_rows(random_samples(2, seed=5))}
    again = parse_stats(stats_bytes(stats), "stats.safetensors")
    assert list(again) == list(stats) and stats_bytes(again) == stats_bytes(stats)
    assert "residual.max_abs" in load(stats_bytes(stats))


def damaged(change) -> bytes:
    """A statistics file in which one tensor has been changed, or left out (None)."""
    data = stats_bytes({"mlp": of_rows(random_samples(3))})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = load(data)
    tensors["mlp.max_abs"] = change(tensors["mlp.max_abs"])
    tensors = {name: array for name, array in tensors.items() if array is not None}
    return save(tensors, metadata=header["__metadata__"])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        stats_bytes({"mlp": of_rows(random_samples(3))})[:-9],
        save({"weight": np.ones(3)}),
        save({"weight": np.ones(3)}, metadata={"stats": "[1]"}),
        save({"weight": np.ones(3)}, metadata={"stats": "{}"}),
        damaged(lambda array: None),
        damaged(lambda array: array[:, :5]),
        damaged(lambda array: array[:1]),
        damaged(lambda array: array[0]),
        damaged(lambda array: array.astype(np.float32)),
    ],
    ids=["empty", "torn", "foreign", "no object", "no kind", "without", "narrow", "short", "flat", "float32"],
)
def test_what_is_no_whole_statistics_file_is_refused_by_name(data):
    with pytest.raises(BadDataError, match=r"^here is not a whole statistics file"):
        parse_stats(data, "here")


def test_an_undamaged_file_is_taken():
    assert parse_stats(damaged(lambda array: array), "here")["mlp"].count > 0


def lossy(samples: list[np.ndarray], seed: int) -> tuple[KindStats, np.ndarray]:
    """Of samples whose rows are what is left after random errors, and those errors."""
    rng, sums, all_errors = np.random.default_rng(seed), [], []
    for sample in samples:
        e = rng.normal(0, 0.01, sample.shape) * np.abs(sample).max(axis=-1, keepdims=True)
        x = sample + e
        largest = [np.abs(e[:, start : start + 70]).max(axis=1) for start in range(0, e.shape[1], 70)]
        of_rows = [part.sum(-1).astype(np.float32) for part in (x * x, x * e, e * e)]
        errors = RowErrors(*of_rows, np.stack(largest, axis=1))
        sums.append(replace(row_sums(sample.astype(np.float32)), errors=errors))
        all_errors.append(e)
    return KindStats.of_samples(LAYERS, sums), np.concatenate(all_errors, axis=1)


def test_losses_of_parts_are_those_of_all_rows():
    samples = random_samples(20)
    parts = [lossy(samples[place::4], place) for place in range(4)]
    merged = merge_stats([{"mlp": stats} for stats, _ in parts])["mlp"]
    rows = np.concatenate([sample for place in range(4) for sample in samples[place::4]], axis=1)
    e = np.concatenate([errors for _, errors in parts], axis=1)
    x = rows + e
    np.testing.assert_allclose(merged.loss.row_squares_C, np.square(x).sum((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(merged.loss.error_squares_C, np.square(e).sum((1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(merged.loss.max_error_CD, np.abs(e).max(axis=1))
    cosines = (x * rows).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(rows, axis=-1)
    np.testing.assert_allclose(merged.loss.cosine_distance_C, (1 - cosines).mean(axis=1), rtol=1e-4)
    (again,) = parse_stats(stats_bytes({"mlp": merged}), "here").values()
    assert again.summary() == merged.summary() and "max_error_channel" in merged.summary()["3"]


def test_the_sums_of_few_samples_are_held(monkeypatch):
    """Of samples of one row they are larger than the rows."""
    rng = np.random.default_rng(0)
    samples = [rng.normal(0, 1, (2, 1, 16)) for _ in range(200)]
    at_once = of_rows(samples)
    one = sum(array.nbytes for array in row_sums(samples[0].astype(np.float32)).arrays)
    monkeypatch.setattr(statistics, "POOL_BYTES", 5 * one)
    pool, seen, most = statistics.StatsPool(), [], 0
    for sample in samples:
        sums = row_sums(sample.astype(np.float32))
        seen.append(weakref.ref(sums))
        pool.add(sums)
        del sums
        most = max(most, sum(each() is not None for each in seen))
    assert 2 <= most <= 6
    for ours, theirs in zip(pool.stats(LAYERS).arrays, at_once.arrays, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert (pool.stats(LAYERS).count, pool.stats(LAYERS).layers) == (200, LAYERS)


def test_where_one_part_does_not_say_what_was_lost_all_do_not():
    known, _ = lossy(random_samples(3), 0)
    merged = merge_stats([{"mlp": known}, {"mlp": replace(known, loss=None)}])["mlp"]
    assert merged.loss is None and "cosine" not in merged.summary()["3"]


@pytest.mark.parametrize("part", ["cosine_distance", "max_error"])
@pytest.mark.parametrize("damage", [None, lambda array: array[..., :1], lambda array: -array])
def test_losses_that_are_not_whole_are_refused(part, damage):
    stats, _ = lossy(random_samples(3), 0)
    tensors = load(stats_bytes({"mlp": stats}))
    array = tensors.pop(f"mlp.{part}")
    if damage is not None:
        tensors[f"mlp.{part}"] = damage(array)
    about = json.dumps({"mlp": {"layers": list(LAYERS), "count": stats.count}})
    with pytest.raises(BadDataError, match=r"^here is not a whole statistics file"):
        parse_stats(save(tensors, metadata={"stats": about}), "here")
