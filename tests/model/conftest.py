"""One random reference per shape, saved once a session, and our model loaded from it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from qwen_jax.data.prompts import TokenizedSample
from qwen_jax.data.steps import StepShape, lay_into_steps
from qwen_jax.model.attention import Blocked
from qwen_jax.model.capture import Capture, Compilation
from qwen_jax.model.config import ModelConfig, read_config
from qwen_jax.model.decoder import Decoder
from qwen_jax.model.program import Program
from qwen_jax.model.sharding import make_mesh
from qwen_jax.model.weights import load_model, open_checkpoint
from qwen_jax.run.pipeline import CapturedSample, captured_samples
from tests.few import few

# hidden, mlp, layers, heads, kv heads, vocabulary, tied: the head layouts of the published sizes.
SHAPES = {
    "0.5B-like": (112, 192, 4, 14, 2, 199, True),
    "1.5B-like": (96, 160, 4, 12, 2, 199, True),
    "7B-like": (112, 144, 3, 28, 4, 199, False),
}

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Options of a compiler that optimises nothing."""


@dataclass(frozen=True, eq=False)
class Reference:
    folder: Path
    config: ModelConfig
    hf: object

    @cache  # noqa: B019  (a few tiny models a session)
    def ours(self, dtype=jnp.float32, num_layers: int | None = None) -> Decoder:
        layers = self.config.num_layers if num_layers is None else num_layers
        return load_model(open_checkpoint(self.folder), self.config, layers, dtype, make_mesh())

    def tokens(self, rows: int, length: int) -> np.ndarray:
        return np.random.default_rng(7).integers(0, self.config.vocab_size, (rows, length), np.int32)


def program_of(
    model: Decoder, layers: Sequence[int], taps: Sequence[str], shape: StepShape, **settings
) -> Program:
    """The program of that model's weights on this machine's devices."""
    dtype = str(model.embed_VD.dtype)
    given = {"dtype": dtype, "stored_dtype": dtype, "mesh": make_mesh(), "form": Blocked()} | settings
    num_layers = model.blocks.attn.q_NHD.shape[0]
    return Program(model.config, num_layers, tuple(layers), tuple(taps), shape=shape, **given)


def first_devices(count: int) -> Mesh:
    """A row of samples on each; all of this machine's devices are make_mesh's."""
    return Mesh(np.array(jax.local_devices()[:count])[:, None], ("data", "model"))


@cache
def compilation(program: Program) -> Compilation:
    """The same of equal programs: most of the time of a test is its compiler's."""
    return Compilation(program)


def samples_of(prompts: Iterable[np.ndarray], first: int = 0) -> list[TokenizedSample]:
    """int32 token ids of each sample."""
    return [
        TokenizedSample(number, ids, np.zeros(len(ids), np.int32), None, "", "", False, 0, len(ids))
        for number, ids in enumerate(prompts, first)
    ]


def capture_samples(
    capture: Capture, shape: StepShape, samples: Iterable[TokenizedSample]
) -> list[CapturedSample]:
    return list(captured_samples(lay_into_steps(samples, shape), capture))


def joined(sample: CapturedSample, tap: str = "residual") -> np.ndarray:
    """[C, n, D]"""
    return np.concatenate(sample.taps[tap].pieces, axis=1)


def run(
    model: Decoder, tokens: np.ndarray, layers: Sequence[int], tap: str = "residual", **settings
) -> np.ndarray:
    """[C, B, T, D]: one tap of the layers, of prompts of one length, in steps that cut through them. positions: the
    most that the program is made for; without it, that length."""
    return run_taps(model, tokens, layers, [tap], **settings)[tap]


def run_taps(
    model: Decoder, tokens: np.ndarray, layers: Sequence[int], taps: Sequence[str], **settings
) -> dict[str, np.ndarray]:
    """The same of several taps, by name."""
    shape = StepShape(settings.pop("step_tokens", 50), settings.pop("positions", tokens.shape[1]))
    capture = Capture(compilation(program_of(model, layers, taps, shape, **settings)), model)
    found = capture_samples(capture, shape, samples_of(tokens))
    return {tap: np.stack([joined(sample, tap) for sample in found], axis=1) for tap in taps}


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For tests of values: to optimise nothing takes the compiler a third of the time. Tests of bits compile
    as the product does."""
    compile_fully = jax.stages.Lowered.compile
    with mock.patch.object(jax.stages.Lowered, "compile", lambda lowered: compile_fully(lowered, QUICK)):
        yield


@pytest.fixture(scope="session", params=few(["0.5B-like", "7B-like"]))
def reference(request, tmp_path_factory) -> Reference:
    return build_reference(SHAPES[request.param], tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Reference:
    return build_reference(SHAPES["0.5B-like"], tmp_path_factory.mktemp("small"))


def build_reference(shape: tuple, folder: Path, **fields) -> Reference:
    """fields: of config.json, model_type among them."""
    from tests.hf_reference import load_reference, make_reference, save_reference

    save_reference(make_reference(*shape, **fields), folder)
    return Reference(folder, read_config(folder), load_reference(folder))
