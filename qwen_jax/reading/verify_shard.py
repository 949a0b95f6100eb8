"""What is wrong with one shard: its bytes, its records, and what metadata.json and its statistics say of it."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from qwen_jax.errors import BadDataError
from qwen_jax.kinds import KEEP_ALL
from qwen_jax.ledger.metadata import row_widths
from qwen_jax.ledger.names import stats_name_beside
from qwen_jax.reading.runs import DescribedRun, Run
from qwen_jax.roles import role_name
from qwen_jax.shards import (
    EMBEDDING,
    KIND_KEYS,
    OPTIONAL_KEYS,
    RECORD_KEYS,
    ShardError,
    check_index,
    load_shard,
    record_keys,
    restore,
    stored_bytes,
)
from qwen_jax.shards.statistics import KindStats, parse_stats

# Statistics are computed in float32 on the device, and summed in another order than here.
_TOLERANCE = 1e-4
_SHARED_KEYS = [key for key in (*RECORD_KEYS, *OPTIONAL_KEYS) if key not in ("activation", *KIND_KEYS)]

Shard = Mapping[int | str, Sequence[Mapping[str, Any]]]


class ShardFaults:
    """One shard of a run. indices: the samples found in it; can_be_made_again: whether its bytes are not those that
    metadata.json records, so that extracting it again mends it."""

    def __init__(self, run: Run, name: str):
        self._run = run
        self.name = name
        self._entry = run.entry(name)
        self.indices: list[int] = []
        self.can_be_made_again = False

    def spans(self) -> list[range]:
        """The samples found in it, else those that its entry stands for, however many it says."""
        if self.indices:
            return [range(index, index + 1) for index in self.indices]
        if self._entry is None or not isinstance(self._run, DescribedRun):
            return []
        span = range(self._entry["first_sample_idx"], self._entry["last_sample_idx"] + 1)
        skipped = {note["sample_idx"] for note in self._run.ledger.skipped}
        edges = [span.start - 1, *sorted(index for index in skipped if index in span), span.stop]
        return [range(before + 1, after) for before, after in pairwise(edges) if before + 1 < after]

    def find(self) -> list[str]:
        """Every fault, in words."""
        try:
            found = self._of_bytes()
            if found:
                self.can_be_made_again = True
                return found
            with self._run.files.local(self.name) as path:
                name = f"{self._run.where}/{self.name}"
                stored = load_shard(path, raw=True, name=name)
                check_index(path, stored, name)
        except ShardError as error:
            return [str(error)]
        first = next(iter(stored.values()))
        self.indices = [record["sample_idx"] for record in first]
        entry, run = self._entry, self._run
        if entry is None or not isinstance(run, DescribedRun):
            return [*_of_records(_restored(stored))]
        described = [*self._against_entry(stored, entry), *self._against_settings(stored, run.metadata)]
        shard = _restored(stored)
        return [*_of_records(shard), *described, *self._against_statistics(shard)]

    def _of_bytes(self) -> list[str]:
        if self._entry is None:
            return []
        try:
            size, crc32c = self._run.files.describe(self.name)
        except BadDataError:
            return ["is missing"]
        if size != self._entry["bytes"]:
            return [f"has {size} bytes, metadata.json says {self._entry['bytes']}"]
        if crc32c != self._entry["crc32c"]:
            return [f"has crc32c {crc32c}, metadata.json says {self._entry['crc32c']}"]
        return []

    def _against_entry(self, shard: Shard, entry: Mapping[str, Any]) -> Iterator[str]:
        first = next(iter(shard.values()))
        found = {
            "samples": len(first),
            "tokens": sum(len(record["token_ids"]) for record in first),
            "first_sample_idx": first[0]["sample_idx"],
            "last_sample_idx": first[-1]["sample_idx"],
            "raw_bytes": _raw_bytes(shard),
        }
        for key, value in found.items():
            if value != entry[key]:
                yield f"has {key} {value}, metadata.json says {entry[key]}"

    def _against_settings(self, shard: Shard, metadata: Mapping[str, Any]) -> Iterator[str]:
        """What a shard of such a run holds."""
        first = next(iter(shard.values()))[0]
        fingerprint, activation = metadata["fingerprint"], first["activation"]
        for what, found, said in (
            ("layers", [layer for layer in shard if layer != EMBEDDING], metadata["layers"]),
            ("dtype", str(activation.dtype), metadata["activation_dtype"]),
            *_widths(shard, metadata),
        ):
            if found != said:
                yield f"has {what} {found}, metadata.json says {said}"
        kinds = metadata["activation_types"] if len(metadata["activation_types"]) > 1 else []
        for what, there, wanted in (
            *((kind, kind in first, kind in kinds) for kind in KIND_KEYS),
            (EMBEDDING, EMBEDDING in shard, fingerprint["include_embedding"]),
            ("token_roles", "token_roles" in first, True),
            ("token_positions", "token_positions" in first, _keeps_fewer(fingerprint)),
            ("answer_logprobs", "answer_logprobs" in first, None if _has_answers(fingerprint) else False),
        ):
            if wanted is not None and there != wanted:
                yield f"has {what}, which such a run does not store" if there else f"has no {what}"

    def _against_statistics(self, shard: Shard) -> Iterator[str]:
        """Against the file of the shard's statistics."""
        name = stats_name_beside(self.name)
        data = self._run.files.read(name)
        stats: Mapping[str, KindStats] = {}
        try:
            stats = {} if data is None else parse_stats(data, name)
        except BadDataError as error:
            yield str(error)
        else:
            if data is None:
                yield f"has no {name} beside it"
        for kind, key in {**record_keys(self._run.kinds), EMBEDDING: "activation"}.items():
            if kind in stats and key in next(iter(shard.values()))[0]:
                yield from _of_kind(shard, kind, key, stats[kind])


def _restored(stored: dict[int | str, list[dict]]) -> Shard:
    """With values in the place of codes, record by record."""
    for records in stored.values():
        for number, record in enumerate(records):
            records[number] = restore(record)
    return stored


def _widths(shard: Shard, metadata: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """What the rows of each kind are called, their width, and what metadata.json says of it."""
    main, embedded = next(iter(shard.values()))[0], shard.get(EMBEDDING, [{}])[0]
    keys = record_keys(metadata["activation_types"])
    for kind, width in row_widths(metadata).items():
        record, key = (embedded, "activation") if kind == EMBEDDING else (main, keys[kind])
        if key in record:
            yield (
                "width" if record is main and key == "activation" else f"{kind} of width",
                record[key].shape[1],
                width,
            )


def _has_answers(fingerprint: Mapping[str, Any]) -> bool:
    return fingerprint["include_answer"] or bool(fingerprint.get("rollout"))


def _keeps_fewer(fingerprint: Mapping[str, Any]) -> bool | None:
    """Whether not all tokens are kept; None where that depends on the tokenizer."""
    if fingerprint["keep_tokens"] != KEEP_ALL or fingerprint["skip_first"]:
        return True
    return None if fingerprint["skip_special_tokens"] else False


def _raw_bytes(shard: Shard) -> int:
    return sum(stored_bytes(record) for records in shard.values() for record in records)


def _of_kind(shard: Shard, kind: str, key: str, stats: KindStats) -> Iterator[str]:
    """Norms of each layer's rows, and the channels' means and variances, as stated. key: of a record, where it has the
    kind's rows."""
    layers: list[int | str] = (
        [EMBEDDING] if kind == EMBEDDING else [layer for layer in shard if layer != EMBEDDING]
    )
    of_layers: list[int | str] = [*stats.layers] or [EMBEDDING]
    if of_layers != layers:
        yield f"the statistics of {kind} are of layers {list(stats.layers)}"
        return
    for row, layer in enumerate(layers):
        rows_RD = np.concatenate([record[key].astype(np.float32) for record in shard[layer]])
        norms_R = np.linalg.norm(rows_RD, axis=1).astype(np.float64)
        if not np.isfinite(norms_R).all():
            continue  # _of_records names the values
        yield from _of_channels(f"{kind}, layer {layer}", rows_RD, norms_R, stats, row)


def _of_channels(
    where: str, rows_RD: np.ndarray, norms_R: np.ndarray, stats: KindStats, row: int
) -> Iterator[str]:
    size, said = rows_RD.shape, (stats.count, stats.mean_CD.shape[1])
    if size != said:
        yield f"{where}: its statistics are of {said[0]} rows of width {said[1]}, it has {size[0]} of {size[1]}"
        return
    mean_D, variance_D = stats.mean_CD[row], stats.variance_CD[row]
    scale_D = np.sqrt(np.square(mean_D) + variance_D)
    apart_D = np.abs(rows_RD.mean(axis=0, dtype=np.float64) - mean_D)
    # The mean square of the norms is the sum of the channels' mean squares.
    squares, stated = np.square(norms_R).mean(), float((np.square(mean_D) + variance_D).sum())
    if not (apart_D <= _TOLERANCE * scale_D).all():
        yield f"{where}: the mean of channel {int(apart_D.argmax())} is not that in its statistics"
    differ_D = np.abs(rows_RD).max(axis=0) != stats.max_abs_CD[row]
    if differ_D.any():
        yield f"{where}: the largest value of channel {int(differ_D.argmax())} is not that in its statistics"
    if not _close(squares, stated):
        yield f"{where}: the variances in its statistics are not those of its rows"
    for what, found, said in (
        ("mean", norms_R.mean(), stats.norm_mean_C[row]),
        ("largest", norms_R.max(), stats.norm_max_C[row]),
    ):
        if not _close(found, said):
            yield f"{where}: the {what} norm is {found:.6g}, its statistics say {said:.6g}"


def _close(found: float, said: float) -> bool:
    return bool(abs(found - said) <= _TOLERANCE * abs(found))  # false where one is not a number


def _of_records(shard: Shard) -> Iterator[str]:
    """What is wrong with the records themselves."""
    first = next(iter(shard.values()))
    for layer, records in shard.items():
        for record, of_first in zip(records, first, strict=True):
            where = f"sample {record['sample_idx']}, layer {layer}"
            for kind in [key for key in ("activation", *KIND_KEYS, "answer_logprobs") if key in record]:
                bad = int((~np.isfinite(record[kind].astype(np.float32))).sum())
                if bad:
                    yield f"{where}: {bad} values of {kind} are infinite or not numbers"
            # The embedding's rows have a width of their own; that there are as many is what load_shard checks.
            shared = [key for key in _SHARED_KEYS if layer != EMBEDDING or key != "shape"]
            for key in [key for key in shared if not _same(record.get(key), of_first.get(key))]:
                yield f"{where}: {key} is not that of the first layer"
    for record in first:
        yield from (f"sample {record['sample_idx']}: {what}" for what in _of_rows(record))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one is other or np.array_equal(one, other)
    return type(one) is type(other) and one == other


def _of_rows(record: Mapping[str, Any]) -> Iterator[str]:
    positions = record.get("token_positions")
    if positions is not None and (positions[0] < 0 or (np.diff(positions) <= 0).any()):
        yield "token_positions do not ascend"
    if (record["token_ids"] < 0).any():
        yield "has negative token_ids"
    for code in np.unique(record.get("token_roles", [])):
        try:
            role_name(int(code))
        except ValueError as error:
            yield f"token_roles: {error}"
    if (record.get("answer_logprobs", np.zeros(1)) > 0).any():
        yield "has log-probabilities above 0"
    if "token_cells" in record:
        yield from _of_cells(record["token_cells"])


def _of_cells(cells: np.ndarray) -> Iterator[str]:
    """Each row is no cell, or one that an ARC grid can have, and no cell is there twice."""
    cells = cells[(cells != -1).any(axis=1)]
    if (cells < 0).any() or (cells[:, 3] > 9).any():
        yield "has token_cells that no grid has"
    if len(np.unique(cells[:, :3], axis=0)) != len(cells):
        yield "has a cell twice in token_cells"
