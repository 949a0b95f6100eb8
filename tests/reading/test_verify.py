"""Every planted fault is found and named, alone; a whole run has none; what is bad can be made again."""

import dataclasses
import gzip
import io
import json
import pickle
import re
import shutil

import numpy as np
import pytest

from qwen_jax.__main__ import main
from qwen_jax.errors import BadDataError, ConfigError
from qwen_jax.reading.runs import open_runs
from qwen_jax.reading.verify import verify_runs
from qwen_jax.shards import load_shard
from qwen_jax.shards.compress import Span
from qwen_jax.shards.parts import index_member, read_index
from qwen_jax.shards.statistics import parse_stats, stats_bytes
from tests.few import few
from tests.reading.conftest import DEMO, STREAMS, Copy, extract
from tests.run_worker.conftest import tree
from tests.shards.samples import without_index


def faults(*paths, streams=STREAMS, jobs=2) -> list[str]:
    runs = [run for path in paths for run in open_runs(path, damaged_too=True)]
    return [str(fault) for fault in verify_runs(runs, streams, jobs).faults]


def test_a_whole_run_has_none(clean):
    assert len(open_runs(clean)[0].shards) > 3
    assert faults(clean) == []


def edited(number, change):
    return lambda copy: copy.shard(number, change)


def noted(change):
    return lambda copy: copy.metadata(change)


def records(shard):
    return [record for layer in shard.values() for record in layer]


def set_value(value):
    def change(shard):
        shard[3][1]["activation"][2, 5] = value

    return change


def each(shard, key, make):
    """Puts one and the same array into a sample's records."""
    array = make(shard[1][0]["token_ids"])
    for layer in shard.values():
        layer[0][key] = array


def write(name, data):
    return lambda copy: (copy.folder / name).write_bytes(data)


def gadget(copy: Copy) -> None:
    class Gadget:
        def __reduce__(self):
            return print, ("this ran",)

    path = copy.folder / "shard_0002.pkl.gz"
    path.write_bytes(gzip.compress(pickle.dumps({1: [Gadget()]})))
    copy.record(2)


def drop_sample(copy: Copy) -> None:
    """The entry says what is there; only the sample's index shows that it is gone."""
    copy.shard(2, lambda shard: [layer.pop(1) for layer in shard.values()])
    shard = load_shard(copy.folder / "shard_0002.pkl.gz")
    tokens = sum(len(record["token_ids"]) for record in shard[1])
    copy.record(2, samples=len(shard[1]), tokens=tokens)


def with_index(copy: Copy, index: bytes) -> None:
    path = copy.folder / "shard_0002.pkl.gz"
    path.write_bytes(without_index(path.read_bytes()) + index)
    copy.record(2)


def foreign_index(copy: Copy) -> None:
    other = (copy.folder / "shard_0001.pkl.gz").read_bytes()
    with_index(copy, other[len(without_index(other)) :])


def false_index(copy: Copy) -> None:
    parts = read_index(io.BytesIO((copy.folder / "shard_0002.pkl.gz").read_bytes()))
    spans = [Span(part.size, part.crc32 ^ (part.key == 1)) for part in parts]
    with_index(copy, index_member([part.key for part in parts], spans))


def shift(shard) -> None:
    for record in records(shard):
        record["sample_idx"] -= 1


def narrow(shard):
    for record in records(shard):
        record["activation"] = record["activation"][:, :-1]


TOTALS = r"metadata.json: totals: \w+ is \d+, its shards and notes come to \d+$"
DAMAGED = ["metadata.json: is damaged", "no worker has extracted"]
NOT_THE_SUM = "stats.safetensors: is not the sum of the shards' statistics"
# Name: what is done to a copy of a clean run, and what each fault that is then found must say.
PLANTED = {
    "shard missing": (
        lambda copy: (copy.folder / "shard_0002.pkl.gz").unlink(),
        ["shard_0002.pkl.gz: is missing"],
    ),
    "shard cut": (
        lambda copy: (copy.folder / "shard_0002.pkl.gz").write_bytes(b"\x1f\x8b"),
        ["shard_0002.pkl.gz: has 2 bytes, metadata.json says"],
    ),
    "byte changed": (lambda copy: flip(copy.folder / "shard_0003.pkl.gz"), ["shard_0003.pkl.gz: has crc32c"]),
    "code in it": (gadget, ["shard_0002.pkl.gz: .*print"]),
    "index of another shard": (
        foreign_index,
        ["shard_0002.pkl.gz is not a whole shard: it has an index of other layers"],
    ),
    "index with false checksums": (
        false_index,
        ["shard_0002.pkl.gz is not a whole shard: it has a damaged part, 1"],
    ),
    "foreign shard": (write("shard_0099.pkl.gz", b"x"), ["shard_0099.pkl.gz: is not listed"]),
    "no metadata": (
        lambda copy: (copy.folder / "metadata.json").unlink(),
        ["metadata.json: is missing", "no worker has extracted"],
    ),
    "metadata torn": (write("metadata.json", b"{"), DAMAGED),
    "metadata without a fingerprint": (noted(lambda m: m.pop("fingerprint")), DAMAGED),
    "metadata without a worker": (noted(lambda m: m.pop("worker_id")), DAMAGED),
    "metadata of no model": (noted(lambda m: m.pop("model")), DAMAGED),
    "a list gone": (noted(lambda m: m.pop("skipped")), DAMAGED),
    "shards out of order": (noted(lambda m: m["shards"].reverse()), DAMAGED),
    "tokens miscounted": (
        noted(lambda m: m["shards"][0].update(tokens=7)),
        [r"shard_0001.pkl.gz: has tokens \d+, metadata.json says 7", TOTALS],
    ),
    "samples miscounted": (
        noted(lambda m: m["shards"][0].update(samples=7)),
        ["has samples 12, metadata.json says 7", TOTALS],
    ),
    "raw bytes miscounted": (
        noted(lambda m: m["shards"][0].update(raw_bytes=7)),
        [r"has raw_bytes \d+, metadata.json says 7", TOTALS],
    ),
    "totals wrong": (noted(lambda m: m["totals"].update(samples=7)), [TOTALS]),
    "a note gone": (noted(lambda m: m["shortened"].clear()), [TOTALS]),
    "a note of nothing": (
        noted(lambda m: m["truncated"].append({"sample_idx": 99})),
        ["noted as cut or shortened, but not stored: samples 99$", TOTALS],
    ),
    "first sample wrong": (
        noted(lambda m: m["shards"][0].update(first_sample_idx=1)),
        ["has first_sample_idx 0, metadata.json says 1"],
    ),
    "other layers": (
        noted(lambda m: m.update(layers=[1, 2])),
        [r"has layers \[1, 3\], metadata.json says \[1, 2\]"],
    ),
    "other dtype": (
        noted(lambda m: m.update(activation_dtype="bfloat16")),
        ["has dtype float32, metadata.json says bfloat16"],
    ),
    "other width": (
        edited(1, narrow),
        [
            "has width 63, metadata.json says 64",
            "has raw_bytes",
            r"residual, layer \d: its statistics are of 6387 rows of width 64, it has 6387 of 63",
        ],
    ),
    "other kinds": (
        noted(lambda m: m.update(activation_types=["residual", "mlp"])),
        ["has no residual$", "has no mlp$"],
    ),
    "no embedding": (
        noted(lambda m: m["fingerprint"].update(include_embedding=True)),
        ["has no embedding$"],
    ),
    "fewer tokens kept": (
        noted(lambda m: m["fingerprint"].update(keep_tokens="every:3")),
        ["has no token_positions$"],
    ),
    "not a number": (edited(2, set_value(np.nan)), ["sample 13, layer 3: 1 values of activation are"]),
    "infinite": (edited(2, set_value(-np.inf)), ["sample 13, layer 3: 1 values of activation are"]),
    "a value changed": (
        edited(2, set_value(9e3)),
        [
            "residual, layer 3: the (mean|largest value) of channel 5 is not that in its statistics",
            "residual, layer 3: the (variances|mean norm|largest norm)",
        ],
    ),
    "log-probability above 0": (
        edited(1, lambda shard: each(shard, "answer_logprobs", lambda tokens: np.ones(3, np.float32))),
        ["sample 0: has log-probabilities above 0", "has answer_logprobs, which such a run does not store"],
    ),
    "positions jumbled": (
        edited(1, lambda shard: each(shard, "token_positions", lambda tokens: tokens * 0)),
        ["sample 0: token_positions do not ascend", "has token_positions, which such a run does not store"],
    ),
    "unknown role": (
        edited(1, lambda shard: each(shard, "token_roles", lambda tokens: tokens * 0 + 12)),
        ["sample 0: token_roles: no role has the code 12"],
    ),
    "other tokens in a later layer": (
        lambda copy: copy.pickled(
            1, lambda shard: shard[3][2].update(token_ids=shard[3][2]["token_ids"] + 1)
        ),
        ["sample 2, layer 3: token_ids is not that of the first layer"],
    ),
    "other roles in a later layer": (
        lambda copy: copy.pickled(
            1, lambda shard: shard[3][0].update(token_roles=shard[3][0]["token_roles"] * 0)
        ),
        ["sample 0, layer 3: token_roles is not that of the first layer"],
    ),
    "roles gone": (
        edited(1, lambda shard: [record.pop("token_roles") for record in records(shard)]),
        ["shard_0001.pkl.gz: has no token_roles$"],
    ),
    "impossible colour": (
        edited(1, lambda shard: each(shard, "token_cells", lambda tokens: cells_of(tokens, colour=77))),
        ["sample 0: has token_cells that no grid has"],
    ),
    "cell twice": (
        edited(1, lambda shard: each(shard, "token_cells", lambda tokens: cells_of(tokens, row=0))),
        ["sample 0: has a cell twice in token_cells"],
    ),
    "negative token": (
        edited(1, lambda shard: each(shard, "token_ids", lambda tokens: tokens - 999)),
        ["sample 0: has negative token_ids"],
    ),
    "sample missing": (
        drop_sample,
        [
            r"metadata.json: missing: samples 13$",
            "has raw_bytes",
            "its statistics are of 6486 rows of width 64, it has 5983 of 64",
        ],
    ),
    "sample twice": (
        edited(2, shift),
        ["has (first|last)_sample_idx", "stored or skipped twice: samples 11$", "missing: samples 23$"],
    ),
    "skipped and stored": (
        noted(lambda m: m["skipped"].append({"sample_idx": 3, "bad_record": True})),
        ["stored or skipped twice: samples 3$", TOTALS],
    ),
    "beyond the end": (
        noted(lambda m: m["skipped"].append({"sample_idx": 99, "bad_record": True})),
        ["beyond the end: samples 99$", TOTALS],
    ),
    "unfinished": (
        noted(lambda m: m.update(status="in_progress")),
        ["unfinished: samples 36 to 35", "checkpoint_worker_0.json: says"],
    ),
    "checkpoint disagrees": (
        lambda copy: copy.checkpoint(last_processed_sample_idx=3, total_shards=1),
        [r"checkpoint_worker_0.json: says \['completed', 3, 1\]"],
    ),
    "checkpoint torn": (
        write("checkpoint_worker_0.json", b'{"status"'),
        ["checkpoint_worker_0.json: is damaged"],
    ),
    "statistics gone": (
        lambda copy: (copy.folder / "stats.safetensors").unlink(),
        ["stats.safetensors: is missing; .*stats.safetensors` makes it again"],
    ),
    "statistics torn": (
        write("stats.safetensors", b"123"),
        ["stats.safetensors is not a whole statistics file"],
    ),
    "statistics of fewer rows": (
        lambda copy: shutil.copy(copy.folder / "stats_0001.safetensors", copy.folder / "stats.safetensors"),
        [NOT_THE_SUM, "metadata.json: statistics are not those of stats.safetensors"],
    ),
    "a shard's statistics gone": (
        lambda copy: (copy.folder / "stats_0002.safetensors").unlink(),
        ["shard_0002.pkl.gz: has no stats_0002.safetensors beside it"],
    ),
    "a shard's statistics torn": (
        write("stats_0001.safetensors", b"123"),
        ["shard_0001.pkl.gz: stats_0001.safetensors is not a whole statistics file"],
    ),
    "means wrong everywhere": (
        lambda copy: change_stats(copy, mean_CD=lambda mean_CD: mean_CD * 1.01),
        [
            r"residual, layer \d: the mean of channel \d+ is not",
            "the variances in its statistics",
            NOT_THE_SUM,
        ],
    ),
    "variances wrong": (
        lambda copy: change_stats(copy, variance_CD=lambda variance_CD: variance_CD * 1.01),
        ["the variances in its statistics are not", NOT_THE_SUM],
    ),
    "largest values wrong": (
        lambda copy: change_stats(copy, max_abs_CD=lambda max_abs_CD: max_abs_CD * 1.01),
        [r"residual, layer \d: the largest value of channel 0 is not that in its statistics", NOT_THE_SUM],
    ),
    "summary wrong": (
        noted(lambda m: m["statistics"]["residual"]["1"].update(norm_mean=1.0)),
        ["metadata.json: statistics are not those of stats.safetensors"],
    ),
    "another stream": (
        noted(lambda m: m["fingerprint"].update(stream_sha256="0" * 64)),
        ["no worker has extracted stream_000.jsonl", "its stream is none of"],
    ),
}


def cells_of(tokens: np.ndarray, row: int | None = None, colour: int = 3) -> np.ndarray:
    """A column of cells, one a token."""
    cells = np.zeros((len(tokens), 4), np.int32)
    cells[:, 1] = np.arange(len(tokens)) if row is None else row
    cells[:, 3] = colour
    return cells


def change_stats(copy: Copy, **changes) -> None:
    """Changes the statistics of the first shard."""
    path = copy.folder / "stats_0001.safetensors"
    stats = parse_stats(path.read_bytes(), path.name)
    for kind, entry in stats.items():
        values = {name: change(getattr(entry, name)) for name, change in changes.items()}
        stats[kind] = dataclasses.replace(entry, **values)
    path.write_bytes(stats_bytes(stats))


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", few(PLANTED, 14))
def test_a_planted_fault_is_found_and_no_other(copy, name):
    plant, expected = PLANTED[name]
    plant(copy)
    found = faults(copy.folder)
    for pattern in expected:
        assert any(re.search(pattern, fault) for fault in found), (pattern, found)
    assert [fault for fault in found if not any(re.search(pattern, fault) for pattern in expected)] == []


def test_faults_come_in_the_order_of_the_shards_however_many_are_read_at_a_time(copy):
    for number in (1, 2, 3, 4):
        flip(copy.folder / f"shard_000{number}.pkl.gz")
    found = faults(copy.folder, jobs=1)
    assert [fault.partition(": has crc32c")[0][-18:] for fault in found] == [
        f"/shard_000{number}.pkl.gz" for number in (1, 2, 3, 4)
    ]
    assert faults(copy.folder, jobs=4) == found


def test_the_faults_of_other_workers_are_still_named(copy, clean):
    (copy.folder / "metadata.json").write_text("{")
    other = clean.parent.parent / "other"
    shutil.copytree(clean, other, dirs_exist_ok=True)
    (other / "shard_0001.pkl.gz").unlink()
    found = faults(copy.folder, other)
    assert any("is damaged" in fault for fault in found) and any(
        "shard_0001.pkl.gz: is missing" in fault for fault in found
    )


def test_torn_metadata_is_said_so(copy):
    (copy.folder / "metadata.json").write_text("{")
    with pytest.raises(BadDataError, match=r"metadata\.json is damaged"):
        open_runs(copy.folder)


def test_workers_are_compared(copy, clean):
    assert any("is worker 0, as" in fault for fault in faults(clean, copy.folder, streams=None))
    copy.metadata(lambda m: m.update(worker_id=1) or m["fingerprint"].update(overlong="skip"))
    copy.metadata(lambda m: m["fingerprint"].update(stream_sha256="0" * 64))
    (found,) = faults(clean, copy.folder, streams=None)
    assert "has overlong 'skip'" in found and "has 'drop_examples'" in found


def test_a_stream_extracted_twice(copy, clean):
    copy.metadata(lambda m: m.update(worker_id=1))
    (found,) = faults(clean, copy.folder)
    assert "holds the samples of a stream that" in found and str(clean) in found


@pytest.mark.wide
def test_workers_may_share_the_layers_of_one_stream(clean, tmp_path):
    flags = ("--layers_to_extract", "0", "2", "--batch_size", "2")
    other = Copy(extract(tmp_path, *flags, "--shard_size_gb", "0.003"))
    other.metadata(lambda m: m.update(worker_id=1))
    assert faults(clean, other.folder) == []


def test_a_shard_alone(copy, capsys):
    path = copy.folder / "shard_0002.pkl.gz"
    assert main(["verify", str(path)]) == 0
    assert "workers: 1, shards: 1, samples: 12, each stored once" in capsys.readouterr().out
    flip(path)
    assert main(["verify", str(path)]) == 1
    assert "has crc32c" in capsys.readouterr().out


def test_streams_are_compared_with_their_digests_and_lines(copy, tmp_path):
    listed = json.loads(STREAMS.read_text())
    (tmp_path / "streams.json").write_text(json.dumps(listed))
    stream = tmp_path / listed["streams"][0]["file"]
    stream.write_bytes((STREAMS.parent / stream.name).read_bytes())
    assert faults(copy.folder, streams=tmp_path / "streams.json") == []
    stream.write_bytes(stream.read_bytes() + b"{}\n")
    (found,) = faults(copy.folder, streams=tmp_path / "streams.json")
    assert f"{stream}: was changed since it was made: it has 37 lines" in found
    stream.unlink()
    copy.metadata(lambda m: m["dataset"].update(lines=40))
    assert any("saw 40 lines of" in fault for fault in faults(copy.folder, streams=tmp_path / "streams.json"))


@pytest.mark.parametrize("command", ["verify", "inspect", "stats"])
def test_a_hostile_name_does_not_reach_the_terminal(copy, capsys, command):
    def change(metadata):
        metadata["model"]["name"] = metadata["dataset"]["path"] = "x\x1b]0;owned\x07\x9b2Jy"
        metadata["fingerprint"]["overlong"] = "\x1b[2J"

    copy.metadata(change)
    other = Copy(copy.folder.with_name("worker_1"))
    shutil.copytree(copy.folder, other.folder)
    other.metadata(lambda m: m["fingerprint"].update(overlong="\x1b[3J"))
    main(
        [command, str(copy.folder), str(other.folder)] if command == "verify" else [command, str(copy.folder)]
    )
    out = capsys.readouterr().out
    assert out and all(line.isprintable() for line in out.splitlines())


def test_the_command_says_so(copy, capsys):
    assert main(["verify", str(copy.folder), "--streams", str(STREAMS)]) == 0
    assert "workers: 1, shards: 4, samples: 36, each stored once" in capsys.readouterr().out
    flip(copy.folder / "shard_0001.pkl.gz")
    assert main(["verify", str(copy.folder)]) == 1
    assert capsys.readouterr().out.endswith("\n1 fault\n")


def test_repair_makes_the_same_bytes(copy, clean, capsys):
    flip(copy.folder / "shard_0002.pkl.gz")
    (copy.folder / "shard_0004.pkl.gz").unlink()
    assert main(["verify", str(copy.folder), "--repair"]) == 0
    again = "extracting again: shard_0002.pkl.gz (samples 12 to 23), shard_0004.pkl.gz (samples 35 to 35)"
    assert again in capsys.readouterr().out
    assert tree(copy.folder) == tree(clean)


@pytest.mark.wide
def test_repair_goes_on_after_a_shard_that_this_machine_cannot_make(copy, clean, capsys):
    for number in (1, 2):
        (copy.folder / f"shard_000{number}.pkl.gz").unlink()
    copy.metadata(lambda m: m["shards"][0].update(crc32c="AAAAAA=="))
    copy.metadata(lambda m: m["written_by"].update(jax="0.0.1"))
    with pytest.raises(ConfigError, match="other bytes of shard_0001.pkl.gz than the run did") as raised:
        main(["verify", str(copy.folder), "--repair"])
    assert re.search(r"written by .*jax 0\.0\.1, .*here is .*jax \d[.\d]*, ", str(raised.value))
    assert not (copy.folder / "shard_0001.pkl.gz").exists()
    assert (copy.folder / "shard_0002.pkl.gz").read_bytes() == (clean / "shard_0002.pkl.gz").read_bytes()


def test_what_is_left_after_a_repair_is_named(copy, capsys):
    (copy.folder / "shard_0002.pkl.gz").unlink()
    (copy.folder / "stats.safetensors").unlink()
    assert main(["verify", str(copy.folder), "--repair"]) == 1
    said = capsys.readouterr().out.partition("extracting again")[2]
    assert "stats.safetensors: is missing" in said and "shard_0002.pkl.gz: is missing" not in said


def test_repair_refuses_another_model(copy, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(DEMO / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    (copy.folder / "shard_0002.pkl.gz").unlink()
    with pytest.raises(ConfigError, match="weights_digest"):
        main(["verify", str(copy.folder), "--repair", "--model_path", str(model)])
    assert not (copy.folder / "shard_0002.pkl.gz").exists()


def test_stats_bytes_of_a_run_are_found(clean):
    from qwen_jax.reading.merged_stats import merged_stats

    assert stats_bytes(merged_stats(open_runs(clean))) == (clean / "stats.safetensors").read_bytes()
