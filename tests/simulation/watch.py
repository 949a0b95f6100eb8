"""What must hold after every step of a simulation, whatever happens."""

import json
from typing import Any

from qwen_jax.ledger.metadata import Ledger
from qwen_jax.ledger.names import METADATA_NAME, STATS_NAME, shard_name, shard_number, shard_stats_name
from qwen_jax.ledger.schema import COMPLETED
from tests.simulation.bucket import Stored, crc32c
from tests.simulation.disk import Disk
from tests.simulation.shards import LINES, SHARDS, merged, variants


class Violation(AssertionError):
    """A promise that was broken."""


class Watch:
    """Looks at the bucket after each change.

    The bucket's metadata.json says what is covered. From then on that may not change nor go, metadata.json may only
    grow, and a completed run stays; until a start with --force_restart puts an empty one there.
    """

    def __init__(self, objects: dict[str, Stored], checkpoint: str):
        self._objects, self._checkpoint = objects, checkpoint
        self._covered: list[str] = []
        self._pinned: dict[str, str] = {}
        self._completed = False
        self._histories: set[tuple[str, ...]] = {()}
        self._on_disk: list[tuple[str, str]] = []
        self.late_arrived = False

    def changed(self, name: str, forced: bool) -> None:
        """An object was written or deleted. forced: by a start with --force_restart."""
        stored = self._objects.get(name)
        if name == METADATA_NAME:
            self._metadata_changed(stored, forced)
        elif name == self._checkpoint:
            self._checkpoint_changed(stored, forced)
        elif name in self._pinned and (stored is None or stored.crc32c != self._pinned[name]):
            raise Violation(f"{name} is covered, but was {'replaced' if stored else 'deleted'}")
        elif stored is None and (number := shard_number(name)) and number <= self._checkpointed():
            raise Violation(f"{name} is covered by the checkpoint, but was deleted")

    def _metadata_changed(self, stored: Stored | None, forced: bool) -> None:
        if stored is None:
            raise Violation("metadata.json was deleted")
        said = json.loads(stored.data)
        covered = [entry["crc32c"] for entry in said["shards"]]
        if forced and not covered and said["status"] != COMPLETED:
            self._covered, self._pinned, self._completed = [], {}, False
            return
        if covered[: len(self._covered)] != self._covered:
            raise Violation(f"history: {self._covered} becomes {covered}")
        if self._completed and said["status"] != COMPLETED:
            raise Violation("a completed run does not stay completed")
        for number in range(len(self._covered) + 1, len(covered) + 1):
            self._pin_shard(number, covered[number - 1])
        self._covered = covered
        self._histories.add(tuple(covered))
        if said["status"] == COMPLETED and not self._completed:
            self._pin_completed(said)

    def _pin_shard(self, number: int, crc: str) -> None:
        stored, stats = (self._objects.get(name) for name in (shard_name(number), shard_stats_name(number)))
        if stored is None or stored.crc32c != crc:
            raise Violation(f"metadata.json is ahead of {shard_name(number)}")
        if crc not in variants(number):
            raise Violation(f"{shard_name(number)} is not what any machine computes")
        if stats is None or stats.data != variants(number)[crc]:
            raise Violation(f"the statistics of {shard_name(number)} are {'others' if stats else 'missing'}")
        self._pinned[shard_name(number)] = crc
        self._pinned[shard_stats_name(number)] = stats.crc32c

    def _pin_completed(self, said: dict[str, Any]) -> None:
        stats = self._objects.get(STATS_NAME)
        if len(self._covered) != SHARDS or said["last_processed_sample_idx"] != LINES - 1:
            raise Violation("completed, but not all of it is there")
        if len(said["skipped"]) != 1:
            raise Violation(f"the skipped line is listed {len(said['skipped'])} times")
        if stats is None or stats.data != merged(tuple(self._covered)):
            raise Violation(f"completed, but {STATS_NAME} is {'of other shards' if stats else 'missing'}")
        self._completed = True
        self._pinned[STATS_NAME] = stats.crc32c

    def _checkpoint_changed(self, stored: Stored | None, forced: bool) -> None:
        if stored is None:
            raise Violation("the checkpoint was deleted")
        said = json.loads(stored.data)
        if said["total_shards"] > len(self._covered):
            raise Violation(
                f"the checkpoint covers {said['total_shards']}, metadata.json {len(self._covered)}"
            )
        if said["status"] == COMPLETED and not self._completed:
            raise Violation("the checkpoint is completed, metadata.json is not")

    def _checkpointed(self) -> int:
        stored = self._objects.get(self._checkpoint)
        return json.loads(stored.data)["total_shards"] if stored is not None else 0

    def check_covered(self, ledger: Ledger) -> None:
        """A writer's ledger is one that the bucket had or has."""
        shards = tuple(shard.crc32c for shard in ledger.shards)
        if shards not in self._histories:
            raise Violation(f"a writer believes in {shards}, covered are {self._covered}")

    def check_completed(self) -> None:
        if not self._completed:
            raise Violation("all writers have ended well, but the run is not completed")
        said = json.loads(self._objects[self._checkpoint].data)
        if (said["total_shards"], said["status"]) != (SHARDS, COMPLETED):
            raise Violation(f"all writers have ended well, but the checkpoint says {said}")

    # A machine without a bucket.

    def forget_disk(self) -> None:
        """The disk is lost, or its owner starts over."""
        self._on_disk = []

    def check_local(self, disk: Disk, machine: str, ledger: Ledger) -> None:
        """What a writer has made durable, which stays, whatever happens to the machine."""
        shards = [(shard.filename, shard.crc32c) for shard in ledger.shards]
        if shards[: len(self._on_disk)] != self._on_disk:
            raise Violation(f"history: {self._on_disk} becomes {shards}")
        self._on_disk = shards

    def check_disk(self, disk: Disk, machine: str) -> None:
        """After a crash: metadata.json is not ahead of its shards, and nothing that was durable is lost."""
        said = _local(disk, f"{machine}/out/{METADATA_NAME}")
        listed = [(entry["filename"], entry["crc32c"]) for entry in said.get("shards", [])]
        for name, crc in listed:
            inode = disk.names.get(f"{machine}/out/{name}")
            if inode is None or crc32c(inode.data) != crc:
                raise Violation(f"the local metadata.json is ahead of {name}")
        if listed[: len(self._on_disk)] != self._on_disk:
            raise Violation(f"{self._on_disk} was durable on the disk, left is {listed}")

    def check_completed_locally(self, disk: Disk, machine: str) -> None:
        said = _local(disk, f"{machine}/out/{METADATA_NAME}")
        self.check_disk(disk, machine)
        if said.get("status") != COMPLETED or len(said["shards"]) != SHARDS:
            raise Violation(f"the writer has ended well, but its metadata.json says {said.get('status')}")
        whole = disk.names[f"{machine}/out/{STATS_NAME}"].data
        if whole != merged(tuple(entry["crc32c"] for entry in said["shards"])):
            raise Violation(f"completed, but {STATS_NAME} is of other shards")


def _local(disk: Disk, path: str) -> dict[str, Any]:
    inode = disk.names.get(path)
    if inode is None:
        return {}
    try:
        return json.loads(inode.data)
    except ValueError as error:
        raise Violation(f"{path} is torn: {error}") from error
