"""Small numbers about a shard that its readers want before they open it."""

from collections.abc import Sequence

import numpy as np

from qwen_jax.shards.format import Sample


def layer_norms(layers: Sequence[int], samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Mean and maximum over all tokens of each layer's Euclidean norm, by layer index as a string.

    Norms are computed in float32 and summed in float64, sample by sample in order, so that the result
    depends on the samples alone.
    """
    tokens = sum(len(sample.token_ids) for sample in samples)
    norms = {}
    for row, layer in enumerate(layers):
        total, largest = 0.0, 0.0
        for sample in samples:
            norms_T = np.linalg.norm(sample.activations[row].astype(np.float32, copy=False), axis=-1)
            total += float(norms_T.sum(dtype=np.float64))
            largest = max(largest, float(norms_T.max()))
        norms[str(layer)] = {"mean": total / tokens, "max": largest}
    return norms
