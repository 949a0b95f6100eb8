"""The ledger of a run: which samples are durably stored, where, and which were left out and why.

It is kept twice, written in this order: `metadata.json` holds all of it, for readers of the shards;
`checkpoint_worker_N.json` holds how far it goes, for people and for the next start (checkpoint.py).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from qwen_jax import __version__
from qwen_jax.errors import BadDataError, shown
from qwen_jax.kinds import EMBEDDING
from qwen_jax.ledger.checks import DamagedError, parse
from qwen_jax.ledger.names import METADATA_NAME, shard_name
from qwen_jax.ledger.schema import (
    COMPLETED,
    DESCRIBED_METADATA,
    IN_PROGRESS,
    METADATA,
    MOST_SUM,
    SEEN_METADATA,
    UPLOADED_TO,
    WRITER,
)

Fingerprint = dict[str, Any]
"""Everything that decides which bytes a run writes, by name (run/fingerprint.py)."""

FORMAT_VERSION = 1
"""Of metadata.json; goes up where a reader of the one before would misread it."""


@dataclass(frozen=True)
class ShardEntry:
    """One durable shard. bytes: compressed size; raw_bytes: of the activations; crc32c: base64, as in GCS."""

    filename: str
    first_sample_idx: int
    last_sample_idx: int
    samples: int
    tokens: int
    bytes: int
    raw_bytes: int
    crc32c: str


@dataclass(frozen=True)
class RunIdentity:
    """What stays the same over all commits of a run. header: the descriptive part of metadata.json."""

    worker_id: int
    dataset_path: str
    model_path: str
    fingerprint: Fingerprint
    header: Mapping[str, Any]

    @property
    def max_seq_length(self) -> int:
        return self.fingerprint.get("max_seq_length", 0)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is stored of a layer, the main kind first."""
        return tuple(self.header.get("activation_types", ()))


@dataclass(frozen=True)
class Ledger:
    """What is durable: shards in order, and the samples that were left out, cut or shortened.

    last_processed_sample_idx: the last stream line dealt with, -1 before the first.
    statistics: at the end, by kind and layer (shards.statistics.KindStats.summary).
    """

    shards: tuple[ShardEntry, ...] = ()
    skipped: tuple[dict[str, Any], ...] = ()
    truncated: tuple[dict[str, Any], ...] = ()
    shortened: tuple[dict[str, Any], ...] = ()
    last_processed_sample_idx: int = -1
    status: str = IN_PROGRESS
    statistics: dict[str, Any] = field(default_factory=dict)

    @property
    def next_sample_idx(self) -> int:
        return self.last_processed_sample_idx + 1

    @property
    def samples_written(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bad_records(self) -> int:
        return sum(1 for note in self.skipped if note["bad_record"])

    def length_note(self, max_seq_length: int) -> str:
        """How many samples did not fit, and what would; empty where all did."""
        too_long = [note for note in self.skipped if note.get("full_length", 0) > max_seq_length]
        counted = {
            "lost examples": self.shortened,
            "were cut": self.truncated,
            "were skipped as too long": too_long,
        }
        if not any(counted.values()):
            return ""
        longest = max(note.get("full_length", 0) for notes in counted.values() for note in notes)
        counts = ", ".join(f"{len(notes)} {what}" for what, notes in counted.items() if notes)
        return f"of the prompts so far {counts}; --max_seq_length {longest} would keep them whole"

    def with_shard(
        self, shard: ShardEntry, skipped: Iterable[dict], truncated: Iterable[dict], shortened: Iterable[dict]
    ) -> Self:
        """The ledger after one more shard and the notes on the stream lines up to its last sample."""
        return replace(
            self,
            shards=(*self.shards, shard),
            skipped=(*self.skipped, *skipped),
            truncated=(*self.truncated, *truncated),
            shortened=(*self.shortened, *shortened),
            last_processed_sample_idx=shard.last_sample_idx,
        )

    def completed(self, lines: int, skipped: Iterable[dict], statistics: dict[str, Any]) -> Self:
        """The ledger at the end of a stream of `lines` lines, the last of which may have been skipped."""
        return replace(
            self,
            skipped=(*self.skipped, *skipped),
            last_processed_sample_idx=lines - 1,
            status=COMPLETED,
            statistics=statistics,
        )

    def prefix(self, shards: int) -> Self:
        """The ledger as it was after its first `shards` shards; itself if that is all of them."""
        return self if shards == len(self.shards) else self.reopened(shards)

    def reopened(self, shards: int) -> Self:
        """The ledger as it was when its first `shards` shards were durable and the run went on."""
        last = self.shards[shards - 1].last_sample_idx if shards else -1

        def upto(notes: Sequence[dict]) -> tuple[dict, ...]:
            return tuple(note for note in notes if note["sample_idx"] <= last)

        return type(self)(
            self.shards[:shards], upto(self.skipped), upto(self.truncated), upto(self.shortened), last
        )

    def metadata(self, run: RunIdentity) -> dict[str, Any]:
        """The content of metadata.json: the same ledger gives the same bytes, whatever run wrote it."""
        return {
            "format_version": FORMAT_VERSION,
            "worker_id": run.worker_id,
            "status": self.status,
            "last_processed_sample_idx": self.last_processed_sample_idx,
            **run.header,
            "totals": self.totals(),
            "statistics": self.statistics,
            "shards": [vars(shard) for shard in self.shards],
            "skipped": list(self.skipped),
            "truncated": list(self.truncated),
            "shortened": list(self.shortened),
            "fingerprint": run.fingerprint,
        }

    def totals(self) -> dict[str, int]:
        """Sums over the shards, and counts of the samples that are not stored whole."""
        return {
            "samples": self.samples_written,
            "tokens": sum(shard.tokens for shard in self.shards),
            "bytes": sum(shard.bytes for shard in self.shards),
            "raw_bytes": sum(shard.raw_bytes for shard in self.shards),
            "shards": len(self.shards),
            "skipped": len(self.skipped),
            "bad_records": self.bad_records,
            "truncated": len(self.truncated),
            "shortened": len(self.shortened),
        }

    def checkpoint(self, run: RunIdentity) -> dict[str, Any]:
        """The content of checkpoint_worker_N.json: the guide's keys, and the fingerprint."""
        return {
            "worker_id": run.worker_id,
            "last_processed_sample_idx": self.last_processed_sample_idx,
            "total_samples_processed": self.next_sample_idx,
            "total_samples_written": self.samples_written,
            "total_shards": len(self.shards),
            "dataset_path": run.dataset_path,
            "model_path": run.model_path,
            "status": self.status,
            "fingerprint": run.fingerprint,
        }


@dataclass(frozen=True)
class StoredMetadata:
    """What a stored metadata.json says. settings: those that may change on a resume; written_by: {} where it does not
    say. fields: all of it."""

    ledger: Ledger
    worker_id: int
    fingerprint: Fingerprint
    settings: dict[str, Any]
    written_by: dict[str, str | int]
    fields: dict[str, Any] = field(repr=False)

    @property
    def uploaded_to(self) -> str | None:
        """The bucket's folder that the run uploads to; None for a run of one machine, or where it does not say."""
        return self.fields.get(UPLOADED_TO)


def parse_metadata(data: bytes, source: str = METADATA_NAME, *, described: bool = False) -> StoredMetadata:
    """Reads metadata.json back; raises DamagedError for anything that no run of ours wrote, and BadDataError, which
    calls it `source`, for the format of a newer toolkit.

    described: whether model, layers and what else readers need must be there, too.
    """
    fields = parse(data, WRITER)
    _refuse_newer(fields, source)
    (DESCRIBED_METADATA if described else METADATA)(fields, "")
    ledger = Ledger(
        tuple(_shard_entry(entry, number) for number, entry in enumerate(fields["shards"], 1)),
        tuple(fields["skipped"]),
        tuple(fields["truncated"]),
        tuple(fields["shortened"]),
        fields["last_processed_sample_idx"],
        fields["status"],
        fields["statistics"],
    )
    _check_order(ledger)
    if max(ledger.totals().values()) > MOST_SUM:
        raise DamagedError("its shards hold more than any disk")
    return StoredMetadata(
        ledger,
        fields["worker_id"],
        fields["fingerprint"],
        fields["settings"],
        fields.get("written_by", {}),
        fields,
    )


def row_widths(fields: Mapping[str, Any]) -> dict[str, int]:
    """Values of a row by stored kind, of a metadata.json that describes its run; the first ones said only the model's
    width, which all kinds had."""
    kinds = [
        *fields["activation_types"],
        *([EMBEDDING] if fields["fingerprint"]["include_embedding"] else []),
    ]
    return {kind: fields.get("widths", {}).get(kind, fields["model"]["hidden_size"]) for kind in kinds}


def seen_metadata(data: bytes) -> tuple[int, dict[str, float], str]:
    """Compressed bytes, mean norms of the main kind by layer once the run is complete, and the model's name, for those
    who watch; raises DamagedError."""
    fields = parse(data, SEEN_METADATA)
    main: dict[str, Any] = next(iter(fields["statistics"].values()), {})
    norms = {layer: float(norm["norm_mean"]) for layer, norm in main.items()}
    return fields["totals"]["bytes"], norms, shown(fields["model"]["name"]) if "model" in fields else ""


def _shard_entry(entry: dict[str, Any], number: int) -> ShardEntry:
    if entry["filename"] != shard_name(number):
        raise DamagedError(f"shard {number} is called {entry['filename']!r}")
    return ShardEntry(**{each.name: entry[each.name] for each in dataclasses.fields(ShardEntry)})


def _refuse_newer(fields: Mapping[str, Any], source: str) -> None:
    found = fields.get("format_version", FORMAT_VERSION)
    if found > FORMAT_VERSION:
        writer = fields.get("written_by", {}).get("toolkit", "a newer version")
        raise BadDataError(
            f"{source} has format {found} and was written by toolkit {writer}; this is toolkit {__version__}, which "
            f"reads up to format {FORMAT_VERSION}: use that one or a newer one"
        )


def _check_order(ledger: Ledger) -> None:
    """Shards follow each other, and an unfinished run has dealt with nothing beyond its last shard."""
    last = -1
    for shard in ledger.shards:
        if not last < shard.first_sample_idx <= shard.last_sample_idx:
            raise DamagedError("its shards are not in sample order")
        last = shard.last_sample_idx
    reached = ledger.last_processed_sample_idx
    if reached < last or (ledger.status != COMPLETED and reached != last):
        raise DamagedError(f"last_processed_sample_idx is {reached}, the last shard ends at {last}")
