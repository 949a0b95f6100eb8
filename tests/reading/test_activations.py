"""Batches hold every row once, in a seeded order, go on from a cursor, and need neither jax nor torch."""

import json
import subprocess
import sys

import numpy as np
import pytest

from qwen_jax.__main__ import main
from qwen_jax.errors import UsageError
from qwen_jax.reading import iter_activations, iter_samples
from qwen_jax.reading.runs import open_runs
from qwen_jax.roles import RoleSet
from qwen_jax.shards import ShardError, load_shard
from tests.reading.conftest import ROOT, Copy, all_rows


def test_in_order_every_row_once(clean):
    batches = list(iter_activations(clean, 3, 1000))
    assert [len(batch) for batch in batches[:-1]] == [1000] * (len(batches) - 1)
    np.testing.assert_array_equal(np.concatenate(batches), all_rows(clean, 3))


def test_shuffled_every_row_once_and_the_same_again(clean):
    def drawn(**options):
        return np.concatenate(list(iter_activations(clean, 1, 512, shuffle_buffer=3000, **options)))

    rows, drawn_rows = all_rows(clean, 1), drawn(seed=7)
    assert not np.array_equal(drawn_rows, rows)
    np.testing.assert_array_equal(sort_rows(drawn_rows), sort_rows(rows))
    np.testing.assert_array_equal(drawn_rows, drawn(seed=7))
    assert not np.array_equal(drawn_rows, drawn(seed=8))
    two = drawn(seed=7, epochs=2)
    np.testing.assert_array_equal(two[: len(rows)], drawn_rows)
    assert not np.array_equal(two[len(rows) :], drawn_rows)


def sort_rows(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("done", [0, 1, 7, 30])
def test_a_cursor_goes_on_with_the_very_next_batch(clean, done):
    options = {"shuffle_buffer": 2000, "seed": 3, "epochs": 2}
    whole = iter_activations(clean, 3, 700, **options)
    for _ in range(done):
        next(whole)
    cursor = json.loads(json.dumps(whole.cursor))
    rest = list(iter_activations(clean, 3, 700, **options, cursor=cursor))
    for ours, theirs in zip(rest, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_cursor_of_other_arguments_is_refused(clean):
    cursor = iter_activations(clean, 3, 700, seed=1).cursor
    with pytest.raises(UsageError, match="other arguments"):
        iter_activations(clean, 3, 700, seed=2, cursor=cursor)


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


def test_many_workers_are_read_one_after_another(copy, clean, tmp_path):
    copy.folder.rename(tmp_path / "worker_10")
    other = Copy(tmp_path / "worker_2")
    other.folder.symlink_to(clean)
    assert [run.where.rpartition("/")[2] for run in open_runs(tmp_path)] == ["worker_2", "worker_10"]
    rows = np.concatenate(list(iter_activations(tmp_path, 1, 4096)))
    np.testing.assert_array_equal(rows, np.concatenate([all_rows(clean, 1)] * 2))


def test_errors_of_the_reading_thread_arrive(copy):
    (copy.folder / "shard_0002.pkl.gz").write_bytes(b"no gzip")
    with pytest.raises(ShardError, match="shard_0002"):
        list(iter_activations(copy.folder, 1, 100))
    with pytest.raises(ShardError, match="has no layer 2, but 1, 3"):
        list(iter_activations(copy.folder, 2, 100))
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


def test_inspect_shows_the_run_and_a_sample(clean, capsys):
    assert main(["inspect", str(clean)]) == 0
    shown = capsys.readouterr().out
    assert "worker 0, completed" in shown and "layers   1, 3 of 4: residual" in shown
    assert "36 stored, 0 skipped" in shown
    assert main(["inspect", str(clean / "shard_0002.pkl.gz")]) == 0
    assert "float32, width 64" in capsys.readouterr().out
    assert main(["inspect", str(clean), "--sample", "3", "--layer", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sample = next(each for each in iter_samples(clean, [3]) if each["sample_idx"] == 3)
    assert len(lines) == 2 + len(sample["token_ids"])
    cell = next(n for n, cell in enumerate(sample["token_cells"]) if cell[0] >= 0)
    words = lines[2 + cell].split()
    assert words[2] == f"'{words[7]}'" and words[3:7] == ["example_1_input", "0", "0", "0"]
    assert float(words[8]) == pytest.approx(np.linalg.norm(sample["activations"][3][cell]), rel=1e-3)
    with pytest.raises(UsageError, match="sample 99 is in no shard"):
        main(["inspect", str(clean), "--sample", "99"])


def test_stats_of_shards_and_of_the_run_agree(clean, copy, capsys, tmp_path):
    assert main(["stats", str(clean), "--output", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged").read_bytes() == (clean / "stats.safetensors").read_bytes()
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
