"""Other settings, and markers or shards that are torn, foreign or absurd: refused or rebuilt, by name."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.errors import BadDataError, ConfigError, StorageError
from qwen_jax.ledger.metadata import Ledger, RunIdentity
from qwen_jax.ledger.schema import COMPLETED
from qwen_jax.run.commit import Committer
from qwen_jax.run.pipeline import CapturedSample
from qwen_jax.run.places import Places
from qwen_jax.run.resume import Resumed, discard, resume
from qwen_jax.storage.folder import FolderStore
from tests.few import few
from tests.run_worker.conftest import ROOT, captured_sample, commit, filled
from tests.run_worker.torture import CHECKPOINT

FIELDS = [
    "stream_sha256",
    "weights_digest",
    "tokenizer_digest",
    "layers",
    "activation_type",
    "include_embedding",
    "include_answer",
    "keep_tokens",
    "skip_first",
    "skip_special_tokens",
    "compute_dtype",
    "activation_dtype",
    "max_seq_length",
    "prompt_format",
    "chat_template",
    "overlong",
    "shard_size_gb",
    "max_samples",
]
SHARDS = 3


@dataclass(frozen=True)
class Prepared:
    """A run in this process that was cut after SHARDS shards."""

    run: RunIdentity
    places: Places

    @property
    def markers(self) -> list[Path]:
        return [self.places.checkpoint_path, self.places.metadata_path]

    def resume(self) -> Resumed:
        return resume(self.run, self.places)

    def assert_whole_or_refused(self) -> None:
        """Everything is found again and the markers can be mended, or an error says why not."""
        try:
            resumed = self.resume()
        except BadDataError as error:
            assert "has format" in str(error)
            return
        except ConfigError as error:
            assert "--force_restart" in str(error)
            return
        assert len(resumed.ledger.shards) == SHARDS
        assert resumed.ledger.next_sample_idx >= 2 * SHARDS
        assert not resumed.is_new
        Committer(self.run, self.places, (0, 1), resumed.ledger, resumed.fence).mend(resumed.stored)


@pytest.fixture(scope="module")
def identity(finished) -> RunIdentity:
    """That of a real run."""
    metadata = finished.metadata()
    assert sorted(metadata["fingerprint"]) == sorted(FIELDS)
    return RunIdentity(5, "stream", "model", metadata["fingerprint"], {"layers": [0, 1], "settings": {}})


def prepare(identity: RunIdentity, root: Path, *, with_bucket: bool) -> Prepared:
    output = root / "worker_5"
    output.mkdir()
    store = FolderStore(root / "bucket") if with_bucket else None
    places = Places(output, root / CHECKPOINT, CHECKPOINT, store)
    resumed = resume(identity, places)
    committer = Committer(identity, places, (0, 1), resumed.ledger, resumed.fence)
    committer.open()
    for number in range(SHARDS):
        commit(committer, filled(small_sample(2 * number), small_sample(2 * number + 1)))
    return Prepared(identity, places)


@pytest.fixture(params=[False, True], ids=["local", "bucket"])
def prepared(identity, tmp_path, request) -> Prepared:
    return prepare(identity, tmp_path, with_bucket=request.param)


@pytest.fixture
def local(identity, tmp_path) -> Prepared:
    return prepare(identity, tmp_path, with_bucket=False)


def small_sample(index: int) -> CapturedSample:
    return captured_sample(index, np.random.default_rng(index).standard_normal((2, 3, 4)).astype(np.float32))


def other(value: Any) -> Any:
    """A value of the same type that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return value[:-1]
    return "other" if isinstance(value, str) else (value or 0) + 1


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_of_the_fingerprint(prepared, field):
    old = prepared.run.fingerprint[field]
    drifted = replace(prepared.run, fingerprint=prepared.run.fingerprint | {field: other(old)})
    with pytest.raises(ConfigError) as refused:
        resume(drifted, prepared.places)
    assert refused.value.exit_code == 78
    assert str(refused.value).endswith(f"overwrite it:\n  {field}: was {old!r}, is {other(old)!r}")


@pytest.mark.parametrize("marker", [0, 1], ids=["checkpoint", "metadata"])
def test_each_marker_alone_refuses(prepared, marker):
    """A drift is seen whichever of the two files is left."""
    drifted = replace(prepared.run, fingerprint=prepared.run.fingerprint | {"overlong": "skip"})
    name = prepared.markers[1 - marker].name
    prepared.markers[1 - marker].unlink()
    if prepared.places.store is not None:
        prepared.places.store.delete(name)
    with pytest.raises(ConfigError, match="overlong: was 'drop_examples', is 'skip'"):
        resume(drifted, prepared.places)


def test_another_workers_checkpoint(local):
    fields = json.loads(local.markers[0].read_bytes())
    local.markers[0].write_text(json.dumps(fields | {"worker_id": 6}))
    with pytest.raises(ConfigError, match="worker_id: was 6, is 5"):
        local.resume()


def test_metadata_of_another_run(local):
    fields = json.loads(local.markers[1].read_bytes())
    fields["fingerprint"]["weights_digest"] = "0" * 64
    local.markers[1].write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"(?s)metadata\.json of .*weights_digest: was '000"):
        local.resume()


@pytest.mark.wide
def test_a_checkpoint_torn_at_every_byte_is_rebuilt(local):
    whole = local.markers[0].read_bytes()
    for length in range(len(whole) - 1):
        local.markers[0].write_bytes(whole[:length])
        resumed = local.resume()
        assert len(resumed.ledger.shards) == SHARDS and resumed.local_lags, length
    Committer(local.run, local.places, (0, 1), resumed.ledger, resumed.fence).mend(None)
    assert local.markers[0].read_bytes() == whole


@pytest.mark.wide
def test_metadata_torn_at_every_byte_is_refused(local):
    whole = local.markers[1].read_bytes()
    for length in range(len(whole) - 1):
        local.markers[1].write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"no readable metadata\.json"):
            local.resume()


def test_torn_local_markers_beside_a_whole_bucket_do_no_harm(identity, tmp_path):
    prepared = prepare(identity, tmp_path, with_bucket=True)
    for marker in prepared.markers:
        marker.write_bytes(marker.read_bytes()[:100])
    resumed = prepared.resume()
    assert len(resumed.ledger.shards) == SHARDS
    assert (resumed.bucket_lags, resumed.local_lags) == (False, True)


ABSURD = [
    10**30,
    2**53,
    -1,
    -(10**30),
    0.5,
    float("nan"),
    float("inf"),
    True,
    None,
    "3",
    "\ud800",
    [],
    [[]],
    {},
]
ABSURD += [{"a": 1}, 999]


def leaves(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in a JSON tree, inner nodes too."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


def changed(root: Any, path: tuple, change: Callable[[Any, Any], None]) -> bytes:
    """The tree as JSON after `change(parent, key)` at `path`."""
    root = json.loads(json.dumps(root))
    parent = root
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return json.dumps(root).encode()


@pytest.mark.wide
@pytest.mark.parametrize("marker", [0, 1], ids=["checkpoint", "metadata"])
def test_absurd_and_missing_values_everywhere(local, marker):
    """Some cannot be told from true ones (a task's name); then nothing may be lost."""
    originals = [path.read_bytes() for path in local.markers]
    fields = json.loads(originals[marker])
    changes = [lambda parent, key, value=value: parent.__setitem__(key, value) for value in ABSURD]
    changes.append(lambda parent, key: parent.pop(key))
    for path in list(leaves(fields)):
        for change in changes:
            local.markers[0].write_bytes(originals[0])
            local.markers[1].write_bytes(originals[1])
            local.markers[marker].write_bytes(changed(fields, path, change))
            local.assert_whole_or_refused()


@pytest.mark.parametrize("marker", [0, 1], ids=["checkpoint", "metadata"])
@pytest.mark.parametrize("depth", [100, 400, 900, 3000, 100_000])
def test_deep_nesting(local, marker, depth):
    nested = "[" * depth + "]" * depth
    original = local.markers[marker].read_bytes()
    for key in json.loads(original):
        fields = json.loads(original) | {key: "HERE"}
        local.markers[marker].write_text(json.dumps(fields).replace('"HERE"', nested))
        local.assert_whole_or_refused()
    local.markers[marker].write_text(nested)
    local.assert_whole_or_refused()


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"null", b"[]", b"\xff\xfe{}", b"{}", b"1" * 5000])
def test_checkpoints_that_are_none(local, content):
    local.markers[0].write_bytes(content)
    resumed = local.resume()
    assert len(resumed.ledger.shards) == SHARDS and resumed.local_lags


def test_the_last_samples_of_an_unfinished_run_cannot_be_jumped_over(local):
    """With a position beyond its shards, a start would complete at once and lose the rest."""
    fields = json.loads(local.markers[1].read_bytes()) | {"last_processed_sample_idx": 1000}
    local.markers[1].write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"metadata\.json"):
        local.resume()


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def damage_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("with_checkpoint", [True, False])
@pytest.mark.parametrize("number", few(range(1, SHARDS + 1), 2))
@pytest.mark.parametrize("damage", few([damage_one_bit, damage_missing, damage_shorter, damage_folder], 2))
def test_a_listed_shard_that_is_missing_or_changed(prepared, damage, number, with_checkpoint):
    """In the truth it is refused by name; a local copy of what the bucket has does not matter."""
    name = f"shard_{number:04d}.pkl.gz"
    damage(prepared.places.output_dir / name)
    if prepared.places.store is not None:
        assert len(prepared.resume().ledger.shards) == SHARDS
        shutil.rmtree(prepared.places.output_dir)
        damage(Path(prepared.places.store.url.removeprefix("file://")) / name)
    if not with_checkpoint:
        prepared.markers[0].unlink()
        if prepared.places.store is not None:
            prepared.places.store.delete(CHECKPOINT)
    with pytest.raises(ConfigError, match=f"should hold {SHARDS} shards, but {name} is missing"):
        prepared.resume()


def test_shards_without_any_marker_are_refused(prepared):
    for marker in prepared.markers:
        marker.unlink()
        if prepared.places.store is not None:
            prepared.places.store.delete(marker.name)
    with pytest.raises(ConfigError, match=r"holds \d shards .*no readable metadata\.json"):
        prepared.resume()


def test_a_folder_in_the_place_of_a_marker(local):
    local.markers[0].unlink()
    local.markers[0].mkdir()
    with pytest.raises(StorageError, match="move it away"):
        local.resume()


def test_force_restart_names_and_deletes_all_of_it_and_nothing_else(prepared, caplog):
    note = prepared.places.output_dir / "notes.txt"
    note.write_text("mine")
    discard(prepared.run, prepared.places)
    places = 1 if prepared.places.store is None else 2
    assert f"--force_restart: deleting {places * (2 * SHARDS + 2)} files: " in caplog.text
    assert str(prepared.markers[0]) in caplog.text
    resumed = prepared.resume()
    assert resumed.ledger == resumed.kept == Ledger()
    assert resumed.is_new == (prepared.places.store is None)
    assert note.exists()


@pytest.fixture(scope="module")
def begun(inputs, tmp_path_factory, finished):
    """A finished run of two samples, whose folder tests may only read."""
    workspace = replace(finished, root=tmp_path_factory.mktemp("begun"))
    workspace.run("--max_samples", "2")
    assert workspace.metadata()["status"] == COMPLETED
    return workspace


def assert_drift_refused(workspace, words: str, *flags: str) -> None:
    before = workspace.checkpoint.read_bytes()
    done = workspace.run("--max_samples", "2", *flags, expect=78)
    assert words in done.stderr and "--force_restart" in done.stderr
    assert "Traceback" not in done.stderr
    assert workspace.checkpoint.read_bytes() == before


@pytest.mark.wide
def test_another_stream_by_the_command_line(begun, tmp_path):
    stream = tmp_path / "stream.jsonl"
    stream.write_bytes(begun.stream.read_bytes() + b"\n")
    assert_drift_refused(begun, "\n  stream_sha256: was '", "--dataset_path", str(stream))


def test_other_weights_by_the_command_line(begun, tmp_path):
    """One bit of one weight."""
    model = tmp_path / "model"
    shutil.copytree(begun.model, model)
    weights = next(model.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert_drift_refused(begun, "\n  weights_digest: was '", "--model_path", str(model))


def test_several_settings_by_the_command_line(begun):
    words = "overwrite it:\n  layers: was [0, 1, 2], is [1]\n  max_seq_length: was 640, is 512\n"
    assert_drift_refused(begun, words, "--layers_to_extract", "1", "--max_seq_length", "512")


CHANGING = """
import qwen_jax.data.streams as streams
_summary = streams.stream_summary
def then_changed(path):
    found = _summary(path)
    lines = open(path, "rb").read().splitlines(True)
    with open(path, "wb") as file:
        file.writelines(lines[:10])
    return found
streams.stream_summary = then_changed
"""


@pytest.mark.wide
def test_a_stream_that_changes_after_its_digest_was_taken(workspace, finished, tmp_path):
    """A run over it would be completed and wrong, and no later start would ever look again. Other changes:
    tests/data/test_streams.py."""
    stream = tmp_path / "changing.jsonl"
    stream.write_bytes(workspace.stream.read_bytes())
    (tmp_path / "sitecustomize.py").write_text(CHANGING)
    changing = replace(workspace.having(PYTHONPATH=f"{tmp_path}:{ROOT}"), forked=False)
    done = changing.run(stream=stream, expect=78)
    assert "was changed while it was in use" in done.stderr and "Traceback" not in done.stderr
    assert workspace.metadata()["status"] == "in_progress" and not workspace.shards()
    stream.write_bytes(workspace.stream.read_bytes())
    workspace.run(stream=stream)
    assert [path.read_bytes() for path in workspace.shards()] == [
        path.read_bytes() for path in finished.shards()
    ]
