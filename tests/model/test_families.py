"""Every family is Hugging Face's, in every layer of every tap; and what it takes to add one."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwen_jax.kinds import KINDS
from qwen_jax.model.config import parse_config
from qwen_jax.model.families import FAMILIES
from qwen_jax.model.published import OTHER_FAMILIES, config_fields
from tests.few import few
from tests.hf_reference import load_reference, reference_taps
from tests.model.conftest import Reference, build_reference, run, run_taps
from tests.model.test_parity import STACK_TOLERANCE, check_bfloat16, worst_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE = (48, 80, 2, 6, 2, 97, True)
_SMALL = {"rope_theta": 1e4, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | _SMALL
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0} | _SMALL
# What each family has besides, on, and every kind of rope; head sizes that are not the width by the heads.
CASES = {
    "qwen3 yarn": {"model_type": "qwen3", "head_dim": 32, "attention_bias": True, "rope_parameters": YARN},
    "llama": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 16,
        "rope_parameters": LLAMA3,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mistral": {
        "model_type": "mistral",
        "sliding_window": None,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
    },
}


@pytest.fixture(scope="module")
def family(request, tmp_path_factory) -> Reference:
    return build_reference(SHAPE, tmp_path_factory.mktemp("family"), **CASES[request.param])


@pytest.mark.parametrize("family", few(CASES, 2), indirect=True)
def test_every_layer_of_every_tap(family):
    tokens = family.tokens(1, 130)
    theirs = reference_taps(family.hf, tokens)
    ours = run_taps(family.ours(), tokens, range(family.config.num_layers), tuple(KINDS))
    for tap in KINDS:
        for layer in range(family.config.num_layers):
            assert worst_error(ours[tap][layer], theirs[tap][layer]) < STACK_TOLERANCE, (tap, layer)


@pytest.mark.wide
@pytest.mark.parametrize("family", ["qwen3 yarn", "llama"], indirect=True)
def test_bfloat16_is_as_close_to_float32_as_hugging_faces_own(family):
    tokens = family.tokens(1, 80)
    exact = reference_taps(family.hf, tokens)["residual"]
    theirs = reference_taps(load_reference(family.folder, "bfloat16"), tokens)["residual"]
    ours = run(family.ours(jnp.bfloat16), tokens, range(family.config.num_layers))
    check_bfloat16(ours.astype(np.float32), theirs, exact)


@pytest.mark.parametrize("size", OTHER_FAMILIES)
def test_rope_frequencies_of_published_models(size):
    """At the true head sizes, against Hugging Face's own functions."""
    fields = config_fields(size)
    _same_rope(fields)


def test_rope_frequencies_of_the_published_yarn_recipe():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    _same_rope(config_fields("7B") | {"rope_scaling": yarn})
    _same_rope(config_fields("Qwen3-8B") | {"rope_scaling": yarn | {"mscale": 1.0, "mscale_all_dim": 0.7}})


def _same_rope(fields: dict) -> None:
    config, theirs = parse_config(fields), AutoConfig.for_model(**fields)
    name = theirs.rope_parameters["rope_type"]
    if name == "default":
        assert config.rope.scale == 1.0
        return
    frequencies, scale = ROPE_INIT_FUNCTIONS[name](theirs, "cpu")
    np.testing.assert_allclose(config.rope.frequencies(config.head_dim), frequencies.numpy(), rtol=1e-6)
    assert config.rope.scale == pytest.approx(scale)


def test_a_family_is_known_in_two_files():
    """Its description and its published sizes; nothing else in the package says its name."""
    package = Path(__file__).parents[2] / "qwen_jax"
    texts = {str(file.relative_to(package)): file.read_text().lower() for file in package.rglob("*.py")}
    for name in FAMILIES.keys() - {"qwen2", "llama"}:  # those in whose honour other things are named
        assert {file for file, text in texts.items() if name in text} == {
            "model/families.py",
            "model/published.py",
        }
    assert {name.partition("-")[0].partition(".")[0].lower() for name in OTHER_FAMILIES} <= FAMILIES.keys()
