"""inspect says what is there: runs, shards, kinds, and samples token by token."""

import shutil

import numpy as np
import pytest

from qwen_jax.__main__ import main
from qwen_jax.errors import UsageError
from qwen_jax.reading import iter_samples
from tests.reading.conftest import extract


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A run that stores all that can be stored."""
    flags = ("--activation_type", "residual", "mlp", "--include_embedding", "--include_answer")
    return extract(tmp_path_factory.mktemp("all"), *flags, "--layers_to_extract", "2", "--max_samples", "4")


def shown(capsys, *arguments) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_inspect_shows_the_run_and_a_sample(clean, capsys):
    assert main(["inspect", str(clean)]) == 0
    shown = capsys.readouterr().out
    assert "worker 0, completed" in shown and "layers   1, 3 of 4: residual" in shown
    assert "36 stored, 0 skipped" in shown
    assert main(["inspect", str(clean), "--sample", "3", "--layer", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sample = next(each for each in iter_samples(clean, [3]) if each["sample_idx"] == 3)
    assert len(lines) == 2 + len(sample["token_ids"])
    cell = next(n for n, cell in enumerate(sample["token_cells"]) if cell[0] >= 0)
    words = lines[2 + cell].split()
    assert words[2] == f"'{words[7]}'" and words[3:7] == ["example_1_input", "0", "0", "0"]
    assert float(words[8]) == pytest.approx(np.linalg.norm(sample["activations"][3][cell]), rel=1e-3)
    with pytest.raises(UsageError, match="sample 99 is in no shard"):
        main(["inspect", str(clean), "--sample", "99"])


def test_a_shard_and_what_is_known_of_it(clean, everything, capsys, tmp_path):
    said = shown(capsys, clean / "shard_0002.pkl.gz")
    assert "examples/demo/model, revision local folder" in said and "layers   1, 3: residual" in said
    assert "float32, width 64" in said and "12, 12 to 23; 6,486 tokens; 0.003 GB" in said
    said = shown(capsys, everything / "shard_0001.pkl.gz")
    assert "layers   2: residual, mlp, embedding" in said
    lone = shutil.copy(clean / "shard_0002.pkl.gz", tmp_path)
    said = shown(capsys, lone)
    assert "not known: there is no metadata.json" in said and "layers   1, 3: activation" in said


def test_all_that_a_run_stores(everything, capsys):
    assert "2 of 4: residual, mlp, embedding, log-probabilities of answers" in shown(capsys, everything)


def test_several_workers_together(clean, copy, tmp_path, capsys):
    copy.metadata(lambda metadata: metadata.update(worker_id=1))
    copy.folder.rename(tmp_path / "worker_1")
    (tmp_path / "worker_0").symlink_to(clean)
    said = shown(capsys, tmp_path).partition("together: 2 workers")[2]
    tokens = 2 * sum(len(sample["token_ids"]) for sample in iter_samples(clean))
    assert f"{tokens:,} kept" in said and "72 stored" in said and "in 8 shards" in said


@pytest.mark.parametrize("flags, layer, kind", [((), 2, None), (("--kind", "mlp"), 2, "mlp")])
def test_a_sample_of_a_kind(everything, capsys, flags, layer, kind):
    lines = shown(capsys, everything, "--sample", 1, *flags).splitlines()
    sample = next(each for each in iter_samples(everything, [layer], kind) if each["sample_idx"] == 1)
    norms = np.linalg.norm(sample["activations"][layer], axis=1)
    assert [float(line.split()[-1]) for line in lines[2:-1]] == pytest.approx(norms.tolist(), rel=1e-3)
    logprobs = sample["answer_logprobs"]
    assert lines[-1] == f"answer: {len(logprobs)} tokens, log-probability {logprobs.sum():.4g} together"


def test_the_embedding_of_a_sample(everything, capsys):
    lines = shown(capsys, everything, "--sample", 1, "--layer", "embedding").splitlines()
    assert "layer embedding" in lines[0]
    sample = next(each for each in iter_samples(everything, ["embedding"]) if each["sample_idx"] == 1)
    norms = np.linalg.norm(sample["activations"]["embedding"], axis=1)
    assert float(lines[2].split()[-1]) == pytest.approx(norms[0], rel=1e-3)


def test_a_sample_of_a_shard_alone(clean, capsys):
    assert "sample 13, " in shown(capsys, clean / "shard_0002.pkl.gz", "--sample", 13)


def test_a_folder_in_the_place_of_metadata_is_none(copy, capsys):
    (copy.folder / "metadata.json").unlink()
    (copy.folder / "metadata.json").mkdir()
    assert main(["inspect", str(copy.folder)]) == 0 and "shard_0001" in capsys.readouterr().out
