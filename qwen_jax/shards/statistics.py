"""Small numbers about a shard that its readers want before they open it."""

from collections.abc import Sequence

import numpy as np


def layer_norms(layers: Sequence[int], norms: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    """Mean and maximum over all tokens of each layer's Euclidean norm, by layer index as a string.

    norms: one float32 [n_layers, n_tokens] array a sample. They are summed in float64, sample by sample in
    order, so that the result depends on the samples alone.
    """
    tokens = sum(norms_CT.shape[1] for norms_CT in norms)
    totals_C = sum(norms_CT.sum(axis=1, dtype=np.float64) for norms_CT in norms)
    largest_C = np.max([norms_CT.max(axis=1) for norms_CT in norms], axis=0)
    return {
        str(layer): {"mean": float(total) / tokens, "max": float(largest)}
        for layer, total, largest in zip(layers, totals_C, largest_C, strict=True)
    }
