"""Everything that decides which bytes a run writes, so that a resumed run can prove it is the same run."""

import hashlib
from pathlib import Path

from qwen_jax.errors import ConfigError
from qwen_jax.ledger.metadata import Fingerprint


def files_digest(folder: Path, names: tuple[str, ...]) -> str:
    """sha256 over the small files of `names` that exist in `folder`, with their names."""
    digest = hashlib.sha256()
    for name in names:
        path = folder / name
        if path.is_file():
            digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def check_fingerprint(stored: Fingerprint, ours: Fingerprint, source: str) -> None:
    """Raises ConfigError (exit 78) naming every field that differs, with its old and new value."""
    changed = [
        f"{field}: was {stored.get(field)!r}, is {ours.get(field)!r}"
        for field in dict.fromkeys([*stored, *ours])
        if stored.get(field) != ours.get(field)
    ]
    if changed:
        raise ConfigError(
            f"{source} belongs to a run with other settings; use the old ones to resume it, another --output_dir and "
            "--checkpoint_dir for a new run, or --force_restart to overwrite it:\n  " + "\n  ".join(changed)
        )
