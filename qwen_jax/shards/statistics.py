"""What the readers of shards want to know before they open one: norms, means and variances by layer.

Each shard has a small file of its own (`stats_0001.safetensors`), so that a resumed run has the statistics of
every durable shard and of nothing else; merged, they are `stats.safetensors`.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Self

import numpy as np

from qwen_jax.errors import BadDataError
from qwen_jax.ledger.checks import DamagedError, parse
from qwen_jax.ledger.schema import STATS, STATS_HEADER
from qwen_jax.shards.format import EMBEDDING, record_keys

log = logging.getLogger(__name__)

MASSIVE = 100.0
"""A channel is massive where its largest absolute value exceeds the median channel's root mean square by this factor.

Its largest value, since massive activations stand at few tokens of a prompt (Sun et al. 2024)."""
_PARTS = {"mean": 2, "variance": 2, "max_abs": 2, "norm_mean": 1, "norm_max": 1}
"""The tensors of a kind in a statistics file, in the order of KindStats' arrays, and their dimensions."""


@dataclass(frozen=True)
class RowSums:
    """Of the stored rows of one sample and kind: norms_CR their Euclidean norms; counts_E the rows of each of E blocks
    in order; of each channel over a block mean_CED the mean, squares_CED the sum of squared distances from it, and
    max_abs_CED the largest absolute value."""

    norms_CR: np.ndarray
    counts_E: np.ndarray
    mean_CED: np.ndarray
    squares_CED: np.ndarray
    max_abs_CED: np.ndarray


@dataclass(frozen=True)
class KindStats:
    """Statistics of the stored rows of one kind (residual, attn, mlp, embedding), C captured layers.

    layers: of each entry; none for the embedding. count: rows. All float64: of each channel mean_CD, variance_CD over
    all rows (not the sample variance) and max_abs_CD, the largest absolute value; norm_mean_C, norm_max_C of the
    rows' Euclidean norms.
    """

    layers: tuple[int, ...]
    count: int
    mean_CD: np.ndarray
    variance_CD: np.ndarray
    max_abs_CD: np.ndarray
    norm_mean_C: np.ndarray
    norm_max_C: np.ndarray

    @classmethod
    def of_samples(cls, layers: Sequence[int], samples: Sequence[RowSums]) -> Self:
        """Of samples in the order of the shard, summed in float64."""
        counts_E = np.concatenate([sums.counts_E for sums in samples])
        means_ECD, squares_ECD, max_abs_ECD = (
            np.concatenate([getattr(sums, name) for sums in samples], axis=1).swapaxes(0, 1)
            for name in ("mean_CED", "squares_CED", "max_abs_CED")
        )
        mean_CD, variance_CD = _pool(counts_E, means_ECD, squares_ECD / counts_E[:, None, None])
        total_C = sum(sums.norms_CR.sum(axis=1, dtype=np.float64) for sums in samples)
        largest_C = np.max([sums.norms_CR.max(axis=1) for sums in samples], axis=0).astype(np.float64)
        max_abs_CD, count = max_abs_ECD.max(axis=0).astype(np.float64), int(counts_E.sum())
        return cls(tuple(layers), count, mean_CD, variance_CD, max_abs_CD, total_C / count, largest_C)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """In the order of _PARTS."""
        return self.mean_CD, self.variance_CD, self.max_abs_CD, self.norm_mean_C, self.norm_max_C

    def merge(self, other: Self) -> Self:
        """The statistics of both sets of rows together; raises BadDataError for other layers or widths."""
        if (self.layers, self.mean_CD.shape) != (other.layers, other.mean_CD.shape):
            raise BadDataError(
                f"statistics of layers {list(self.layers)} {list(self.mean_CD.shape)} cannot be merged with those "
                f"of layers {list(other.layers)} {list(other.mean_CD.shape)}; merge runs with the same settings"
            )
        counts = np.array([self.count, other.count])
        mean_CD, variance_CD = _pool(
            counts, np.stack([self.mean_CD, other.mean_CD]), np.stack([self.variance_CD, other.variance_CD])
        )
        max_abs_CD = np.maximum(self.max_abs_CD, other.max_abs_CD)
        norm_mean_C = (self.norm_mean_C * self.count + other.norm_mean_C * other.count) / counts.sum()
        norm_max_C = np.maximum(self.norm_max_C, other.norm_max_C)
        return type(self)(
            self.layers, int(counts.sum()), mean_CD, variance_CD, max_abs_CD, norm_mean_C, norm_max_C
        )

    @property
    def median_rms_C(self) -> np.ndarray:
        """The median channel's root mean square."""
        return np.median(np.sqrt(np.square(self.mean_CD) + self.variance_CD), axis=1)

    def massive_channels(self, entry: int) -> list[int]:
        """Channels of the `entry`th layer whose largest absolute value is above MASSIVE times the median channel's
        root mean square."""
        return np.flatnonzero(self.max_abs_CD[entry] > MASSIVE * self.median_rms_C[entry]).tolist()

    def summary(self) -> dict:
        """By layer as a string (`embedding` for the embedding): norms and massive channels, for metadata.json."""
        names = [str(layer) for layer in self.layers] or ["embedding"]
        return {
            name: {
                "count": self.count,
                "norm_mean": float(self.norm_mean_C[entry]),
                "norm_max": float(self.norm_max_C[entry]),
                "massive_channels": self.massive_channels(entry),
            }
            for entry, name in enumerate(names)
        }


Stats = dict[str, KindStats]
"""Statistics by kind, the main one first."""


def _pool(
    counts_S: np.ndarray, means_SCD: np.ndarray, variances_SCD: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of sets of rows together, in float64 (Chan, Golub and LeVeque 1983)."""
    weights_S11 = (counts_S / counts_S.sum())[:, None, None]
    means_SCD = means_SCD.astype(np.float64)
    mean_CD = (weights_S11 * means_SCD).sum(axis=0)
    spread_SCD = variances_SCD + np.square(means_SCD - mean_CD)
    return mean_CD, (weights_S11 * spread_SCD).sum(axis=0)


def shard_stats(shard: Mapping[int | str, Sequence[Mapping]], kinds: Sequence[str]) -> Stats:
    """The statistics of a loaded shard, recomputed in float64 from what it holds.

    kinds: the names of its kinds, the main one first (`activation_types` in metadata.json).
    """
    layers = [layer for layer in shard if isinstance(layer, int)]
    records = [shard[layer] for layer in layers]
    stats = {kind: _recompute(layers, records, key) for kind, key in record_keys(kinds).items()}
    if EMBEDDING in shard:
        stats[EMBEDDING] = _recompute([], [shard[EMBEDDING]], "activation")
    return stats


def _recompute(layers: Sequence[int], records_CS: Sequence[Sequence[Mapping]], key: str) -> KindStats:
    """One layer and sample at a time, since in float64 a shard is four times its size."""
    return KindStats.of_samples(
        layers, [_exact_sums(of_sample, key) for of_sample in zip(*records_CS, strict=True)]
    )


def _exact_sums(records_C: Sequence[Mapping], key: str) -> RowSums:
    """A sample's rows as one block."""
    norms, means, squares, max_abs = [], [], [], []
    for record in records_C:
        rows_RD = record[key].astype(np.float64)
        norms.append(np.linalg.norm(rows_RD, axis=1))
        means.append(rows_RD.mean(axis=0))
        squares.append(rows_RD.var(axis=0) * len(rows_RD))
        max_abs.append(np.abs(rows_RD).max(axis=0))
    norms_CR = np.stack(norms)
    of_block = (np.stack(values)[:, None] for values in (means, squares, max_abs))
    return RowSums(norms_CR, np.array(norms_CR.shape[1:]), *of_block)


def merge_stats(stats: Sequence[Stats]) -> Stats:
    """All together, in the order given; raises BadDataError where kinds, layers or widths differ, or for none."""
    if not stats:
        raise BadDataError("there are no statistics to merge")

    def both(a: Stats, b: Stats) -> Stats:
        if list(a) != list(b):
            raise BadDataError(f"statistics of {', '.join(a)} cannot be merged with those of {', '.join(b)}")
        return {kind: a[kind].merge(b[kind]) for kind in a}

    return reduce(both, stats)


def stats_bytes(stats: Stats) -> bytes:
    """The content of a statistics file: for each kind the tensors `KIND.mean`, `KIND.variance`, `KIND.max_abs` [layers,
    hidden] and `KIND.norm_mean`, `KIND.norm_max` [layers], all float64, and in its metadata the kinds, layers and
    counts."""
    from safetensors.numpy import save

    tensors = {
        f"{kind}.{part}": array
        for kind, entry in stats.items()
        for part, array in zip(_PARTS, entry.arrays, strict=True)
    }
    about = {kind: {"layers": list(entry.layers), "count": entry.count} for kind, entry in stats.items()}
    # One entry: safetensors writes several in an order that changes from run to run.
    return save(tensors, metadata={"stats": json.dumps(about)})


def parse_stats(data: bytes, name: str) -> Stats:
    """A statistics file's content; raises BadDataError, with `name`, for anything else."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        header = parse(data[8 : 8 + int.from_bytes(data[:8], "little")], STATS_HEADER)
        about = parse(header["__metadata__"]["stats"].encode(), STATS)
        tensors = load(data)
        if not about:
            raise DamagedError("it has no kind")
        return {kind: _parse_kind(kind, entry, tensors) for kind, entry in about.items()}
    except (SafetensorError, ValueError, KeyError) as error:
        raise BadDataError(
            f"{name} is not a whole statistics file ({error}); `python -m qwen_jax stats` makes it again"
        ) from error


def _parse_kind(kind: str, about: Mapping, tensors: Mapping[str, np.ndarray]) -> KindStats:
    arrays = [tensors[f"{kind}.{part}"] for part in _PARTS]
    shape = (len(about["layers"]) or 1, *arrays[0].shape[1:])
    for array, (part, dimensions) in zip(arrays, _PARTS.items(), strict=True):
        if (array.dtype, array.shape, array.ndim) != (np.float64, shape[:dimensions], dimensions):
            raise DamagedError(f"{kind}.{part} is {array.dtype}{list(array.shape)}")
        if not np.isfinite(array).all() or (part != "mean" and (array < 0).any()):
            raise DamagedError(f"{kind}.{part} holds values that no rows have")
    return KindStats(tuple(about["layers"]), about["count"], *arrays)


def first_whole(copies: Iterable[tuple[bytes, str]], rows: int) -> Stats | None:
    """The first of several copies of a statistics file (content and name) that is whole and of `rows` rows; those that
    are torn are logged."""
    for data, name in copies:
        try:
            stats = parse_stats(data, name)
        except BadDataError as error:
            log.warning("%s", error)
            continue
        if next(iter(stats.values())).count == rows:
            return stats
    return None
