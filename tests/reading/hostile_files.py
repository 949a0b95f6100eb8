"""Files that a stranger could put in the place of ours, and every command that reads them, run one after another.

`python -m tests.reading.hostile_files FOLDER OUT`: FOLDER is a copy of a run. One line of JSON for each file and
command: what came of it, and the memory that it took.
"""

import contextlib
import io
import json
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from qwen_jax.__main__ import main
from qwen_jax.errors import ToolkitError
from qwen_jax.ledger.metadata import RunIdentity
from qwen_jax.ledger.names import (
    METADATA_NAME,
    STATS_NAME,
    checkpoint_name,
    progress_name,
    shard_name,
    shard_stats_name,
)
from qwen_jax.run import certify
from qwen_jax.run.places import Places
from qwen_jax.run.resume import resume
from tests.peak_memory import peak_bytes

CHECKPOINT, PROGRESS = checkpoint_name(0), progress_name(0)
STREAMS, EXPORT, PARTS = "streams.json", "export.json", "parts.json"
Change = Callable[[dict], Any]

HUGE, DEEP = 2**52, 100_000
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "nested lists": b"[" * DEEP,
    "nested lists, closed": b"[" * 5000 + b"]" * 5000,
    "nested objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "a list": b"[1, 2]",
    "a text": b'"x"',
    "null": b"null",
    "UTF-16": json.dumps({"status": "completed"}).encode("utf-16"),
    "no UTF-8": b'{"status": "\xff"}',
    "a number of 5,000 digits": b'{"worker_id": ' + b"1" * 5000 + b"}",
    "millions of lists": b"[" + b"[]," * 3_000_000 + b"0]",
    "millions of objects": b"[" + b'{"a":{}},' * 800_000 + b"0]",
}
AS_MANY_AS_MAY_BE = b"[" + b'{"a":{}},' * 380_000 + b"0]"


def put(path: str, value: Any) -> Change:
    """Sets what stands at a path: `shards.0.samples`."""
    *above, last = path.split(".")

    def change(node: Any) -> None:
        for key in above:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[int(last) if isinstance(node, list) else last] = value

    return change


def both(*changes: Change) -> Change:
    return lambda fields: [change(fields) for change in changes]


NESTED: Any = []
for _ in range(900):
    NESTED = [NESTED]

NUMBERS: dict[str, Any] = {
    "infinite": float("inf"),
    "not a number": float("nan"),
    "2**2039": 2**2039,
    "negative": -7,
    "a text": "7",
    "yes": True,
    "a list": [7],
}
METADATA: dict[str, Change] = {
    **{f"reached {name}": put("last_processed_sample_idx", value) for name, value in NUMBERS.items()},
    **{f"tokens {name}": put("shards.0.tokens", value) for name, value in NUMBERS.items()},
    "2**52 samples dealt with": put("last_processed_sample_idx", HUGE),
    "2**52 samples in the last shard": both(
        put("last_processed_sample_idx", HUGE), put("shards.-1.last_sample_idx", HUGE)
    ),
    "a gap of 2**52": both(
        put("last_processed_sample_idx", HUGE),
        put("shards.-1.last_sample_idx", HUGE),
        put("shards.-1.first_sample_idx", HUGE),
    ),
    "10**14 tokens": put("shards.0.tokens", 10**14),
    "10**14 samples": put("shards.0.samples", 10**14),
    "an index of 2,039 bits": lambda m: m["skipped"].append({"sample_idx": 2**2038, "bad_record": True}),
    "a length that is text": lambda m: m["skipped"].append(
        {"sample_idx": 1, "bad_record": False, "full_length": "x"}
    ),
    "a note that is a list": lambda m: m["truncated"].append([1]),
    "half a surrogate pair": lambda m: m["skipped"].append(
        {"sample_idx": 1, "bad_record": True, "task_id": "\ud800"}
    ),
    "half a surrogate pair as a key": put("fingerprint.\udfff", 1),
    "half a surrogate pair as a name": put("model.name", "\ud800"),
    "nested settings": put("settings", {"deep": NESTED}),
    "nested statistics": put("statistics", {"deep": NESTED}),
    "nested, where nobody looks": put("anything", NESTED),
    "an odd kind": put("activation_types", ["soul"]),
    "a kind twice": put("activation_types", ["residual", "residual"]),
    "no kind": put("activation_types", []),
    "kinds that are objects": put("activation_types", [{}]),
    "a kind that is not stored": put("activation_types", ["mlp", "residual"]),
    "a negative layer": put("layers", [-1]),
    "a layer of 2**40": put("layers", [2**40]),
    "a layer twice": put("layers", [1, 1]),
    "layers that are lists": put("layers", [[1]]),
    "layers that are text": put("layers", "13"),
    "norms of no layer": put("statistics", {"residual": {"x": {"norm_mean": 1.0}}}),
    "a norm of 1e300": put("statistics.residual.1.norm_mean", 1e300),
    "a norm that is text": put("statistics.residual.1.norm_mean", "x"),
    "norms that are a list": put("statistics", [1]),
    "totals that are a list": put("totals", [1]),
    "totals without keys": put("totals", {}),
    "an odd worker": put("worker_id", 2**70),
    "a negative worker": put("worker_id", -1),
    "a worker that is text": put("worker_id", "\x1b[2J"),
    "an odd status": put("status", "\x1b]0;x\x07"),
    "a status that is a list": put("status", ["completed"]),
    "a file elsewhere": put("shards.0.filename", "../../etc/passwd"),
    "a file that is a number": put("shards.0.filename", 1),
    "an odd checksum": put("shards.0.crc32c", "x"),
    "an odd dtype": put("activation_dtype", "object"),
    "a dtype that is a list": put("compute_dtype", ["float32"]),
    "no width": put("model.hidden_size", 0),
    "10**9 layers": put("model.num_layers", 10**9),
    "a model that is a list": put("model.name", [1]),
    "a model with a zero byte": put("model.name", "a\0b"),
    "a stream with a zero byte": put("dataset.path", "a\0b"),
    "a stream without end": put("dataset.path", "/dev/zero"),
    "lines that are text": put("dataset.lines", "36"),
    "2**60 lines": put("dataset.lines", 2**60),
    "meanings that are a list": put("layer_meanings", []),
    "no meanings": put("layer_meanings", {}),
    "an answer that is text": put("fingerprint.include_answer", "no"),
    "a limit that is text": put("fingerprint.max_samples", "9"),
    "a fingerprint that is a list": put("fingerprint", []),
    "layers of text in the fingerprint": put("fingerprint.layers", "13"),
    "a batch of 2**40": put("settings.batch_size", 2**40),
    "no attention": put("settings.attention", None),
    "statistics that are a list": put("statistics", [1]),
    "no shards": put("shards", {}),
}
CHECKPOINTS: dict[str, Change] = {
    **{f"shards {name}": put("total_shards", value) for name, value in NUMBERS.items()},
    **{f"samples {name}": put("total_samples_processed", value) for name, value in NUMBERS.items()},
    "2**52 samples": both(put("last_processed_sample_idx", HUGE), put("total_samples_processed", HUGE)),
    "nested": put("fingerprint", {"deep": NESTED}),
    "an odd worker": put("worker_id", [0]),
    "an odd status": put("status", {"\x1b[2J": 1}),
}
RECORDS: dict[str, Change] = {
    **{f"samples {name}": put("samples_done", value) for name, value in NUMBERS.items()},
    **{f"time {name}": put("updated_at", value) for name, value in NUMBERS.items()},
    "a history of text": put("history", ["abc"]),
    "a history without numbers": put("history", [[1.0, None, 2.0]]),
    "an endless speed": both(
        put("history", [[0.0, 0, 0.0], [5e-324, 1, 1e15]]),
        put("updated_at", time.time()),
        put("samples_total", 10**15),
    ),
    "a million points": put("history", [[1.0, 2, 3.0]] * 10**6),
    "a message of controls": put("message", "\x1b[2J\r\n" * 1000),
    "a message that is a list": put("message", NESTED),
    "another key": put("more", 1),
}
STREAM_LISTS: dict[str, Change] = {
    **{f"samples {name}": put("streams.0.samples", value) for name, value in NUMBERS.items()},
    "no list": put("streams", {"file": 1}),
    "a file that is a list": put("streams.0.file", ["x"]),
    "a file elsewhere": put("streams.0.file", "../../etc/passwd"),
    "a file with a zero byte": put("streams.0.file", "a\0b"),
    "an odd sha256": put("streams.0.sha256", "\x1b[2J"),
    "a sha256 that is a list": put("streams.0.sha256", []),
}
EXPORTS: dict[str, Change] = {
    "about a list": put("about", []),
    "about nested": put("about", {"format": NESTED}),
    "parts that are numbers": put("parts", {"x": 1}),
    "parts that are a list": put("parts", []),
    "layers that are objects": put("layers", [{}]),
    "a layer of 2**70": put("layers", [2**70]),
    "another key": put("more", 1),
}
PART_LISTS = {"numbers": b"[1, 2]", "an object": b'{"a": 1}', "nested parts": b"[[[[1]], 2]]"}


def stats_cases(data: bytes) -> Iterator[tuple[str, bytes]]:
    """A statistics file, changed."""
    tensors = load(data)

    def made(about: Any, **changed: np.ndarray) -> bytes:
        names = {name.replace(".", "_"): name for name in tensors}
        return save(
            tensors | {names[name]: array for name, array in changed.items()},
            metadata={"stats": about if isinstance(about, str) else json.dumps(about)},
        )

    good = {"residual": {"layers": [1, 3], "count": 5}}
    mean = tensors["residual.mean"]
    yield "cut", data[: len(data) // 2]
    yield "no header", b"123"
    yield "a header of 2**63 bytes", struct.pack("<Q", 2**63) + b"{}"
    yield "a nested header", struct.pack("<Q", 2 * DEEP) + b"[" * DEEP + b"]" * DEEP
    yield "nested", made("[" * DEEP)
    yield "no text", struct.pack("<Q", 2) + b"{}"
    yield "nothing", made({})
    yield "a list", made([1])
    yield "counted in text", made({"residual": {"layers": [1, 3], "count": "x"}})
    yield "a negative count", made({"residual": {"layers": [1, 3], "count": -5}})
    yield "an infinite count", made('{"residual": {"layers": [1, 3], "count": 1e999}}')
    yield "layers of text", made({"residual": {"layers": "13", "count": 5}})
    yield "a layer of 2**40", made({"residual": {"layers": [1, 2**40], "count": 5}})
    yield "an odd kind", made({"\x1b[2J": {"layers": [1, 3], "count": 5}})
    yield "not a number", made(good, residual_mean=mean * np.nan)
    yield "a negative variance", made(good, residual_variance=-np.ones_like(mean))
    yield "other shapes", made(good, residual_mean=mean[:, :3].copy())


def files(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """The file's name, what it is, its content."""
    whole = {
        METADATA_NAME: (METADATA, json.loads((folder / METADATA_NAME).read_text())),
        CHECKPOINT: (CHECKPOINTS, json.loads((folder / CHECKPOINT).read_text())),
        PROGRESS: (RECORDS, json.loads((folder / PROGRESS).read_text())),
        STREAMS: (STREAM_LISTS, json.loads((folder / STREAMS).read_text())),
        EXPORT: (EXPORTS, {"about": {"format": "npy"}, "parts": {}, "layers": []}),
    }
    for name, (changes, fields) in whole.items():
        for what, change in changes.items():
            copy = json.loads(json.dumps(fields))
            change(copy)
            yield name, what, json.dumps(copy).encode()
    for name in (*whole, PARTS):
        few = TEXTS if name == METADATA_NAME else list(TEXTS)[::3]
        yield from ((name, what, TEXTS[what]) for what in few)
    yield CHECKPOINT, "as many objects as may be", AS_MANY_AS_MAY_BE
    yield from ((PARTS, what, data) for what, data in PART_LISTS.items())
    for name in (STATS_NAME, shard_stats_name(1)):
        for what, data in stats_cases((folder / STATS_NAME).read_bytes()):
            yield name, what, data


def commands(
    folder: Path, out: Path, name: str, identity: RunIdentity
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Those that read the file."""
    reads = {
        "verify": ["verify", str(folder), "--streams", str(folder / STREAMS)],
        "inspect": ["inspect", str(folder)],
        "stats": ["stats", str(folder)],
        "plot": ["plot", str(folder), "-o", str(out / "x.png")],
        "export": ["export", str(folder), "--to", "npy", "--output", str(out)],
        "certify": ["certify", str(folder), "--samples", "1"],
        "workers": [
            "workers",
            "1",
            "--checkpoint_dir",
            str(folder),
            "--output_dir",
            str(folder.parent),
            "--html",
            str(out / "x.html"),
        ],
    }
    readers = {
        METADATA_NAME: [*reads],
        CHECKPOINT: ["verify", "workers"],
        PROGRESS: ["workers"],
        STREAMS: ["verify"],
        EXPORT: ["export"],
        PARTS: ["export"],
    }
    for command in readers.get(name, ["verify", "stats"]):
        yield command, lambda command=command: main(reads[command])
    if name in (METADATA_NAME, CHECKPOINT):
        yield "resume", lambda: resume(identity, Places(folder, folder / CHECKPOINT, CHECKPOINT, None))


def outcome(work: Callable[[], Any]) -> str:
    """`exit N` with a message in one line, or the exception that came instead."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            code = work()
        return f"exit {code if isinstance(code, int) else 0}"
    except ToolkitError as error:
        text = str(error).replace("\n  ", "; ")  # a setting that differs has a line of its own
        return f"exit {error.exit_code}: {text}" if text.isprintable() else f"not one line: {text!r}"
    except Exception as error:  # noqa: BLE001  (that is what is looked for)
        return f"traceback: {error!r:.300}"


def _reset_peak() -> int:
    """Bytes held now, from which a peak is counted."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def shrink(folder: Path) -> None:
    """Leaves the last shard alone, as the first, so that it is read in no time."""
    metadata = json.loads((folder / METADATA_NAME).read_text())
    number = len(metadata["shards"])
    for name in (shard_name, shard_stats_name):
        (folder / name(number)).rename(folder / name(1))
    for other in range(2, number):
        (folder / shard_name(other)).unlink()
    metadata["shards"] = [metadata["shards"][-1] | {"filename": shard_name(1)}]
    (folder / METADATA_NAME).write_text(json.dumps(metadata))
    (folder / STATS_NAME).write_bytes((folder / shard_stats_name(1)).read_bytes())


def run(folder: Path) -> Iterator[dict[str, Any]]:
    shrink(folder)
    metadata = json.loads((folder / METADATA_NAME).read_text())
    identity = RunIdentity(0, "stream", "model", metadata["fingerprint"], {})
    # Where it comes to that, all of the files has been read; the computation would take minutes.
    certify.certify = lambda job, stored: {"samples": [], "tolerance": 0.0, "references": {}, "passed": True}
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("took more than 20 s")))
    for name, what, data in files(folder):
        with tempfile.TemporaryDirectory() as out:
            path = (Path(out) if name in (EXPORT, PARTS) else folder) / name
            before = path.read_bytes() if path.exists() else None
            for command, work in commands(folder, Path(out), name, identity):
                path.write_bytes(data)
                start, held = time.monotonic(), _reset_peak()
                signal.alarm(20)
                said = outcome(work)
                signal.alarm(0)
                yield {
                    "file": f"{name}: {what}",
                    "command": command,
                    "outcome": said,
                    "bytes": peak_bytes() - held,
                    "seconds": round(time.monotonic() - start, 2),
                }
            if before is not None:
                path.write_bytes(before)


if __name__ == "__main__":
    for line in run(Path(sys.argv[1])):
        print(json.dumps(line), flush=True)
