"""Several kinds in one pass, fewer rows, answers and statistics: stored is what was asked for, and no other."""

import gzip
import pickle
import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from qwen_jax.data.arc import parse_line
from qwen_jax.data.layouts import PROMPT_FORMATS
from qwen_jax.roles import ANSWER, TEST_INPUT
from qwen_jax.shards import load_shard
from qwen_jax.shards.format import ANSWER_KEYS
from tests.hf_reference import load_reference, make_reference, reference_taps, save_reference
from tests.run_worker.conftest import tree
from tests.run_worker.test_truth import TOLERANCE, records


@pytest.fixture(scope="module")
def everything(finished, tmp_path_factory):
    """A run of two kinds, the embedding and answers, longer prompts allowed; tests only read it."""
    worker = finished.elsewhere(str(tmp_path_factory.mktemp("everything")))
    flags = ("--activation_type", "residual", "mlp", "--include_embedding", "--include_answer")
    worker.run(*flags, "--layers_to_extract", "0", "2", "--max_seq_length", "1500", "--max_samples", "6")
    return worker


def test_every_kind_equals_hugging_face(everything):
    stored, model = records(everything), load_reference(everything.model)
    assert list(stored) == [0, 2, "embedding"]
    assert everything.metadata()["activation_types"] == ["residual", "mlp"]
    for index, embedded in enumerate(stored["embedding"]):
        theirs = reference_taps(model, embedded["token_ids"][None])
        table = model.model.embed_tokens.weight.detach().numpy()
        np.testing.assert_array_equal(embedded["activation"], table[embedded["token_ids"]])
        assert not {"residual", "mlp"} & embedded.keys()
        for layer in (0, 2):
            record = stored[layer][index]
            assert record["residual"] is record["activation"]
            for kind in ("residual", "mlp"):
                expected = theirs[kind][layer, 0]
                assert np.abs(record[kind] - expected).max() < TOLERANCE * np.abs(expected).max()


def test_a_kind_is_stored_once(everything):
    shard = pickle.loads(gzip.decompress(everything.shards()[0].read_bytes()))
    arrays = {id(r[kind]): r[kind] for layer in (0, 2) for r in shard[layer] for kind in ("residual", "mlp")}
    raw = sum(array.nbytes for array in arrays.values()) + sum(
        r["activation"].nbytes for r in shard["embedding"]
    )
    assert everything.metadata()["shards"][0]["raw_bytes"] == raw
    assert len(gzip.decompress(everything.shards()[0].read_bytes())) < 1.2 * raw


@pytest.mark.wide
def test_answers_follow_the_prompt_and_their_log_probabilities_are_hugging_faces(everything):
    model = load_reference(everything.model)
    lines = everything.stream.read_bytes().splitlines()
    for record in records(everything)[0]:
        is_answer = record["token_roles"] == ANSWER
        task = parse_line(lines[record["sample_idx"]])
        shown = PROMPT_FORMATS["rows"].answer(task)
        cells = record["token_cells"][is_answer & (record["token_cells"][:, 0] >= 0)]
        assert cells[:, 3].tolist() == [colour for row in task.test[0]["output"] for colour in row]
        assert is_answer[-is_answer.sum() :].all() and len(shown.text) >= is_answer.sum() > 0
        theirs = next_token_logprobs(model, record["token_ids"])
        np.testing.assert_allclose(record["answer_logprobs"], theirs[is_answer[1:]], rtol=0, atol=2e-4)
        assert record["answer_positions"].tolist() == np.flatnonzero(is_answer).tolist()
        np.testing.assert_array_equal(record["answer_token_ids"], record["token_ids"][is_answer])


def next_token_logprobs(model, token_ids: np.ndarray) -> np.ndarray:
    """Hugging Face's natural log-probability of each token but the first."""
    tokens = torch.from_numpy(token_ids.astype(np.int64))
    with torch.no_grad():
        theirs = torch.log_softmax(model(tokens[None]).logits[0, :-1], dim=-1)
    return theirs[torch.arange(len(tokens) - 1), tokens[1:]].numpy()


@pytest.mark.wide
def test_answers_are_matched_to_tokens_where_rows_are_dropped_and_the_head_is_untied(workspace, tmp_path):
    model = save_reference(make_reference(64, 96, 3, 4, 2, 512, False), tmp_path / "untied")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(workspace.model / name, model / name)
    flags = ("--include_answer", "--layers_to_extract", "0", "--max_seq_length", "1500", "--max_samples", "4")
    full, last = (replace(workspace, model=model).elsewhere(name) for name in ("full", "last"))
    full.run(*flags)
    last.run(*flags, "--keep_tokens", "last:2")
    reference = load_reference(model)
    pairs = list(zip(records(full)[0], records(last)[0], strict=True))
    assert len(pairs) == 4
    for whole, short in pairs:
        places = short["answer_positions"]
        assert len(places) > 2 == len(short["token_ids"])
        np.testing.assert_array_equal(short["answer_token_ids"], whole["token_ids"][places])
        theirs = next_token_logprobs(reference, whole["token_ids"])[places - 1]
        np.testing.assert_allclose(short["answer_logprobs"], theirs, rtol=0, atol=2e-4)


def test_without_include_answer_nothing_shows_it(finished):
    for record in records(finished)[0]:
        assert not record.keys() & set(ANSWER_KEYS) and ANSWER not in record["token_roles"]


def float64_statistics(worker, kind: str, layer) -> dict[str, np.ndarray]:
    key = "activation" if kind == "embedding" else kind
    rows = np.concatenate([record.get(key, record["activation"]) for record in records(worker)[layer]])
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    channels = {"mean": rows.mean(0), "variance": rows.var(0), "max_abs": np.abs(rows).max(0)}
    return {**channels, "norm_mean": norms.mean(), "norm_max": norms.max()}


def assert_close(ours, exact):
    """Within 1e-5 of the largest value: a channel whose mean is nearly nought has no digits of its own."""
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


def test_statistics_equal_a_float64_recomputation(everything, finished):
    cases = [
        (everything, kind, entry, layer) for kind in ("residual", "mlp") for entry, layer in enumerate((0, 2))
    ]
    cases += [(everything, "embedding", 0, "embedding"), (finished, "residual", 1, 1)]
    for worker, kind, entry, layer in cases:
        stats = load_file(worker.output / "stats.safetensors")
        for part, exact in float64_statistics(worker, kind, layer).items():
            assert_close(stats[f"{kind}.{part}"][entry], exact)
        summary = worker.metadata()["statistics"][kind][str(layer)]
        exact = float64_statistics(worker, kind, layer)
        rms = np.sqrt(exact["mean"] ** 2 + exact["variance"])
        massive = np.flatnonzero(exact["max_abs"] > 100 * np.median(rms)).tolist()
        assert summary["massive_channels"] == massive and (massive or kind != "embedding")
        assert summary["norm_max"] == pytest.approx(exact["norm_max"], rel=1e-5)


@pytest.mark.wide
def test_lost_statistics_are_made_again_from_the_shard(workspace, finished):
    workspace.killed_at("completing")
    (workspace.output / "stats_0002.safetensors").unlink()
    (workspace.output / "stats_0003.safetensors").write_bytes(struct.pack("<Q", 99) + b"torn")
    done = workspace.run()
    assert "shard_0002.pkl.gz has no statistics; computing them from the shard" in done.stderr
    assert "stats_0003.safetensors is not a whole statistics file" in done.stderr
    ours, whole = (load_file(each.output / "stats.safetensors") for each in (workspace, finished))
    for name in whole:
        assert_close(ours[name], whole[name])


@pytest.mark.wide
def test_only_rows_of_the_wanted_roles_are_kept(workspace, finished):
    workspace.run("--keep_tokens", "role:test_input", "--max_samples", "6")
    full = {record["sample_idx"]: record for record in records(finished)[2]}
    stored = records(workspace)[2]
    assert len(stored) > 3
    for record in stored:
        whole, positions = full[record["sample_idx"]], record["token_positions"]
        assert positions.tolist() == np.flatnonzero(whole["token_roles"] == TEST_INPUT).tolist()
        for key in ("token_ids", "token_roles", "token_cells"):
            np.testing.assert_array_equal(record[key], whole[key][positions])
        np.testing.assert_allclose(record["activation"], whole["activation"][positions], rtol=0, atol=1e-5)
    assert workspace.metadata()["totals"]["tokens"] == sum(len(record["token_ids"]) for record in stored)


@pytest.mark.wide
def test_only_kept_rows_leave_the_device(workspace):
    done = workspace.run("--keep_tokens", "last", "--max_samples", "6")
    shapes = [line.split("compiling ")[1] for line in done.stderr.splitlines() if "compiling" in line]
    assert shapes and all("of 512 tokens, 8 of them kept: " in shape for shape in shapes)
    assert {record["activation"].shape for record in records(workspace)[0]} == {(1, 64)}


@pytest.mark.slow
def test_eight_devices_store_the_same_kinds_rows_and_answers(workspace):
    flags = (
        "--activation_type",
        "attn",
        "residual",
        "attn_heads",
        "mlp_act",
        "--include_embedding",
        "--include_answer",
        "--keep_tokens",
    )
    flags += ("every:9", "--max_samples", "3", "--max_seq_length", "1500")
    one, eight = workspace.elsewhere("one"), workspace.elsewhere("eight")
    one.run(*flags)
    eight.having(XLA_FLAGS="--xla_force_host_platform_device_count=8").run(*flags, "--model_parallel", "2")
    assert eight.metadata()["written_by"]["devices"] == 8
    for layer, stored in records(one).items():
        for ours, theirs in zip(records(eight)[layer], stored, strict=True):
            assert list(ours) == list(theirs)
            for key in ("activation", "residual", "attn_heads", "mlp_act", "answer_logprobs"):
                if key in theirs:
                    np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=2e-4)
    ours, theirs = (load_file(each.output / "stats.safetensors") for each in (eight, one))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-4 * np.abs(theirs[name]).max())


@pytest.mark.wide
def test_random_rows_are_the_same_after_a_kill(workspace, finished):
    flags = ("--keep_tokens", "random:0.3", "--skip_first", "5", "--skip_special_tokens")
    flags += ("--max_samples", "9", "--shard_size_gb", "0.0003")
    whole = workspace.elsewhere("whole")
    whole.run(*flags)
    killed = workspace.elsewhere("killed")
    killed.having(QWEN_JAX_FAILPOINT="checkpoint_local:3").run(*flags, expect=-9)
    killed.run(*flags)
    assert tree(killed.output) == tree(whole.output)
    share = [len(r["token_ids"]) / (r["token_positions"][-1] + 1) for r in records(whole)[0]]
    assert 0.2 < np.mean(share) < 0.4
    assert min(r["token_positions"][0] for r in records(whole)[0]) >= 5


@pytest.mark.parametrize("roles", ["role:answer", "role:test_input,answer"])
def test_the_role_of_answers_is_refused_where_prompts_have_none(workspace, roles):
    done = workspace.run("--keep_tokens", roles, expect=2)
    assert "prompts have no answer; pass --include_answer" in done.stderr
    assert not workspace.output.exists()


def test_a_role_that_no_prompt_has_is_no_run(workspace):
    done = workspace.run("--keep_tokens", "role:system", "--max_samples", "2", expect=65)
    assert (
        "none of its 2 lines can be used; of 2 the reason is: no token is kept by keep_tokens role:system"
        in done.stderr
    )


def test_load_shard_gives_what_pickle_gives(everything):
    for path in everything.shards():
        ours, theirs = load_shard(path), pickle.loads(gzip.decompress(path.read_bytes()))
        assert list(ours) == list(theirs)
        for layer in ours:
            for mine, other in zip(ours[layer], theirs[layer], strict=True):
                assert list(mine) == list(other)
                for key in mine:
                    np.testing.assert_array_equal(mine[key], other[key])
