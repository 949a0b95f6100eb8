"""What both recipes share: a layer's rows as tensors, samples held out of training, and what a training came to."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qwen_jax.reading import iter_activations

HELD_OUT_EVERY = 10


def training_rows(path: str, layer: int, size: int, epochs: int) -> Iterator[torch.Tensor]:
    """Shuffled batches [size, hidden] of the samples that are not held out."""
    for rows in iter_activations(
        path, layer, size, shuffle_buffer=64 * size, epochs=epochs, keep=_rows_where(held_out=False)
    ):
        if len(rows) == size:
            yield torch.from_numpy(rows)


def held_out_rows(path: str, layer: int, count: int) -> torch.Tensor:
    """At most `count` rows of every tenth sample, none of which is trained on."""
    batches = iter_activations(path, layer, count, shuffle_buffer=4 * count, keep=_rows_where(held_out=True))
    return torch.from_numpy(next(batches))


def _rows_where(held_out: bool) -> Callable[[dict[str, Any]], np.ndarray]:
    def keep(sample: dict[str, Any]) -> np.ndarray:
        return np.full(len(sample["token_ids"]), (sample["sample_idx"] % HELD_OUT_EVERY == 0) == held_out)

    return keep


def unexplained(autoencoder: torch.nn.Module, rows: torch.Tensor) -> float:
    """The share of the rows' variance that the reconstruction misses: 1 is as good as their mean."""
    with torch.no_grad():
        left = (autoencoder(rows) - rows).square().sum()
    return float(left / (rows - rows.mean(0)).square().sum())


def report(losses: Sequence[float], before: float, after: float) -> None:
    """Prints how the loss fell, tenth by tenth of the steps, and what is left of held-out samples."""
    tenths = [part.mean() for part in np.array_split(np.asarray(losses), 10) if len(part)]
    print("loss by tenths of the steps:", " ".join(f"{loss:.4g}" for loss in tenths))
    print(
        f"unexplained variance of held-out samples: {before:.3f} before, {after:.3f} after; "
        "1 is as good as the mean"
    )
