"""What the readers of shards want to know before they open one: norms, means and variances by layer.

Each shard has a small file of its own (`stats_0001.safetensors`), so that a resumed run has the statistics of
every durable shard and of nothing else; merged, they are `stats.safetensors`.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
POOL_BYTES = 16 << 20
"""Sums of samples (RowSums) that are held before they are merged."""
_PARTS = {"mean": 2, "variance": 2, "max_abs": 2, "norm_mean": 1, "norm_max": 1}
"""The tensors of a kind in a statistics file, in the order of KindStats' arrays, and their dimensions."""
_LOSS_PARTS = {"row_squares": 1, "error_squares": 1, "cosine_distance": 1, "max_error": 2}
"""The same of a kind whose rows are quantised, in the order of Loss."""


@dataclass(frozen=True)
class RowErrors:
    """What quantising did to the rows of one sample and kind: of each row x and its error e the sums of x squared, x
    times e and e squared; max_CED, of each channel the largest error in a block (RowSums)."""

    squares_CR: np.ndarray
    products_CR: np.ndarray
    error_squares_CR: np.ndarray
    max_CED: np.ndarray

    @property
    def cosine_distance_CR(self) -> np.ndarray:
        """1 - cosine of each row and what is restored of it, x - e; float64. From 1 - cosine squared, which is
        (xx ee - xe xe) / (xx (xx - 2 xe + ee)) and takes no difference of nearly equal numbers."""
        xx, xe, ee = (
            sums.astype(np.float64) for sums in (self.squares_CR, self.products_CR, self.error_squares_CR)
        )
        whole = xx * (xx - 2 * xe + ee)
        sine_squared = np.divide(xx * ee - xe * xe, whole, out=np.zeros_like(whole), where=whole > 0)
        sine_squared = np.clip(sine_squared, 0, 1)
        return sine_squared / (1 + np.sqrt(1 - sine_squared))


@dataclass(frozen=True)
class RowSums:
    """Of the stored rows of one sample and kind, as readers get them: norms_CR their Euclidean norms; counts_E the
    rows of each of E blocks in order; of each channel over a block mean_CED the mean, squares_CED the sum of squared
    distances from it, and max_abs_CED the largest absolute value. errors: of quantised rows."""

    norms_CR: np.ndarray
    counts_E: np.ndarray
    mean_CED: np.ndarray
    squares_CED: np.ndarray
    max_abs_CED: np.ndarray
    errors: RowErrors | None = None

    @property
    def arrays(self) -> list[np.ndarray]:
        """All of them."""
        own = [self.norms_CR, self.counts_E, self.mean_CED, self.squares_CED, self.max_abs_CED]
        return own if self.errors is None else [*own, *vars(self.errors).values()]


@dataclass(frozen=True)
class Loss:
    """What quantising did to the rows of one kind, float64: sums of their squares and of their errors' squares, the
    mean of 1 - cosine of a row and what is restored of it, and of each channel the largest error."""

    row_squares_C: np.ndarray
    error_squares_C: np.ndarray
    cosine_distance_C: np.ndarray
    max_error_CD: np.ndarray

    @classmethod
    def of_samples(cls, samples: Sequence[RowErrors]) -> Self:
        def total(arrays_CR: Iterable[np.ndarray]) -> np.ndarray:
            return np.sum([array_CR.sum(axis=1, dtype=np.float64) for array_CR in arrays_CR], axis=0)

        count = sum(errors.squares_CR.shape[1] for errors in samples)
        return cls(
            total(errors.squares_CR for errors in samples),
            total(errors.error_squares_CR for errors in samples),
            total(errors.cosine_distance_CR for errors in samples) / count,
            np.concatenate([errors.max_CED for errors in samples], axis=1).max(axis=1).astype(np.float64),
        )

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """In the order of _LOSS_PARTS."""
        return self.row_squares_C, self.error_squares_C, self.cosine_distance_C, self.max_error_CD

    def merge(self, other: Self, share: float) -> Self:
        """share: of the rows that are these."""
        return type(self)(
            self.row_squares_C + other.row_squares_C,
            self.error_squares_C + other.error_squares_C,
            share * self.cosine_distance_C + (1 - share) * other.cosine_distance_C,
            np.maximum(self.max_error_CD, other.max_error_CD),
        )

    @property
    def relative_C(self) -> np.ndarray:
        """Euclidean norm of all errors by that of all rows."""
        return np.sqrt(self.error_squares_C / np.maximum(self.row_squares_C, _LEAST))


_LEAST = float(np.finfo(np.float32).tiny)
"""Stands where a quotient would be by nothing."""


@dataclass(frozen=True)
class KindStats:
    """Statistics of the stored rows of one kind (residual, attn, mlp, embedding), C captured layers.

    layers: of each entry; none for the embedding. count: rows. All float64: of each channel mean_CD, variance_CD over
    all rows (not the sample variance) and max_abs_CD, the largest absolute value; norm_mean_C, norm_max_C of the
    rows' Euclidean norms. loss: of quantised rows, where it is known; what is stored alone does not tell it.
    """

    layers: tuple[int, ...]
    count: int
    mean_CD: np.ndarray
    variance_CD: np.ndarray
    max_abs_CD: np.ndarray
    norm_mean_C: np.ndarray
    norm_max_C: np.ndarray
    loss: Loss | None = None

    @staticmethod
    def of_samples(layers: Sequence[int], samples: Iterable[RowSums]) -> "KindStats":
        """Of samples in the order of the shard, summed in float64."""
        pool = StatsPool()
        for sums in samples:
            pool.add(sums)
        return pool.stats(layers)

    @classmethod
    def of_few(cls, samples: Sequence[RowSums]) -> Self:
        """The same at once, of no layers yet: it takes several times the memory of the sums."""
        counts_E = np.concatenate([sums.counts_E for sums in samples])
        means_ECD, squares_ECD, max_abs_ECD = (
            np.concatenate([getattr(sums, name) for sums in samples], axis=1).swapaxes(0, 1)
            for name in ("mean_CED", "squares_CED", "max_abs_CED")
        )
        mean_CD, variance_CD = _pool(counts_E, means_ECD, squares_ECD / counts_E[:, None, None])
        total_C = sum(sums.norms_CR.sum(axis=1, dtype=np.float64) for sums in samples)
        largest_C = np.max([sums.norms_CR.max(axis=1) for sums in samples], axis=0).astype(np.float64)
        max_abs_CD, count = max_abs_ECD.max(axis=0).astype(np.float64), int(counts_E.sum())
        errors = [sums.errors for sums in samples if sums.errors is not None]
        loss = Loss.of_samples(errors) if errors else None
        return cls((), count, mean_CD, variance_CD, max_abs_CD, total_C / count, largest_C, loss)

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
        loss = self.loss and other.loss and self.loss.merge(other.loss, self.count / int(counts.sum()))
        return type(self)(
            self.layers, int(counts.sum()), mean_CD, variance_CD, max_abs_CD, norm_mean_C, norm_max_C, loss
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
        """By layer as a string (`embedding` for the embedding): norms, massive channels and what quantising lost, for
        metadata.json."""
        names = [str(layer) for layer in self.layers] or ["embedding"]
        return {
            name: {
                "count": self.count,
                "norm_mean": float(self.norm_mean_C[entry]),
                "norm_max": float(self.norm_max_C[entry]),
                "massive_channels": self.massive_channels(entry),
                **self._loss_summary(entry),
            }
            for entry, name in enumerate(names)
        }

    def _loss_summary(self, entry: int) -> dict:
        """relative_error, and unexplained_variance, the errors' squares by those of the rows' distances from their
        mean; the mean cosine; the largest error of a value in units of the median channel's root mean square, and its
        channel."""
        if self.loss is None:
            return {}
        distances = float(self.variance_CD[entry].sum() * self.count)
        channel = int(self.loss.max_error_CD[entry].argmax())
        largest = self.loss.max_error_CD[entry, channel] / max(self.median_rms_C[entry], _LEAST)
        return {
            "relative_error": float(self.loss.relative_C[entry]),
            "unexplained_variance": float(self.loss.error_squares_C[entry] / max(distances, _LEAST)),
            "cosine": float(1 - self.loss.cosine_distance_C[entry]),
            "max_error": float(largest),
            "max_error_channel": channel,
        }


class StatsPool:
    """Makes the statistics of samples that come one after another, and holds the sums of few: of samples of one row
    they are larger than the rows. What is merged when depends on the samples alone, so the bits do too."""

    def __init__(self) -> None:
        self._merged: KindStats | None = None
        self._waiting: list[RowSums] = []
        self._bytes = 0

    def add(self, sums: RowSums) -> None:
        """The next sample."""
        if self._bytes >= POOL_BYTES:
            self._merged, self._waiting, self._bytes = self._all(), [], 0
        self._waiting.append(sums)
        self._bytes += sum(array.nbytes for array in sums.arrays)

    def stats(self, layers: Sequence[int]) -> KindStats:
        """Of all samples so far, at least one. layers: of the entries."""
        return replace(self._all(), layers=tuple(layers))

    def _all(self) -> KindStats:
        few = KindStats.of_few(self._waiting)
        return few if self._merged is None else self._merged.merge(few)


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
        layers, (_exact_sums(of_sample, key) for of_sample in zip(*records_CS, strict=True))
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
    mean_CED, squares_CED, max_abs_CED = (np.stack(values)[:, None] for values in (means, squares, max_abs))
    return RowSums(norms_CR, np.array(norms_CR.shape[1:]), mean_CED, squares_CED, max_abs_CED)


def merge_stats(stats: Iterable[Stats]) -> Stats:
    """All together, in the order given, one at a time; raises BadDataError where kinds, layers or widths differ, or for
    none."""
    remaining = iter(stats)
    first = next(remaining, None)
    if first is None:
        raise BadDataError("there are no statistics to merge")

    def both(a: Stats, b: Stats) -> Stats:
        if list(a) != list(b):
            raise BadDataError(f"statistics of {', '.join(a)} cannot be merged with those of {', '.join(b)}")
        return {kind: a[kind].merge(b[kind]) for kind in a}

    return reduce(both, remaining, first)


def stats_bytes(stats: Stats) -> bytes:
    """The content of a statistics file: for each kind the tensors `KIND.mean`, `KIND.variance`, `KIND.max_abs` [layers,
    hidden] and `KIND.norm_mean`, `KIND.norm_max` [layers], of quantised rows those of _LOSS_PARTS too, all float64,
    and in its metadata the kinds, layers and counts."""
    from safetensors.numpy import save

    tensors = {
        f"{kind}.{part}": array
        for kind, entry in stats.items()
        for part, array in (
            *zip(_PARTS, entry.arrays, strict=True),
            *(zip(_LOSS_PARTS, entry.loss.arrays, strict=True) if entry.loss else ()),
        )
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
    layers = len(about["layers"]) or 1
    mean_CD, *others = _parse_parts(kind, _PARTS, layers, tensors)
    lossy = any(f"{kind}.{part}" in tensors for part in _LOSS_PARTS)
    loss = Loss(*_parse_parts(kind, _LOSS_PARTS, layers, tensors)) if lossy else None
    if loss is not None and loss.max_error_CD.shape != mean_CD.shape:
        raise DamagedError(f"{kind}.max_error is {list(loss.max_error_CD.shape)}")
    variance_CD, max_abs_CD, norm_mean_C, norm_max_C = others
    about_rows = tuple(about["layers"]), about["count"]
    return KindStats(*about_rows, mean_CD, variance_CD, max_abs_CD, norm_mean_C, norm_max_C, loss)


def _parse_parts(
    kind: str, parts: Mapping[str, int], layers: int, tensors: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Those of parts, the dimensions of each by name; the width is that of the first that has one."""
    arrays = [tensors[f"{kind}.{part}"] for part in parts]
    width = next(
        array.shape[1:] for array, dimensions in zip(arrays, parts.values(), strict=True) if dimensions > 1
    )
    shape = (layers, *width)
    for array, (part, dimensions) in zip(arrays, parts.items(), strict=True):
        if (array.dtype, array.shape, array.ndim) != (np.float64, shape[:dimensions], dimensions):
            raise DamagedError(f"{kind}.{part} is {array.dtype}{list(array.shape)}")
        if not np.isfinite(array).all() or (part != "mean" and (array < 0).any()):
            raise DamagedError(f"{kind}.{part} holds values that no rows have")
    return arrays


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
