"""Every planted fault is found and named, alone; a whole run has none; what is bad can be made again."""

import gzip
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
from qwen_jax.shards.statistics import stats_bytes
from qwen_jax.storage.checksum import file_crc32c
from tests.reading.conftest import DEMO, STREAMS, Copy
from tests.run_worker.conftest import tree


def faults(*paths, streams=STREAMS) -> list[str]:
    return [str(fault) for fault in verify_runs([run for path in paths for run in open_runs(path)], streams)]


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
    size, crc32c = file_crc32c(path)
    copy.metadata(lambda metadata: metadata["shards"][1].update(bytes=size, crc32c=crc32c))


def drop_sample(copy: Copy) -> None:
    copy.shard(2, lambda shard: [layer.pop(1) for layer in shard.values()])
    copy.metadata(lambda m: m["shards"][1].update(samples=m["shards"][1]["samples"] - 1))
    shard_tokens(copy, 2)


def shard_tokens(copy: Copy, number: int) -> None:
    """Makes the entry's token count and norms those of the shard."""
    from qwen_jax.shards import load_shard

    shard = load_shard(copy.folder / f"shard_{number:04d}.pkl.gz")

    def change(metadata):
        entry = metadata["shards"][number - 1]
        entry["tokens"] = sum(len(record["token_ids"]) for record in shard[1])
        for layer in shard:
            rows = np.concatenate([record["activation"] for record in shard[layer]])
            entry["layer_norms"][str(layer)]["mean"] = float(np.linalg.norm(rows, axis=1).mean())

    copy.metadata(change)
    write("stats.safetensors", b"")(copy)
    copy.metadata(lambda metadata: metadata.update(status="in_progress"))


def repeat_sample(copy: Copy) -> None:
    def change(shard):
        for record in records(shard):
            record["sample_idx"] -= 1

    copy.shard(2, change)

    def entry(metadata):
        metadata["shards"][1]["first_sample_idx"] -= 1
        metadata["shards"][1]["last_sample_idx"] -= 1

    copy.metadata(entry)


def narrow(shard):
    for record in records(shard):
        record["activation"] = record["activation"][:, :-1]


PLANTED = {
    "shard missing": (
        lambda copy: (copy.folder / "shard_0002.pkl.gz").unlink(),
        ["shard_0002.pkl.gz: is missing"],
    ),
    "shard cut": (
        lambda copy: (copy.folder / "shard_0002.pkl.gz").write_bytes(b"\x1f\x8b"),
        ["shard_0002.pkl.gz: has 2 bytes, metadata.json says"],
    ),
    "byte changed": (
        lambda copy: flip(copy.folder / "shard_0003.pkl.gz"),
        ["shard_0003.pkl.gz: has crc32c"],
    ),
    "code in it": (gadget, ["shard_0002.pkl.gz: .*print"]),
    "foreign shard": (write("shard_0099.pkl.gz", b"x"), ["shard_0099.pkl.gz: is not listed"]),
    "no metadata": (
        lambda copy: (copy.folder / "metadata.json").unlink(),
        ["has no metadata.json", "no worker has"],
    ),
    "tokens miscounted": (
        noted(lambda m: m["shards"][0].update(tokens=7)),
        [r"has tokens \d+, metadata.json says 7", "counts .* rows"],
    ),
    "samples miscounted": (noted(lambda m: m["shards"][0].update(samples=7)), ["metadata.json says 7"]),
    "first sample wrong": (
        noted(lambda m: m["shards"][0].update(first_sample_idx=1)),
        ["has first_sample_idx 0"],
    ),
    "other layers": (
        noted(lambda m: m.update(layers=[1, 2])),
        [r"has layers \[1, 3\], metadata.json says"] * 2,
    ),
    "other dtype": (
        noted(lambda m: m.update(activation_dtype="bfloat16")),
        ["holds float32 of width 64"] * 2,
    ),
    "other width": (
        edited(1, narrow),
        ["holds float32 of width 63", "layer 1 has mean norm", "layer 3 has mean"],
    ),
    "norms wrong": (
        noted(lambda m: m["shards"][1]["layer_norms"]["3"].update(mean=1.0)),
        ["shard_0002.pkl.gz: layer 3 has mean norm .*, metadata.json says 1"],
    ),
    "not a number": (
        edited(2, set_value(np.nan)),
        ["layer 3: 1 values of activation are", "layer 3 has mean norm nan"],
    ),
    "infinite": (
        edited(2, set_value(-np.inf)),
        ["layer 3: 1 values of activation"],
    ),
    "log-probability above 0": (
        edited(1, lambda shard: each(shard, "answer_logprobs", lambda tokens: np.ones(3, np.float32))),
        ["sample 0: has log-probabilities above 0"],
    ),
    "positions jumbled": (
        edited(1, lambda shard: each(shard, "token_positions", lambda tokens: tokens * 0)),
        ["sample 0: token_positions do not ascend"],
    ),
    "unknown role": (
        edited(1, lambda shard: each(shard, "token_roles", lambda tokens: tokens * 0 + 9)),
        ["sample 0: token_roles: no role has the code 9"],
    ),
    "negative token": (
        edited(1, lambda shard: each(shard, "token_ids", lambda tokens: tokens - 999)),
        ["sample 0: has negative token_ids"],
    ),
    "sample missing": (drop_sample, [r"metadata.json: unfinished", r"metadata.json: missing: samples \d+$"]),
    "sample twice": (
        repeat_sample,
        [r"stored or skipped twice: samples \d+$", r"missing: samples \d+$"],
    ),
    "skipped and stored": (
        noted(lambda m: m["skipped"].append({"sample_idx": 3, "bad_record": True})),
        ["stored or skipped twice: samples 3$"],
    ),
    "beyond the end": (
        noted(lambda m: m["skipped"].append({"sample_idx": 99, "bad_record": True})),
        ["beyond the end: samples 99$"],
    ),
    "unfinished": (noted(lambda m: m.update(status="in_progress")), ["unfinished: samples 36 to 35", "says"]),
    "checkpoint disagrees": (
        write(
            "checkpoint_worker_0.json",
            b'{"status": "completed", "last_processed_sample_idx": 3, "total_shards": 1}',
        ),
        [r"checkpoint_worker_0.json: says \['completed', 3, 1\]"],
    ),
    "checkpoint torn": (
        write("checkpoint_worker_0.json", b'{"status"'),
        ["checkpoint_worker_0.json: is damaged"],
    ),
    "statistics gone": (
        lambda copy: (copy.folder / "stats.safetensors").unlink(),
        ["stats.safetensors: is missing"],
    ),
    "statistics torn": (
        write("stats.safetensors", b"123"),
        ["stats.safetensors: .*is not a whole statistics file"],
    ),
    "statistics of fewer rows": (
        lambda copy: shutil.copy(copy.folder / "stats_0001.safetensors", copy.folder / "stats.safetensors"),
        ["stats.safetensors: counts"],
    ),
    "another stream": (
        noted(lambda m: m["fingerprint"].update(stream_sha256="0" * 64)),
        ["no worker has extracted stream_000.jsonl", "its stream is none of"],
    ),
    "a key gone": (noted(lambda m: m.pop("skipped")), ["metadata.json: is damaged"]),
}


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_and_no_other(copy, name):
    plant, expected = PLANTED[name]
    plant(copy)
    found = faults(copy.folder)
    for pattern in expected:
        assert any(re.search(pattern, fault) for fault in found), (pattern, found)
    foreign = [fault for fault in found if not any(re.search(pattern, fault) for pattern in expected)]
    assert [
        fault for fault in foreign if "checkpoint" not in fault and "stats.safetensors" not in fault
    ] == []


def test_torn_metadata_is_said_so(copy):
    (copy.folder / "metadata.json").write_text("{")
    with pytest.raises(BadDataError, match=r"metadata\.json is damaged"):
        open_runs(copy.folder)


def test_workers_are_compared(copy, clean):
    assert any("is worker 0, as" in fault for fault in faults(clean, copy.folder, streams=None))
    copy.metadata(lambda m: m.update(worker_id=1) or m["fingerprint"].update(overlong="skip"))
    found = [fault for fault in faults(clean, copy.folder, streams=None) if "checkpoint" not in fault]
    assert len(found) == 1 and "has overlong 'skip'" in found[0] and "has 'drop_examples'" in found[0]


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
    assert "extracting again: shard_0002.pkl.gz, shard_0004.pkl.gz" in capsys.readouterr().out
    assert tree(copy.folder) == tree(clean)


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
    from qwen_jax.reading.statistics import merged_stats

    assert stats_bytes(merged_stats(open_runs(clean))) == (clean / "stats.safetensors").read_bytes()
