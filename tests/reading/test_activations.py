"""Batches hold every row once, in a seeded order, go on from a cursor, and need neither jax nor torch."""

import json
import subprocess
import sys
import tracemalloc
import weakref
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.__main__ import main
from qwen_jax.errors import UsageError
from qwen_jax.reading import Rows, activations, iter_activations, iter_samples
from qwen_jax.reading.activations import READERS
from qwen_jax.reading.export import export
from qwen_jax.reading.runs import open_runs
from qwen_jax.reading.torch import ActivationDataset
from qwen_jax.roles import RoleSet
from qwen_jax.shards import ShardError, load_shard
from tests.few import few
from tests.reading.conftest import ROOT, Copy, all_rows, extract


def test_in_order_every_row_once(clean):
    batches = list(iter_activations(clean, 3, 1000))
    assert [len(batch) for batch in batches[:-1]] == [1000] * (len(batches) - 1)
    np.testing.assert_array_equal(np.concatenate(batches), all_rows(clean, 3))


def test_shuffled_every_row_once_and_the_same_again(clean):
    def drawn(**options):
        return np.concatenate(list(iter_activations(clean, 1, 512, 3000, **options)))

    rows, drawn_rows = all_rows(clean, 1), drawn(seed=7)
    assert not np.array_equal(drawn_rows, rows)
    np.testing.assert_array_equal(sort_rows(drawn_rows), sort_rows(rows))
    np.testing.assert_array_equal(drawn_rows, drawn(seed=7))
    assert not np.array_equal(drawn_rows, drawn(seed=8))
    two = drawn(seed=7, epochs=2)
    np.testing.assert_array_equal(two[: len(rows)], drawn_rows)
    assert not np.array_equal(two[len(rows) :], drawn_rows)


def test_processes_share_the_rows(clean):
    parts = [
        np.concatenate(list(iter_activations(clean, 3, 512, 1000, process_index=index, process_count=3)))
        for index in range(3)
    ]
    np.testing.assert_array_equal(sort_rows(np.concatenate(parts)), sort_rows(all_rows(clean, 3)))
    for index, count in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(UsageError, match="is none of process_count"):
            iter_activations(clean, 3, 512, process_index=index, process_count=count)
    with pytest.raises(UsageError, match="cannot be divided over 99 processes"):
        iter_activations(clean, 3, 512, process_index=0, process_count=99)


@pytest.mark.parametrize("at_once", few([3, 2, 100]))
def test_rows_of_several_shards_at_once(clean, at_once):
    def drawn(**options):
        return iter_activations(clean, 3, 512, 1000, seed=1, shards_at_once=at_once, **options)

    rows = np.concatenate(list(drawn()))
    np.testing.assert_array_equal(sort_rows(rows), sort_rows(all_rows(clean, 3)))
    np.testing.assert_array_equal(rows, np.concatenate(list(drawn())))
    begun = drawn()
    next(begun)
    np.testing.assert_array_equal(np.concatenate(list(drawn(cursor=begun.cursor))), rows[512:])
    with pytest.raises(UsageError, match="give a shuffle_buffer"):
        iter_activations(clean, 3, 512, shards_at_once=at_once)


def test_shards_at_once_part_the_rows_of_a_sample(clean):
    def same_sample(at_once: int) -> float:
        drawn = iter_activations(clean, 3, 512, 1000, shards_at_once=at_once, with_tokens=True)
        order = np.concatenate([rows.sample_idx for rows in drawn])
        return float((order[1:] == order[:-1]).mean())

    assert same_sample(4) < 0.5 * same_sample(1)


def sort_rows(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("done", few([7, 0, 1, 30]))
def test_a_cursor_goes_on_with_the_very_next_batch(clean, done):
    options = {"shuffle_buffer": 2000, "seed": 3, "epochs": 2}
    whole = iter_activations(clean, 3, 700, **options)
    for _ in range(done):
        next(whole)
    cursor = json.loads(json.dumps(whole.cursor))
    rest = list(iter_activations(clean, 3, 700, **options, cursor=cursor))
    for ours, theirs in zip(rest, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"layer": 1}, {"batch_size": 70}, {"shuffle_buffer": 5}, {"keep": "role:test_input"}],
)
def test_a_cursor_of_other_arguments_is_refused(clean, change):
    options = {"layer": 3, "batch_size": 700, "seed": 1}
    cursor = iter_activations(clean, **options).cursor
    with pytest.raises(UsageError, match="other arguments"):
        iter_activations(clean, **options | change, cursor=cursor)


def test_a_cursor_over_other_shards_is_refused(clean, copy):
    cursor = iter_activations(clean, 3, 700).cursor
    copy.metadata(lambda m: m["shards"][2].update(crc32c="AAAAAA=="))
    with pytest.raises(UsageError, match="other shards"):
        iter_activations(copy.folder, 3, 700, cursor=cursor)


@pytest.mark.parametrize("cursor", [{"x": 1}, [], {"epoch": "0", "batches": 0, "arguments": ""}])
def test_what_is_no_cursor_is_refused(clean, cursor):
    with pytest.raises(UsageError, match="is not a cursor"):
        iter_activations(clean, 3, 700, cursor=cursor)


@pytest.fixture
def shards_read(monkeypatch) -> list[str]:
    """The names of the shards that were opened."""
    read: list[str] = []

    def counted(file, **options):
        read.append(Path(file).name)
        return load_shard(file, **options)

    monkeypatch.setattr("qwen_jax.shards.load_shard", counted)
    return read


def test_going_on_reads_neither_earlier_epochs_nor_earlier_shards(clean, shards_read):
    def batches(**options):
        return iter_activations(clean, 3, 700, epochs=6, **options)

    per_epoch = -(-len(all_rows(clean, 3)) // 700)
    cursor = iter_at(batches, 5 * per_epoch + 20)
    shards_read.clear()
    assert sum(map(len, batches(cursor=cursor))) == len(all_rows(clean, 3)) - 20 * 700
    assert sorted(shards_read) == ["shard_0003.pkl.gz", "shard_0004.pkl.gz"]


def iter_at(batches, count: int) -> dict:
    iterator = batches()
    for _ in range(count):
        next(iterator)
    return iterator.cursor


def test_a_shuffled_iteration_reads_its_epoch_again_and_no_other(clean, shards_read):
    def batches(**options):
        return iter_activations(clean, 3, 700, 2000, seed=1, epochs=3, **options)

    per_epoch = -(-len(all_rows(clean, 3)) // 700)
    cursor = iter_at(batches, 2 * per_epoch + 5)
    shards_read.clear()
    assert len(list(batches(cursor=cursor))) == per_epoch - 5
    assert sorted(shards_read) == [f"shard_000{number}.pkl.gz" for number in (1, 2, 3, 4)]


def test_at_most_the_readers_run_ahead(clean, shards_read):
    batches = iter_activations(clean, 3, 10)
    next(batches)
    assert len(shards_read) <= 1 + READERS + 1


def one_by_one(source, numbers):
    """In the place of _read_ahead: how far its threads are differs from one time to the next."""
    for number in numbers:
        fetched: Future = Future()
        fetched.set_result(source.fetch(number))
        yield source.read(fetched)


def test_the_shuffle_buffer_is_held_once(clean, monkeypatch):
    monkeypatch.setattr(activations, "_read_ahead", one_by_one)

    def peak(buffer: int) -> int:
        tracemalloc.start()
        for _ in iter_activations(clean, 3, 512, buffer):
            pass
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    bytes_a_row = 64 * 4
    most, none = peak(15_000), peak(0)
    assert 0.5 * 15_000 * bytes_a_row < most - none < 1.2 * 15_000 * bytes_a_row


def test_no_row_is_twice_in_a_buffer_smaller_than_a_sample(clean):
    rows = np.concatenate(list(iter_activations(clean, 3, 64, 7)))
    np.testing.assert_array_equal(sort_rows(rows), sort_rows(all_rows(clean, 3)))


def test_a_small_buffer_mixes_near_rows_and_a_large_one_all(clean):
    def mean_distance(buffer: int) -> float:
        drawn = iter_activations(clean / "shard_0001.pkl.gz", 3, 4096, buffer, with_tokens=True)
        order = np.concatenate([rows.sample_idx for rows in drawn])
        return float(np.abs(order - np.sort(order)).mean())

    assert 0 < mean_distance(50) < mean_distance(2000) < mean_distance(100_000)


def test_bfloat16_rows_are_cast_or_left(tmp_path):
    flags = ("--activation_dtype", "bfloat16", "--max_samples", "3", "--layers_to_extract", "0")
    folder = extract(tmp_path, *flags)
    (cast,) = iter_activations(folder, 0, 10**6)
    (left,) = iter_activations(folder, 0, 10**6, 5, as_float32=False)
    assert (cast.dtype, left.dtype.name) == (np.float32, "bfloat16") and len(cast) == len(left)


def test_rows_come_with_their_tokens_and_can_be_chosen(clean):
    wanted, tokens = [], []
    for sample in iter_samples(clean, [1]):
        mask = RoleSet(["test_input"]).mask(sample["token_roles"])
        wanted.append(sample["activations"][1][mask])
        tokens.append(sample["token_ids"][mask])
    by_role = list(iter_activations(clean, 1, 256, keep="role:test_input", with_tokens=True))
    np.testing.assert_array_equal(
        np.concatenate([rows.activations for rows in by_role]), np.concatenate(wanted)
    )
    np.testing.assert_array_equal(
        np.concatenate([rows.token_ids for rows in by_role]), np.concatenate(tokens)
    )
    by_function = iter_activations(
        clean, 1, 256, keep=lambda sample: np.arange(len(sample["token_ids"])) > 90
    )
    count = sum(max(0, len(sample["token_ids"]) - 91) for sample in iter_samples(clean, [1]))
    assert sum(map(len, by_function)) == count


def test_every_row_says_which_worker_sample_role_and_cell_it_is_of(copy, clean, tmp_path):
    copy.metadata(lambda metadata: metadata.update(worker_id=7))
    copy.folder.rename(tmp_path / "worker_7")
    (tmp_path / "worker_0").symlink_to(clean)
    drawn = list(iter_activations(tmp_path, 3, 999, 5000, with_tokens=True))
    rows = Rows(*map(np.concatenate, zip(*drawn, strict=True)))
    of_sample = (rows.worker_id == 7) & (rows.sample_idx == 3)
    sample = next(each for each in iter_samples(clean) if each["sample_idx"] == 3)
    order = np.argsort(rows.token_positions[of_sample])
    for key in ("token_ids", "token_roles", "token_cells"):
        np.testing.assert_array_equal(getattr(rows, key)[of_sample][order], sample[key])
    np.testing.assert_array_equal(rows.activations[of_sample][order], sample["activations"][3])


def test_many_workers_are_read_one_after_another(copy, clean, tmp_path):
    copy.folder.rename(tmp_path / "worker_10")
    other = Copy(tmp_path / "worker_2")
    other.folder.symlink_to(clean)
    assert [run.where.rpartition("/")[2] for run in open_runs(tmp_path)] == ["worker_2", "worker_10"]
    rows = np.concatenate(list(iter_activations(tmp_path, 1, 4096)))
    np.testing.assert_array_equal(rows, np.concatenate([all_rows(clean, 1)] * 2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda said: said.update(activation_types=["mlp"]), "kind, residual and mlp.*name a kind"),
        (lambda said: said["model"].update(weights_digest="0" * 64), "weights_digest"),
        (lambda said: said.update(activation_dtype="bfloat16"), "activation_dtype, float32 and bfloat16"),
    ],
)
def test_rows_of_different_kinds_models_or_dtypes_are_not_mixed(copy, clean, tmp_path, change, said):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "worker_0").symlink_to(clean)
    copy.metadata(change)
    copy.folder.rename(tmp_path / "runs" / "worker_1")
    for read in (
        lambda path: iter_activations(path, 1, 100),
        lambda path: ActivationDataset(path, 1, 100),
        lambda path: export(path, "npy", tmp_path / "out", layers=[1]),
    ):
        with pytest.raises(UsageError, match=f"worker_0 and .*worker_1 hold rows of another {said}"):
            read(tmp_path / "runs")


def test_the_end_of_an_epoch_is_gone_on_from_without_reading_it(clean, shards_read):
    batches = len(list(iter_activations(clean, 3, 700, 2000, seed=1)))
    done = iter_at(lambda: iter_activations(clean, 3, 700, 2000, seed=1), batches)
    shards_read.clear()
    after = list(iter_activations(clean, 3, 700, 2000, seed=1, epochs=2, cursor=done))
    assert len(shards_read) == 4
    both = list(iter_activations(clean, 3, 700, 2000, seed=1, epochs=2))
    np.testing.assert_array_equal(np.concatenate(after), np.concatenate(both[batches:]))


def test_shards_at_once_are_held_once(clean, monkeypatch):
    """As they come, and as the copy from which rows are drawn, each would be there twice."""
    alive, most = [], 0
    read = activations._Source.read

    def counted(self, fetched):
        columns = read(self, fetched)
        alive.extend(weakref.ref(array) for array, *_ in columns)
        return columns

    monkeypatch.setattr(activations._Source, "read", counted)
    samples = 0
    for _ in iter_activations(clean, 3, 256, 256, shards_at_once=4):
        samples = len(alive)
        most = max(most, sum(each() is not None for each in alive)) if samples == 36 else most
    assert samples == 36 and most == 0


def test_a_layer_may_be_a_numpy_integer(clean):
    layer = np.int64(3)
    np.testing.assert_array_equal(next(iter_activations(clean, layer, 64)), all_rows(clean, 3)[:64])


def test_no_layer_at_all_is_refused_as_such(clean):
    with pytest.raises(ShardError, match="names none"):
        next(iter_samples(clean, layers=[]))


def test_errors_of_the_reading_thread_arrive(copy):
    (copy.folder / "shard_0002.pkl.gz").write_bytes(b"no gzip")
    with pytest.raises(ShardError, match="shard_0002"):
        list(iter_activations(copy.folder, 1, 100))
    with pytest.raises(UsageError, match="layer 2 is not stored at .*; there are 1, 3"):
        iter_activations(copy.folder, 2, 100)
    with pytest.raises(UsageError, match="kind mlp is not stored"):
        list(iter_activations(copy.folder, 1, 100, kind="mlp"))
    for keep in ("last", "role:nobody"):
        with pytest.raises(UsageError):
            iter_activations(copy.folder, 1, 100, keep=keep)


def test_wanted_layers_only(clean):
    path = clean / "shard_0001.pkl.gz"
    whole = load_shard(path)
    for layers in ([1], [3], [3, 1]):
        part = load_shard(path, layers=layers)
        assert list(part) == sorted(layers)
        for layer in layers:
            np.testing.assert_array_equal(part[layer][0]["activation"], whole[layer][0]["activation"])


def test_the_first_layer_is_read_without_the_rest(clean, tmp_path):
    data = (clean / "shard_0001.pkl.gz").read_bytes()
    torn = tmp_path / "shard_0001.pkl.gz"
    torn.write_bytes(data[: len(data) * 3 // 4])
    assert list(load_shard(torn, layers=[1])) == [1]
    with pytest.raises(ShardError):
        load_shard(torn, layers=[3])


def test_reading_needs_neither_jax_nor_torch_nor_google(clean):
    program = (
        "import sys\n"
        "for name in ('jax', 'torch', 'flax', 'transformers', 'google', 'google_crc32c', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "from qwen_jax.reading import iter_activations, iter_samples\n"
        "print(sum(map(len, iter_activations(sys.argv[1], 1, 64, shuffle_buffer=100, keep='role:test_input'))))\n"
        "print(len(list(iter_samples(sys.argv[1]))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(clean)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "36" and int(done.stdout.split()[0]) > 1000


def test_stats_of_shards_and_of_the_run_agree(clean, copy, capsys, tmp_path):
    assert main(["stats", str(clean), "--output", str(tmp_path / "merged.safetensors")]) == 0
    assert (tmp_path / "merged.safetensors").read_bytes() == (clean / "stats.safetensors").read_bytes()
    from_files = capsys.readouterr().out
    for path in copy.folder.glob("stats*"):
        path.unlink()
    assert main(["stats", str(copy.folder)]) == 0
    assert capsys.readouterr().out == from_files


def test_commands_that_do_not_exist(capsys):
    with pytest.raises(UsageError, match="there is no command 'inspcet'"):
        main(["inspcet"])
    assert main(["--help"]) == 0 and "verify" in capsys.readouterr().out
    assert main([]) == 2
