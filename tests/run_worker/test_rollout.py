"""--rollout by the real command line: answers are stored like any tokens, once, and can be certified and repaired."""

import shutil

import numpy as np
import pytest

from qwen_jax.__main__ import main
from qwen_jax.errors import UsageError
from qwen_jax.roles import ROLLOUT
from tests.hf_reference import load_reference
from tests.run_worker.conftest import tree
from tests.run_worker.test_kinds import next_token_logprobs
from tests.run_worker.test_truth import records
from tests.test_settings import parsed

FLAGS = ("--rollout", "9", "--layers_to_extract", "1", "--max_samples", "6", "--max_seq_length", "700")
FLAGS += ("--shard_size_gb", "0.0004")


@pytest.fixture(scope="module")
def rolled(finished, tmp_path_factory):
    """A run with answers of the model's own; tests only read it."""
    worker = finished.elsewhere(str(tmp_path_factory.mktemp("rolled")))
    worker.run(*FLAGS)
    return worker


@pytest.mark.wide
def test_answers_and_their_log_probabilities_are_hugging_faces(rolled):
    model, stored = load_reference(rolled.model), records(rolled)[1]
    assert len(stored) > 3
    for record in stored:
        is_answer = record["token_roles"] == ROLLOUT
        assert is_answer[-is_answer.sum() :].all() and 0 < is_answer.sum() <= 9
        theirs = next_token_logprobs(model, record["token_ids"])
        np.testing.assert_allclose(record["answer_logprobs"], theirs[is_answer[1:]], rtol=0, atol=2e-4)
        np.testing.assert_array_equal(record["answer_token_ids"], record["token_ids"][is_answer])
        assert record["solved"] == 0 and len(record["token_ids"]) <= 700
    assert rolled.metadata()["fingerprint"]["rollout"] == 9
    assert "rollout_seed" not in rolled.metadata()["fingerprint"]


@pytest.mark.wide
def test_a_kill_changes_nothing(rolled, workspace):
    workspace.having(QWEN_JAX_FAILPOINT="checkpoint_local:2").run(*FLAGS, expect=-9)
    workspace.run(*FLAGS)
    assert tree(workspace.output) == tree(rolled.output)


@pytest.mark.wide
def test_answers_are_the_same_where_a_byte_a_value_is_stored(rolled, workspace):
    workspace.run(*FLAGS, "--activation_dtype", "int8")
    pairs = list(zip(records(workspace)[1], records(rolled)[1], strict=True))
    assert len(pairs) > 3
    for quantised, exact in pairs:
        for key in ("token_ids", "token_roles", "answer_token_ids", "answer_logprobs", "answer_positions"):
            np.testing.assert_array_equal(quantised[key], exact[key])
        x_ND, error_ND = exact["activation"], quantised["activation"] - exact["activation"]
        assert 0 < np.linalg.norm(error_ND) < 0.02 * np.linalg.norm(x_ND)


@pytest.mark.wide
def test_such_a_run_is_whole_certified_and_repaired(rolled, workspace, capsys):
    copy = shutil.copytree(rolled.output, workspace.root / "worker_5")
    assert main(["verify", str(copy)]) == 0
    assert main(["certify", str(copy), "--samples", "2"]) == 0
    assert "against Hugging Face float32" in capsys.readouterr().out
    (copy / "shard_0002.pkl.gz").unlink()
    assert main(["verify", str(copy), "--repair"]) == 0
    assert (copy / "shard_0002.pkl.gz").read_bytes() == (rolled.output / "shard_0002.pkl.gz").read_bytes()


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--rollout", "5", "--include_answer"), "exclude each other"),
        (("--rollout", "700", "--max_seq_length", "700"), "no room"),
        (("--keep_tokens", "role:rollout"), "pass --rollout N"),
    ],
)
def test_what_does_not_fit_together_is_refused(flags, words):
    with pytest.raises(UsageError, match=words):
        parsed(*flags)
