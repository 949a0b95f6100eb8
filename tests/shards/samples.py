"""Samples and shards that the shard tests share."""

import io
from collections.abc import Sequence

import numpy as np

from qwen_jax.shards import Sample, write_shard
from qwen_jax.shards.parts import read_index

LAYERS = (0, 3, 7)


def make_sample(
    index: int, n_tokens: int = 5, hidden: int = 8, dtype=np.float32, n_layers: int = 3
) -> Sample:
    rng = np.random.default_rng(index)
    return Sample(
        sample_idx=index,
        activations=rng.standard_normal((n_layers, n_tokens, hidden)).astype(dtype),
        token_ids=rng.integers(0, 150_000, n_tokens, dtype=np.int32),
        text_preview=f"prompt {index} é 😀 \ud800",
        task_id=f"task-{index}",
    )


def make_samples(dtype=np.float32) -> list[Sample]:
    return [
        make_sample(index, n_tokens, dtype=dtype)
        for index, n_tokens in ((0, 5), (2, 1), (3, 300), (1 << 40, 2))
    ]


def shard_bytes(samples: Sequence[Sample], layers: Sequence[int] = LAYERS, threads: int | None = 2) -> bytes:
    file = io.BytesIO()
    write_shard(file, layers, samples, threads=threads)
    return file.getvalue()


def without_index(shard: bytes) -> bytes:
    """The shard as it was written before shards said where their layers lie."""
    return shard[: read_index(io.BytesIO(shard))[-1].end]


def assert_same_shard(left: dict, right: dict) -> None:
    assert list(left) == list(right)
    for layer in left:
        assert len(left[layer]) == len(right[layer])
        for one, other in zip(left[layer], right[layer], strict=True):
            assert list(one) == list(other)
            for key in one:
                assert type(one[key]) is type(other[key])
                if isinstance(one[key], np.ndarray):
                    assert one[key].dtype == other[key].dtype and one[key].shape == other[key].shape
                    assert one[key].tobytes() == other[key].tobytes()
                else:
                    assert one[key] == other[key]
