"""One random reference per shape, saved once a session, and our model loaded from it."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.model.config import Qwen2Config, read_config
from qwen_jax.model.qwen2 import Qwen2
from qwen_jax.model.sharding import make_mesh
from qwen_jax.model.weights import load_model, open_checkpoint

# hidden, mlp, layers, heads, kv heads, vocabulary, tied: the head layouts of the published sizes.
SHAPES = {
    "0.5B-like": (112, 192, 4, 14, 2, 199, True),
    "1.5B-like": (96, 160, 4, 12, 2, 199, True),
    "7B-like": (112, 144, 3, 28, 4, 199, False),
}


@dataclass(frozen=True, eq=False)
class Reference:
    folder: Path
    config: Qwen2Config
    hf: object

    @cache  # noqa: B019  (a few tiny models a session)
    def ours(self, dtype=jnp.float32, num_layers: int | None = None) -> Qwen2:
        layers = self.config.num_layers if num_layers is None else num_layers
        return load_model(open_checkpoint(self.folder), self.config, layers, dtype, make_mesh())

    def tokens(self, rows: int, length: int) -> np.ndarray:
        return np.random.default_rng(7).integers(0, self.config.vocab_size, (rows, length), np.int32)


def run(model, tokens, layers, tap="residual"):
    """[C, B, T, D]: one tap of the layers."""
    return model(tokens, layers, [tap])[0][tap]


@pytest.fixture(scope="session", params=SHAPES)
def reference(request, tmp_path_factory) -> Reference:
    return build_reference(SHAPES[request.param], tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Reference:
    return build_reference(SHAPES["0.5B-like"], tmp_path_factory.mktemp("small"))


def build_reference(shape: tuple, folder: Path) -> Reference:
    from tests.hf_reference import load_reference, make_reference, save_reference

    save_reference(make_reference(*shape), folder)
    return Reference(folder, read_config(folder), load_reference(folder))
