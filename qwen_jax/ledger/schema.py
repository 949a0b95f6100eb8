"""What each file that a stranger can hand us may hold, one table a file: types, ranges, sizes, names."""

from qwen_jax.kinds import COMPUTE_DTYPES, EMBEDDING, KINDS, STORED_DTYPES
from qwen_jax.ledger.checks import (
    MOST,
    distinct,
    list_of,
    map_of,
    number,
    one_of,
    or_null,
    plain,
    record,
    text,
    unknown,
    whole,
    yes_or_no,
)

NOT_STARTED, IN_PROGRESS, COMPLETED = "not_started", "in_progress", "completed"
"""Of a run; a file never says the first."""
STARTING, RUNNING, ENDED, FAILED, TERMINATED = "starting", "running", "ended", "failed", "terminated"
"""Of a worker, in its progress record."""
MOST_LAYERS, MOST_SUM = 1 << 16, 10**18
_MOST_WORKER = 10**9 - 1
_MOST_TIME, _MOST_POINTS, _MOST_MESSAGE = 1e11, 1000, 10**6
_MOST_NORM = 1e45
"""Above the norm of any row of float32 values."""

_count, _sum = whole(), whole(most=MOST_SUM)
_worker = whole(most=_MOST_WORKER)
_status = one_of(IN_PROGRESS, COMPLETED)
_norm = number(0, _MOST_NORM)
_layer = whole(most=MOST_LAYERS - 1)
_layer_or_embedding_word = text(rf"[0-9]{{1,5}}|{EMBEDDING}")
_object = record({}, others=None)
CRC32C, _sha256 = text(r"[A-Za-z0-9+/]{6}=="), text(r"[0-9a-f]{64}")
_file_name = text(r"[^/\0]+", most=255)


def _layer_or_embedding(value: object, name: str) -> None:
    if value != EMBEDDING:
        _layer(value, name)


_NOTE = {"sample_idx": _count}
_OF_LAYER = record(
    {},
    optional={
        **dict.fromkeys(("relative_error", "unexplained_variance", "max_error"), number(0)),
        "cosine": number(-1, 1),
        "max_error_channel": _count,
    },
    others=None,
)
"""Statistics of one layer (shards.statistics.KindStats.summary) as far as readers take something from them."""
_SHARD = record(
    {
        "filename": _file_name,
        "first_sample_idx": _count,
        "last_sample_idx": _count,
        **dict.fromkeys(("samples", "tokens", "bytes", "raw_bytes"), whole(1)),
        "crc32c": CRC32C,
    },
    optional={"layer_norms": _object},  # of the first versions; the statistics say it
    others=unknown,
)
_MARKER = {
    "worker_id": _worker,
    "status": _status,
    "last_processed_sample_idx": whole(-1),
    "fingerprint": record({}, others=None),
}
UPLOADED_TO = "uploaded_to"
_LEDGER = {
    **_MARKER,
    "settings": _object,
    "statistics": _object,
    "shards": list_of(_SHARD),
    "skipped": list_of(record({**_NOTE, "bad_record": yes_or_no}, optional={"full_length": _count})),
    "truncated": list_of(record(_NOTE, optional={"full_length": _count})),
    "shortened": list_of(record(_NOTE, optional={"full_length": _count})),
}
_WRITER = {"format_version": whole(1, 10**6), "written_by": map_of(text(), plain)}
WRITER = record({}, optional=_WRITER, others=None)
"""metadata.json as far as it says what can read it; those from before 0.2.0 do not."""
METADATA = record(_LEDGER, optional={**_WRITER, UPLOADED_TO: or_null(text())}, others=None)
"""metadata.json as far as a start goes on from it."""
DESCRIBED_METADATA = record(
    {
        **_LEDGER,
        "model": record(
            {
                **dict.fromkeys(("name", "revision", "weights_digest"), text()),
                "hidden_size": whole(1, 10**6),
                "num_layers": whole(1, MOST_LAYERS),
            }
        ),
        "dataset": record({"path": text(), "lines": _count}),
        "activation_types": distinct(one_of(*KINDS)),
        "layers": distinct(_layer),
        "layer_meanings": map_of(text(), text()),
        "compute_dtype": one_of(*COMPUTE_DTYPES),
        "activation_dtype": one_of(*STORED_DTYPES),
        "statistics": map_of(text(), map_of(_layer_or_embedding_word, _OF_LAYER)),
        "totals": map_of(text(), _sum),
        "fingerprint": record(
            {
                **dict.fromkeys(("stream_sha256", "keep_tokens"), text()),
                "skip_first": _count,
                **dict.fromkeys(("skip_special_tokens", "include_embedding", "include_answer"), yes_or_no),
                "max_seq_length": whole(1),
                "max_samples": or_null(_count),
            },
            others=None,
        ),
    },
    optional={"widths": map_of(text(r"[a-z_]+"), whole(1, 10**7))},
    others=None,
)
"""metadata.json as far as readers take something from it."""

CHECKPOINT = record({**_MARKER, "total_shards": _count}, others=None)
"""checkpoint_worker_N.json as far as a start goes on from it."""
SEEN_CHECKPOINT = record(
    {"total_samples_processed": _count, "total_shards": _count},
    optional={"worker_id": _worker, "status": _status},
    others=None,
)
SEEN_METADATA = record(
    {
        "totals": record({"bytes": _sum}, others=None),
        "statistics": map_of(
            text(), map_of(_layer_or_embedding_word, record({"norm_mean": _norm}, others=None))
        ),
    },
    optional={"model": record({"name": text()}, others=None)},
    others=None,
)
"""What those who watch a fleet take of them."""

_time = number(0, _MOST_TIME)


def _point(value: object, name: str) -> None:
    list_of(number(0, MOST), 3, 3)(value, name)
    _time(value[0], name)  # type: ignore[index]


PROGRESS = record(
    {
        "worker_id": _worker,
        "status": one_of(STARTING, RUNNING, ENDED, FAILED, TERMINATED),
        **dict.fromkeys(("samples_done", "samples_total", "shards", "tokens", "raw_bytes"), _count),
        "started_at": _time,
        "updated_at": _time,
        "last_shard_at": or_null(_time),
        "message": text(most=_MOST_MESSAGE),
        "exit_code": or_null(whole(most=255)),
        "history": list_of(_point, most=_MOST_POINTS),
        "earlier": list_of(_point, most=_MOST_POINTS),
    },
    others=unknown,
)

STATS_HEADER = record({"__metadata__": record({"stats": text(most=10**7)})}, others=None)
STATS = map_of(text(r"[a-z_]+"), record({"layers": distinct(_layer, 0), "count": whole(1)}, others=unknown))
"""What a statistics file says of its tensors."""

STREAMS = record(
    {"streams": list_of(record({"file": _file_name, "samples": _count, "sha256": _sha256}))}, others=None
)
EXPORT = record(
    {
        "about": map_of(text(), plain),
        "parts": map_of(_file_name, CRC32C),
        "layers": distinct(_layer_or_embedding, 0),
    },
    others=unknown,
)
EXPORTED_PARTS = list_of(list_of(plain, 2, 2))
