"""The torch data set: each row once an epoch over workers and ranks, repeatable loops, states that go on exactly."""

import json
import os
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from qwen_jax.errors import BadDataError, UsageError
from qwen_jax.reading import Rows
from qwen_jax.reading.torch import ActivationDataset
from tests.few import few
from tests.reading.conftest import ROOT, all_rows, extract
from tests.reading.test_activations import sort_rows


def loaded(dataset: ActivationDataset, workers: int = 0) -> torch.Tensor:
    return torch.cat(list(DataLoader(dataset, batch_size=None, num_workers=workers)))


def assert_every_row_once(found: torch.Tensor, clean) -> None:
    np.testing.assert_array_equal(sort_rows(found.numpy()), sort_rows(all_rows(clean, 3)))


@pytest.mark.parametrize("workers", few([2, 0, 6]))
def test_every_row_once_over_workers(clean, workers):
    """Of six workers two have no shard."""
    dataset = ActivationDataset(clean, 3, 512, num_workers=workers)
    assert_every_row_once(loaded(dataset, workers), clean)


def test_every_row_once_over_ranks_and_their_workers(clean):
    ranks = [ActivationDataset(clean, 3, 512, rank=rank, world_size=2) for rank in (0, 1)]
    assert_every_row_once(torch.cat([loaded(ranks[0], 2), loaded(ranks[1])]), clean)


def test_more_ranks_than_shards_are_refused(clean):
    with pytest.raises(UsageError, match="shards cannot be divided over 99 processes"):
        ActivationDataset(clean, 3, 512, rank=0, world_size=99)
    with pytest.raises(UsageError, match="process_index 2 is none of process_count 2"):
        ActivationDataset(clean, 3, 512, rank=2, world_size=2)


@pytest.mark.wide
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 700, 10**6])
def test_the_length_is_the_number_of_batches(clean, workers, batch_size):
    dataset = ActivationDataset(clean, 3, batch_size, num_workers=workers)
    if batch_size > 1:
        assert len(list(DataLoader(dataset, batch_size=None, num_workers=workers))) == len(dataset)
    else:
        assert len(dataset) == len(all_rows(clean, 3))


def test_a_length_that_only_reading_tells_is_not_given(clean):
    dataset = ActivationDataset(clean, 3, 512, keep="role:test_input")
    with pytest.raises(TypeError, match="not known"):
        len(dataset)
    assert 0 < len(list(dataset)) < len(ActivationDataset(clean, 3, 512))
    with pytest.raises(TypeError):
        len(ActivationDataset(clean / "shard_0001.pkl.gz", 3, 512, keep=lambda sample: None))


def test_each_loop_is_an_epoch_in_another_order(clean):
    dataset = ActivationDataset(clean, 3, 700, 2000, seed=4)
    first, second = torch.cat(list(dataset)), torch.cat(list(dataset))
    assert_every_row_once(first, clean)
    assert_every_row_once(second, clean)
    assert not torch.equal(first, second)
    dataset.set_epoch(0)
    assert torch.equal(torch.cat(list(dataset)), first)
    again = ActivationDataset(clean, 3, 700, 2000, seed=4)
    again.set_epoch(1)
    assert torch.equal(loaded(again, workers=1), second)


def test_a_loop_that_was_left_begins_again(clean):
    dataset = ActivationDataset(clean, 3, 700, 2000)
    whole = list(dataset)
    dataset.set_epoch(0)
    assert torch.equal(next(iter(dataset)), whole[0])
    assert torch.equal(torch.cat(list(dataset)), torch.cat(whole))


@pytest.mark.parametrize("done", [0, 1, 9])
def test_a_state_goes_on_with_the_very_next_batch(clean, done):
    dataset = ActivationDataset(clean, 3, 700, 2000)
    assert len(list(dataset)) > 9  # the state is then one of the second epoch
    loop = iter(dataset)
    for _ in islice(loop, done):
        pass
    other = ActivationDataset(clean, 3, 700, 2000)
    other.load_state_dict(json.loads(json.dumps(dataset.state_dict())))
    for ours, theirs in zip(other, loop, strict=True):
        assert torch.equal(ours, theirs)
    assert other.state_dict() == dataset.state_dict() == {"epoch": 2, "batches": 0}


def test_a_state_of_something_else_is_refused(clean):
    dataset = ActivationDataset(clean, 3, 700, 2000)
    next(iter(dataset))
    for other in (
        ActivationDataset(clean, 3, 70),
        ActivationDataset(clean, 3, 700, 2000, rank=1, world_size=2),
    ):
        other.load_state_dict(dataset.state_dict())
        with pytest.raises(UsageError, match="other arguments"):
            next(iter(other))
    dataset.load_state_dict({"epoch": -1, "batches": 0})
    with pytest.raises(UsageError, match="is not a cursor"):
        next(iter(dataset))


def test_rows_come_with_their_tokens(clean):
    (batch,) = DataLoader(ActivationDataset(clean, 3, 10**6, 0, with_tokens=True), batch_size=None)
    assert isinstance(batch, Rows) and all(isinstance(each, torch.Tensor) for each in batch)
    np.testing.assert_array_equal(batch.activations.numpy(), all_rows(clean, 3))
    assert batch.token_cells.shape == (len(batch.activations), 4)


@pytest.mark.wide
def test_bfloat16_rows_are_cast_or_left(tmp_path):
    flags = ("--activation_dtype", "bfloat16", "--max_samples", "3", "--layers_to_extract", "0")
    folder = extract(tmp_path, *flags)
    (cast,) = ActivationDataset(folder, 0, 10**6)
    (left,) = ActivationDataset(folder, 0, 10**6, as_float32=False)
    assert (cast.dtype, left.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(cast, left.float())


def test_shards_that_come_later_are_left_and_those_that_go_are_missed(copy):
    later = copy.folder / "shard_0002.pkl.gz"
    data = later.read_bytes()
    later.unlink()
    (copy.folder / "metadata.json").unlink()  # without it the files that lie there are the run
    dataset = ActivationDataset(copy.folder, 3, 512)
    rows = len(torch.cat(list(dataset)))
    later.write_bytes(data)
    assert (
        len(torch.cat(list(dataset))) == rows < len(torch.cat(list(ActivationDataset(copy.folder, 3, 512))))
    )
    (copy.folder / "shard_0003.pkl.gz").unlink()
    with pytest.raises(BadDataError, match="shard_0003.pkl.gz is no longer there"):
        next(iter(dataset))


RANK = """
import sys, torch
from qwen_jax.reading.torch import ActivationDataset

rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
rows = torch.cat(list(ActivationDataset(sys.argv[3], 3, 512)))
torch.save(rows, sys.argv[4])
"""


@pytest.mark.slow
def test_ranks_are_those_of_torch_distributed(clean, tmp_path):
    outputs = [tmp_path / f"rank_{rank}" for rank in (0, 1)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meet"), str(clean), str(output)],
            cwd=ROOT,
            env=os.environ,
        )
        for rank, output in enumerate(outputs)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert_every_row_once(torch.cat([torch.load(output) for output in outputs]), clean)


UNFINISHED = """
import sys, torch
from qwen_jax.reading import iter_activations

batches = iter_activations(sys.argv[1], 1, batch_size=64)
print(torch.from_numpy(next(batches)).shape[0])
"""


@pytest.mark.wide
def test_rows_that_are_left_unread_end_quietly(clean):
    """Python takes its modules apart before what stands at the top of a script."""
    done = subprocess.run(
        [sys.executable, "-c", UNFINISHED, str(clean)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "64\n", "")


STATEFUL = """
import sys, json, torch
from torchdata.stateful_dataloader import StatefulDataLoader
from qwen_jax.reading.torch import ActivationDataset

def loader():
    return StatefulDataLoader(ActivationDataset(sys.argv[1], 3, 700, 2000), batch_size=None, num_workers=2)

whole = loader()
batches = iter(whole)
for _ in range(5):
    next(batches)
state = whole.state_dict()
rest = list(batches)
other = loader()
other.load_state_dict(state)
again = list(other)
assert len(again) == len(rest) > 5 and all(map(torch.equal, again, rest))
print("the same")
"""


@pytest.mark.slow
@pytest.mark.skipif("SAE_PYTHON" not in os.environ, reason="SAE_PYTHON names no python with torchdata")
def test_torchdatas_stateful_loader_goes_on(clean):
    done = subprocess.run(
        [os.environ["SAE_PYTHON"], "-c", STATEFUL, str(clean)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "the same\n", done.stderr
