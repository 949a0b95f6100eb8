"""Commands of docs/guide.md that need no hub, run as they stand, one after the other, and what they leave."""

import json
import os
import re
import shlex
import sys
from collections import Counter

import numpy as np
import pytest

import create_dataset_streams
from qwen_jax.__main__ import main
from qwen_jax.reading import iter_samples
from qwen_jax.roles import ROLLOUT
from tests.model.test_adapter import adapter_tensors, save_adapter
from tests.run_worker.starts import ROOT, Start

pytestmark = pytest.mark.wide  # five starts of a worker, each with a program of its own
GUIDE = (ROOT / "docs" / "guide.md").read_text()
COMMANDS = [
    line for line in re.findall(r"^python (\w+\.py .+)$", GUIDE, re.MULTILINE) if "data/views" in line
]
COMMANDS += [
    line for line in re.findall(r"^python (\w+\.py .+)$", GUIDE, re.MULTILINE) if "data/texts" in line
]
TEMPLATE = re.search(r"```jinja\n(.+?)```", GUIDE, re.DOTALL).group(1)
VIEWS = re.search(
    r"## Views of a task.+?```python\n(.+?)```", (ROOT / "docs" / "reading.md").read_text(), re.DOTALL
).group(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all commands have run."""
    folder, here = tmp_path_factory.mktemp("guide"), os.getcwd()
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "my_texts").mkdir()
    (folder / "my_texts" / "license.txt").write_text((ROOT / "LICENSE").read_text())
    (folder / "my_format.jinja").write_text(TEMPLATE)
    from tests.hf_reference import load_reference

    save_adapter(folder / "my_adapter", adapter_tensors(load_reference(ROOT / "examples" / "demo" / "model")))
    os.chdir(folder)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "COMPILATION_CACHE_DIR": str(folder / "cache")}
    assert len(COMMANDS) == 5
    for command in COMMANDS:
        script, *flags = shlex.split(command)
        if script == "create_dataset_streams.py":
            create_dataset_streams.main(flags)
            continue
        flags = [str(folder / flag) if (folder / flag).exists() else flag for flag in flags]
        flags += [
            "--output_dir",
            str(folder / "activations"),
            "--checkpoint_dir",
            str(folder / "checkpoints"),
        ]
        log = folder / "log"
        assert Start([sys.executable, script, *flags], environment, log).wait() == 0, log.read_text()
    yield folder
    os.chdir(here)


def metadata(folder, worker: int) -> dict:
    return json.loads((folder / "activations" / f"worker_{worker}" / "metadata.json").read_text())


def test_views_of_a_task_are_compared_cell_by_cell(folder, capsys):
    scope: dict = {}
    exec(VIEWS, scope)
    views = scope["views"]
    assert [len(rows) for rows in views.values()] == [2] * 4  # of four views two are in each of two streams
    for first, second in views.values():
        assert first.keys() == second.keys() and len(first) > 20
        assert all(row.shape == (64,) for row in first.values())
    notes = Counter("augmentation" in sample for sample in iter_samples("activations/worker_0", layers=[1]))
    assert notes == {False: 4, True: 4}
    assert main(["inspect", "activations/worker_0", "--sample", "1"]) == 0
    assert '\naugmentation: {"symmetry":' in capsys.readouterr().out


def test_a_template_the_longest_prompt_and_a_transcoders_kinds(folder):
    recorded = metadata(folder, 0)
    lengths = [len(sample["token_ids"]) for sample in iter_samples("activations/worker_0", layers=[1])]
    assert recorded["fingerprint"]["max_seq_length"] == max(lengths)
    assert recorded["fingerprint"]["prompt_format"].endswith("my_format.jinja")
    assert len(recorded["fingerprint"]["template_digest"]) == 64
    assert recorded["activation_types"] == ["mlp_in", "mlp"] and recorded["totals"]["shortened"] == 0
    first = next(iter_samples("activations/worker_0", layers=[1], kind="mlp"))
    assert "becomes" in first["text_preview"] and "Example" not in first["text_preview"]


def test_only_what_the_model_said_is_kept(folder):
    samples = list(iter_samples("activations/worker_2", layers=[3]))
    assert len(samples) == 3
    for sample in samples:
        assert set(sample["token_roles"].tolist()) == {ROLLOUT} and 0 < len(sample["token_ids"]) <= 8
        assert (sample["answer_logprobs"] <= 0).all() and sample["solved"] == 0


def test_pieces_cover_a_text_and_an_adapter_changes_what_is_stored(folder):
    samples = list(iter_samples("activations/worker_1", layers=[3]))
    places = [json.loads(sample["piece"]) for sample in samples]
    text = (ROOT / "LICENSE").read_text()
    assert places[0]["start"] == 0 and places[-1]["stop"] == len(text) and len(places) == places[0]["of"] > 3
    recorded = metadata(folder, 1)
    assert recorded["model"]["adapter"].endswith("my_adapter") and recorded["model"]["adapter_revision"] == ""
    assert recorded["totals"]["truncated"] == 0
    assert np.isfinite(samples[0]["activations"][3]).all()
