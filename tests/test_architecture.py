"""The import arrows of docs/architecture.md, read off the code, and what a script may import to answer --help."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"ledger", "model", "data", "shards", "storage", "run", "reading", "fleet"}
ALLOWED = {package: {package} for package in PACKAGES} | {
    "shards": {"shards", "ledger"},
    "storage": {"storage", "ledger"},
    "run": PACKAGES - {"reading", "fleet"},
    "reading": PACKAGES - {"run", "fleet"},
    "fleet": {"fleet", "storage", "data", "ledger"},
}
WITHOUT_JAX = ("ledger", "data", "shards", "storage", "fleet")


def imported_modules(file: Path) -> set[str]:
    """Every module that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> list[Path]:
    return sorted((ROOT / "qwen_jax").rglob("*.py"))


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downwards_only(file):
    package = file.relative_to(ROOT / "qwen_jax").parts[0]
    if package not in PACKAGES:
        return
    for name in imported_modules(file):
        parts = name.split(".")
        if parts[0] == "qwen_jax" and len(parts) > 1 and parts[1] in PACKAGES:
            assert parts[1] in ALLOWED[package], f"{package} must not import {name}"
        if package in WITHOUT_JAX:
            assert parts[0] not in ("jax", "flax"), f"{package} must not import {name}"


def test_the_ledger_needs_the_standard_library_alone():
    """The fleet reads it on a bare machine."""
    ours = {"qwen_jax.errors", "qwen_jax.kinds"}
    for file in (ROOT / "qwen_jax" / "ledger").glob("*.py"):
        for name in imported_modules(file):
            is_ours = name.startswith("qwen_jax.ledger") or name.rpartition(".")[0] in ours
            is_ours = is_ours or name == "qwen_jax.__version__"
            assert is_ours or name.split(".")[0] in sys.stdlib_module_names, (file.name, name)


def test_accelerators_need_the_standard_library_alone():
    """A fleet's control machine reads it, and so does every room."""
    for name in imported_modules(ROOT / "qwen_jax" / "accelerators.py"):
        assert name.startswith("qwen_jax.errors") or name.split(".")[0] in sys.stdlib_module_names, name


NAMES = {
    "metadata.json": "ledger/names.py",
    "progress.json": "ledger/names.py",
    "checkpoint_worker_": "ledger/names.py",
    "progress_worker_": "ledger/names.py",
    "pkl.gz": "ledger/names.py",
    "in_progress": "ledger/schema.py",
    "completed": "ledger/schema.py",
}


@cache
def texts_in(file: Path) -> set[str]:
    constants = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant))
    return {node.value for node in constants if isinstance(node.value, str)}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_what_a_worker_leaves_is_spelled_in_one_place(name):
    """In code that uses it: words for people, and a glob over many, may say it too."""

    def is_spelled(file: Path) -> bool:
        return any(name in text and " " not in text for text in texts_in(file))

    found = [str(file.relative_to(ROOT / "qwen_jax")) for file in modules() if is_spelled(file)]
    assert found == [NAMES[name]]


def test_the_product_never_imports_torch():
    """But for the reference that certify uses where torch is there, and what a torch trainer imports by its name."""
    files = [*modules(), *ROOT.glob("*.py")]
    for file in files:
        assert "qwen_jax.reading.torch" not in {name.rpartition(".")[0] for name in imported_modules(file)}, (
            file
        )
        if file.name in ("hugging_face.py", "torch.py"):
            continue
        assert not any(name.split(".")[0] == "torch" for name in imported_modules(file)), file


@pytest.mark.parametrize(
    "script", ["create_dataset_streams.py", "convert_hf_to_arc_format.py", "extract_activations.py"]
)
def test_help_answers_without_heavy_imports(script):
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'jax', 'flax', 'datasets', 'transformers', 'torch', 'google.cloud.storage'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "default" in done.stdout


def test_top_level_holds_only_what_the_design_names():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in tracked.splitlines()}
    allowed = {
        *("create_dataset_streams.py", "convert_hf_to_arc_format.py", "extract_activations.py"),
        *("launch_worker.sh", "launch_all_workers.sh", "check_all_workers.sh"),
        *("qwen_jax", "tests", "deploy", "examples", "benchmarks", "docs"),
        *("requirements.txt", "README.md", "pyproject.toml"),
        *("LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"),
    }
    assert {name for name in top if not name.startswith(".")} <= allowed
