"""Every format holds exactly the stored rows, goes on after an interruption, and is read by its own tools."""

import errno
import json
import os
import shutil

import datasets
import numpy as np
import pytest
from safetensors import safe_open

from qwen_jax.__main__ import main
from qwen_jax.errors import BadDataError, StorageError, UsageError
from qwen_jax.reading import iter_samples
from qwen_jax.reading.export import FORMATS, NpyWriter, Part, SafetensorsWriter, export
from qwen_jax.shards import load_shard
from tests.few import few
from tests.reading.conftest import STREAMS, Copy, all_rows, extract
from tests.run_worker.conftest import tree


def rows_by_shard(folder, layer: int) -> list[np.ndarray]:
    return [
        np.concatenate([record["activation"] for record in load_shard(path)[layer]])
        for path in sorted(folder.glob("shard_*"))
    ]


def rows_of(clean, key: str) -> np.ndarray:
    return np.concatenate([sample[key] for sample in iter_samples(clean, [1])])


def test_safetensors_a_layer_without_the_others(clean, tmp_path, capsys):
    assert (
        main(["export", str(clean), "--to", "safetensors", "--output", str(tmp_path), "--layers", "3"]) == 0
    )
    assert not (tmp_path / "layer_01").exists()
    files = sorted((tmp_path / "layer_03").iterdir())
    assert [file.name for file in files][:1] == ["worker_0-shard_0001.safetensors"]
    parts = [safe_open(file, framework="numpy") for file in files]
    stored = {name: np.concatenate([part.get_tensor(name) for part in parts]) for name in parts[0].keys()}  # noqa: SIM118
    np.testing.assert_array_equal(stored["activations"], all_rows(clean, 3))
    for key in ("token_ids", "token_roles", "token_cells"):
        np.testing.assert_array_equal(stored[key], rows_of(clean, key))
    lengths = [len(sample["token_ids"]) for sample in iter_samples(clean, [1])]
    np.testing.assert_array_equal(stored["sample_idx"], np.repeat(np.arange(36), lengths))


def test_npy_is_one_array_a_layer(clean, tmp_path):
    export(clean, "npy", tmp_path)
    for layer in (1, 3):
        rows = np.load(tmp_path / f"layer_{layer:02d}.npy", mmap_mode="r")
        np.testing.assert_array_equal(rows, all_rows(clean, layer))
    np.testing.assert_array_equal(np.load(tmp_path / "token_ids.npy"), rows_of(clean, "token_ids"))


def test_hf_dataset_has_the_shape_that_sae_lens_checks(clean, tmp_path):
    export(clean, "hf_dataset", tmp_path, layers=[3], context_size=100)
    data = datasets.load_from_disk(str(tmp_path / "layer_03"))
    hook = "blocks.3.hook_resid_post"
    assert data.features[hook].shape == (100, 64) and set(data.column_names) == {hook, "token_ids"}
    rows = np.concatenate(data.with_format("numpy")[:][hook])
    tokens = np.concatenate(data.with_format("numpy")[:]["token_ids"])
    kept = [shard[: len(shard) // 100 * 100] for shard in rows_by_shard(clean, 3)]
    np.testing.assert_array_equal(rows, np.concatenate(kept))
    assert tokens.shape == (len(rows),) and set(tokens) <= set(rows_of(clean, "token_ids"))


@pytest.mark.wide
@pytest.mark.parametrize("to", FORMATS)
def test_an_interrupted_export_goes_on_and_ends_the_same(clean, tmp_path, monkeypatch, to):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    export(clean, to, whole)
    write, written = FORMATS[to].write, []

    def die_at_the_fourth(self, part):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(part)
        write(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(FORMATS[to], "write", die_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            export(clean, to, cut)
    assert export(clean, to, cut).parts_kept == 3
    assert tree(cut) == tree(whole)
    again = export(clean, to, cut)
    assert again.parts_kept == again.parts


def test_npy_takes_its_space_at_once(clean, tmp_path, monkeypatch):
    """A mapped page that the disk has no room for ends the process without a word."""
    export(clean, "npy", tmp_path / "whole")
    for path in (tmp_path / "whole").glob("layer_*.npy"):
        assert path.stat().st_blocks * 512 >= path.stat().st_size
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="layer_01.npy"):
        export(clean, "npy", tmp_path / "full")
    assert not (tmp_path / "full" / "layer_01.npy").exists()


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_list_of_many_parts_is_written_a_few_times(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(NpyWriter, "_write_list", lambda self: written.append(setattr(self, "_unlisted", 0)))
    writer = NpyWriter(tmp_path, 1, "residual", 1)
    for number in range(2000):
        writer.write(Part(3, f"shard_{number}", 0, {}))
    assert 100 <= len(written) < 450
    assert writer.has(3, "shard_7") and not writer.has(4, "shard_7")


def test_entries_of_workers_come_in_the_order_of_their_numbers(clean, copy, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    shutil.copytree(clean, runs / "worker_9")
    Copy(runs / "worker_9").metadata(lambda metadata: metadata.update(worker_id=9))
    shutil.copytree(clean, runs / "worker_10")
    Copy(runs / "worker_10").metadata(lambda metadata: metadata.update(worker_id=10))
    export(runs, "hf_dataset", tmp_path / "out", layers=[3], context_size=100)
    files = json.loads((tmp_path / "out" / "layer_03" / "state.json").read_text())["_data_files"]
    assert [each["filename"].partition("-")[0] for each in files] == ["worker_9"] * 4 + ["worker_10"] * 4


def test_layers_may_come_later(clean, tmp_path):
    for to in FORMATS:
        export(clean, to, tmp_path / to, layers=[3])
        export(clean, to, tmp_path / to, layers=[1])
        export(clean, to, tmp_path / to)
    np.testing.assert_array_equal(np.load(tmp_path / "npy" / "layer_01.npy"), all_rows(clean, 1))


@pytest.mark.wide
def test_kinds_embedding_bfloat16_and_fewer_rows(tmp_path):
    flags = ("--activation_type", "residual", "mlp", "--include_embedding", "--keep_tokens", "every:5")
    folder = extract(tmp_path / "run", *flags, "--activation_dtype", "bfloat16", "--max_samples", "4")
    done = export(folder, "safetensors", tmp_path / "st", layers=[2, "embedding"], kind="mlp")
    assert done.rows == sum(len(sample["token_ids"]) for sample in iter_samples(folder))
    part = safe_open(tmp_path / "st" / "layer_02" / "worker_0-shard_0001.safetensors", framework="numpy")
    mlp = [each["activations"][2] for each in iter_samples(folder, [2], "mlp")]
    assert part.get_tensor("activations").dtype.name == "bfloat16"
    np.testing.assert_array_equal(part.get_tensor("activations"), np.concatenate(mlp))
    assert (np.diff(part.get_tensor("token_positions"))[:5] == 5).all()
    export(folder, "npy", tmp_path / "npy", kind="mlp")
    np.testing.assert_array_equal(
        np.load(tmp_path / "npy" / "layer_02.npy"), np.concatenate(mlp).astype(np.float32)
    )
    export(folder, "hf_dataset", tmp_path / "hf", layers=["embedding"], context_size=16)
    assert "hook_embed" in datasets.load_from_disk(str(tmp_path / "hf" / "embedding")).column_names


def test_the_card_says_what_a_row_is(clean, tmp_path):
    export(clean, "hf_dataset", tmp_path, context_size=64)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n") and "residual stream after block i" in card
    rows = sum(len(shard) // 64 * 64 for shard in rows_by_shard(clean, 1))
    assert "blocks.1.hook_resid_post" in card and f"rows of each layer: {rows:,}," in card
    code = card.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(code.replace('"layer_01"', repr(str(tmp_path / "layer_01"))), scope)
    assert scope["rows"].shape == (64, 64)


def test_what_is_not_there_is_refused(clean, tmp_path):
    for options, message in (
        ({"to": "parquet"}, "no format 'parquet'"),
        ({"to": "npy", "layers": [2]}, "layer 2 is not stored at .*; there are 1, 3"),
        ({"to": "npy", "kind": "mlp"}, "kind mlp is not stored"),
        (
            {"to": "npy", "output": "gs://bucket/x"},
            "--output gs://bucket/x: this is written on the local disk",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            export(clean, **{"output": tmp_path} | options)


@pytest.fixture(scope="module")
def two_kinds(tmp_path_factory):
    flags = ("--activation_type", "residual", "mlp", "--layers_to_extract", "2", "--shard_size_gb", "0.003")
    return extract(tmp_path_factory.mktemp("kinds"), *flags)


@pytest.mark.wide
@pytest.mark.parametrize(
    "to, change, message",
    [
        ("safetensors", {"kind": "mlp"}, "kind residual, now mlp"),
        ("npy", {"kind": "mlp"}, "kind residual, now mlp"),
        ("hf_dataset", {"context_size": 64}, "context_size 128, now 64"),
        ("npy", {"to": "safetensors"}, "format npy, now safetensors"),
    ],
)
def test_an_export_of_something_else_is_not_taken_for_this_one(two_kinds, tmp_path, to, change, message):
    options = {"to": to, "context_size": 128}
    export(two_kinds, output=tmp_path, **options)
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=f"holds another export .{message}"):
        export(two_kinds, output=tmp_path, **options | change)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("to", few(FORMATS))
def test_an_export_of_other_shards_is_not_taken_for_this_one(clean, copy, tmp_path, to):
    export(clean, to, tmp_path, layers=[3])
    copy.metadata(lambda metadata: metadata["shards"][1].update(crc32c="AAAAAA=="))
    with pytest.raises(UsageError, match="worker_0-shard_0002 is another shard"):
        export(copy.folder, to, tmp_path, layers=[3])


def unfinished(metadata: dict) -> None:
    """What metadata.json was after two shards."""
    del metadata["shards"][2:]
    last = metadata["shards"][-1]["last_sample_idx"]
    metadata.update(status="in_progress", last_processed_sample_idx=last)


@pytest.mark.parametrize("to", few(FORMATS))
def test_a_run_that_has_grown(clean, copy, tmp_path, to):
    copy.metadata(unfinished)
    export(copy.folder, to, tmp_path / "grown", layers=[3])
    if to == "npy":  # an array of a fixed size
        with pytest.raises(UsageError, match="holds another export .of 2 shards, now there are 4"):
            export(clean, to, tmp_path / "grown", layers=[3])
        return
    assert export(clean, to, tmp_path / "grown", layers=[3]).parts_kept == 2
    export(clean, to, tmp_path / "whole", layers=[3])
    assert tree(tmp_path / "grown") == tree(tmp_path / "whole")


def test_a_task_keeps_its_cells_beside_a_text_that_has_none(tmp_path):
    stream = tmp_path / "stream.jsonl"
    task = (STREAMS.parent / "stream_000.jsonl").read_text().splitlines()[0]
    stream.write_text(f'{task}\n{{"text": "no grid at all"}}\n{task}\n')
    folder = extract(tmp_path / "run", "--dataset_path", str(stream), "--layers_to_extract", "0")
    export(folder, "npy", tmp_path / "npy")
    cells, indices = (
        np.load(tmp_path / "npy" / "token_cells.npy"),
        np.load(tmp_path / "npy" / "sample_idx.npy"),
    )
    for sample in iter_samples(folder):
        expected = sample.get("token_cells", np.full((len(sample["token_ids"]), 4), -1))
        np.testing.assert_array_equal(cells[indices == sample["sample_idx"]], expected)
    assert (cells[indices == 2] >= 0).any()


def test_nothing_stored_and_entries_that_no_shard_fills(clean, tmp_path):
    stream = tmp_path / "stream.jsonl"
    stream.write_text("no json\n")
    empty = extract(tmp_path / "run", "--dataset_path", str(stream), expect=65)
    with pytest.raises(BadDataError, match="holds no shards yet"):
        export(empty, "npy", tmp_path / "out")
    with pytest.raises(BadDataError, match="give a smaller one"):
        export(clean, "hf_dataset", tmp_path / "out", context_size=100_000)


def test_workers_with_other_layers(clean, copy, tmp_path):
    copy.metadata(lambda m: m.update(layers=[5, 6], worker_id=1))
    clean_too = tmp_path / "both" / "worker_0"
    clean_too.parent.mkdir()
    clean_too.symlink_to(clean)
    copy.folder.rename(tmp_path / "both" / "worker_1")
    with pytest.raises(UsageError, match="layers 1, 3, 5, 6 are stored by different workers"):
        export(tmp_path / "both", "npy", tmp_path / "out")
    assert export(tmp_path / "both", "npy", tmp_path / "out", layers=[3]).rows == len(all_rows(clean, 3))
    assert {sample["worker_id"] for sample in iter_samples(tmp_path / "both", layers=[3])} == {0}


def test_a_shard_alone_is_named_by_the_metadata_beside_it(two_kinds, tmp_path):
    export(two_kinds / "shard_0002.pkl.gz", "safetensors", tmp_path / "known", kind="mlp")
    assert (tmp_path / "known" / "layer_02" / "worker_0-shard_0002.safetensors").exists()
    assert "hook_mlp_out" in (tmp_path / "known" / "README.md").read_text()
    lone = tmp_path / "shard_0001.pkl.gz"
    shutil.copy(two_kinds / lone.name, lone)
    export(lone, "hf_dataset", tmp_path / "unknown", context_size=32)
    assert (
        "blocks.2.activation" in datasets.load_from_disk(str(tmp_path / "unknown" / "layer_02")).column_names
    )
    assert "no metadata.json says" in (tmp_path / "unknown" / "README.md").read_text()


def test_a_torn_part_is_not_there(clean, tmp_path, monkeypatch):
    monkeypatch.setattr("safetensors.numpy.save", lambda tensors: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(clean, "safetensors", tmp_path)
    assert not SafetensorsWriter(tmp_path, 0, "residual", 1).has(1, "worker_0-shard_0001")


def test_plot_draws_a_picture(clean, tmp_path, capsys):
    picture = tmp_path / "run.png"
    assert main(["plot", str(clean), "-o", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 20_000
    assert main(["plot", str(clean), "-o", str(tmp_path / "run.svg")]) == 0
    text = (tmp_path / "run.svg").read_text()
    assert all(
        f"<!-- {words} -->" in text
        for words in ("Norm of a row, residual", "Euclidean norm", "kept tokens", "% of lines")
    )


@pytest.mark.parametrize(
    "command, output, said",
    [
        ("plot", "x.foo", "give a file that ends in .png, .pdf, .svg"),
        ("plot", "", "give a file that ends in"),
        ("plot", "nowhere/x.png", "there is no folder"),
        ("stats", "nowhere/x.safetensors", "there is no folder"),
        ("export", "file", "is a file; give a folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused_by_name(clean, tmp_path, command, output, said):
    (tmp_path / "file").touch()
    more = ["--to", "npy"] if command == "export" else []
    with pytest.raises(UsageError, match=said):
        main([command, str(clean), "--output", str(tmp_path / output), *more])


def test_plot_without_matplotlib_says_what_to_install(clean, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(Exception, match="pip install matplotlib"):
        main(["plot", str(clean), "-o", str(tmp_path / "x.png")])
