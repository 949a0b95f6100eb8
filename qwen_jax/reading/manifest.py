"""What an export's folder holds, so that a later start neither mixes nor keeps what belongs to something else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qwen_jax.errors import BadDataError, UsageError
from qwen_jax.ledger.checks import DamagedError, parse, read_bounded
from qwen_jax.ledger.schema import EXPORT
from qwen_jax.storage.atomic import write_json

MANIFEST_NAME = "export.json"


@dataclass
class Manifest:
    """export.json. about: format, kind and the like; parts: the crc32c of the shard behind each part, by the part's
    name; layers: those that are there whole."""

    path: Path
    about: dict[str, Any]
    parts: dict[str, str]
    layers: list[int | str]

    @classmethod
    def open(cls, folder: Path, about: Mapping[str, Any], parts: Mapping[str, str], *, fixed: bool) -> Self:
        """The folder's manifest, made if there is none, with the parts that have come since added.

        fixed: whether the format has no room for further parts. Raises UsageError where the folder holds an export
        of other data, or in another form.
        """
        path = folder / MANIFEST_NAME
        folder.mkdir(parents=True, exist_ok=True)
        present = cls._read(path)
        if present is None:
            present = cls(path, dict(about), {}, [])
            fixed = False
        differing = present._differing(about, parts, fixed)
        if differing:
            raise UsageError(
                f"{folder} holds another export ({differing}); choose another folder, or delete this one"
            )
        added = cls(path, dict(about), {**present.parts, **parts}, present.layers)
        if added.parts != present.parts:
            added.layers = []  # they lack the new parts until they are written
        added._write()
        return added

    def add_layers(self, layers: Sequence[int | str]) -> None:
        """Notes layers that are whole."""
        self.layers = sorted({*self.layers, *layers}, key=lambda layer: (isinstance(layer, str), layer))
        self._write()

    def _differing(self, about: Mapping[str, Any], parts: Mapping[str, str], fixed: bool) -> str:
        for key in about:
            if self.about.get(key) != about[key]:
                return f"{key} {self.about.get(key)}, now {about[key]}"
        for name, crc32c in self.parts.items():
            if parts.get(name) != crc32c:
                return f"{name} is another shard than the one that was exported"
        if fixed and len(parts) > len(self.parts):
            return f"of {len(self.parts)} shards, now there are {len(parts)}"
        return ""

    @classmethod
    def _read(cls, path: Path) -> Self | None:
        try:
            return cls(path, **parse(read_bounded(path), EXPORT))
        except FileNotFoundError:
            return None
        except DamagedError as error:
            raise BadDataError(
                f"{path} is damaged ({error}); delete its folder, or choose another"
            ) from error

    def _write(self) -> None:
        write_json(self.path, {"about": self.about, "parts": self.parts, "layers": self.layers})
