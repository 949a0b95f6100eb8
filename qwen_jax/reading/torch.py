"""Rows of one layer as a torch data set: for a DataLoader with any number of workers, on any number of ranks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from qwen_jax.errors import BadDataError
from qwen_jax.reading.activations import Cursor, Keep, Reading, Rows, Shard, open_shards, share_of
from qwen_jax.reading.samples import Layer

DEFAULT_SHUFFLE_BUFFER = 1 << 16


class ActivationDataset(IterableDataset):
    """Batches of rows, as tensors [batch, hidden]; give it to a `DataLoader(..., batch_size=None)`.

    The shards that lie there when it is made are divided over ranks, and those of a rank over the DataLoader's workers,
    so that each row comes once an epoch. Every `for` is an epoch of its own, in another order. Workers that end with
    the epoch (`persistent_workers=False`) begin the epoch that `set_epoch` said, else the same one again.

    `state_dict` says how far the iteration is, `load_state_dict` makes the next `for` go on there, as torchdata's
    StatefulDataLoader asks it of each worker. Ranks may have different numbers of batches.

    Args:
        path, layer, batch_size, shuffle_buffer, seed, shards_at_once, keep, kind: as of iter_activations. The buffer is
            each worker's. A `keep` that is a function must be one that can be pickled where workers are spawned.
        as_float32: cast; else the stored dtype, bfloat16 too, but no quantised one.
        with_tokens: give Rows of tensors.
        rank, world_size: by default those of torch.distributed where it is initialised, else 0 of 1.
        num_workers: the DataLoader's, which only `len` needs to know.

    Raises:
        UsageError, BadDataError: as iter_activations; fewer shards than ranks.
    """

    _next: dict[str, Any]
    """Where the next `for` begins."""
    _now: dict[str, Any]
    """How far the one under way is."""

    def __init__(
        self,
        path: str | Path,
        layer: Layer,
        batch_size: int,
        shuffle_buffer: int = DEFAULT_SHUFFLE_BUFFER,
        seed: int = 0,
        *,
        shards_at_once: int = 1,
        keep: Keep = None,
        kind: str | None = None,
        as_float32: bool = True,
        with_tokens: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        num_workers: int = 0,
    ):
        self._path = path
        self._reading = Reading(
            layer, batch_size, shuffle_buffer, seed, shards_at_once, keep, kind, as_float32, with_tokens
        )
        here = _rank_here()
        share = share_of(
            open_shards(path, layer, kind),
            here[0] if rank is None else rank,
            here[1] if world_size is None else world_size,
        )
        self._addresses = [_address(shard) for shard in share]
        workers = max(1, num_workers)
        self._lengths = [self._reading.known_batches(share[worker::workers]) for worker in range(workers)]
        self.set_epoch(0)

    def __len__(self) -> int:
        """Batches of an epoch on this rank; raises TypeError where only reading would tell, as with `keep`."""
        known = [length for length in self._lengths if length is not None]
        if len(known) < len(self._lengths):
            raise TypeError("how many rows there are is not known before they are read")
        return sum(known)

    def __iter__(self) -> Iterator[torch.Tensor | Rows]:
        shards = self._shards_of_worker()
        digest = self._reading.digest(shards)
        start = Cursor.parse({"arguments": digest, **self._next}, digest)
        self._next = {"epoch": start.epoch, "batches": 0}
        batches = self._reading.batches(shards, start.epoch + 1, start.as_dict())
        for batch in batches:
            self._now = batches.cursor
            yield _tensors(batch)
        self.set_epoch(start.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next `for` that epoch, from its start."""
        self._next = self._now = {"epoch": epoch, "batches": 0}

    def state_dict(self) -> dict[str, Any]:
        """How far the iteration of this process is; goes into JSON as it is."""
        return dict(self._now)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next `for` go on behind `state`; that raises UsageError where it belongs to other arguments or to
        another division of the shards."""
        self._next = self._now = dict(state)

    def _shards_of_worker(self) -> Sequence[Shard]:
        """Opened by the process that reads them, and no others than when the data set was made."""
        worker = get_worker_info()
        reading = self._reading
        there = {_address(shard): shard for shard in open_shards(self._path, reading.layer, reading.kind)}
        gone = [address for address in self._addresses if address not in there]
        if gone:
            raise BadDataError(f"{gone[0]} is no longer there; make the data set again")
        shards = [there[address] for address in self._addresses]
        return shards[worker.id :: worker.num_workers] if worker else shards


def _address(shard: Shard) -> str:
    run, name = shard
    return f"{run.where}/{name}"


def _rank_here() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _tensors(batch: np.ndarray | Rows) -> Any:
    """Of an array a tensor, of Rows Rows of tensors."""
    if isinstance(batch, Rows):
        return Rows(*map(_tensors, batch))
    if batch.dtype.name == "bfloat16":
        return torch.from_numpy(batch.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(batch)
