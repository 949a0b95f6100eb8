"""docs/ says what the code says: flags, variables, defaults, exit codes, modules, links."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from qwen_jax import errors
from qwen_jax.cli import variable_of
from qwen_jax.settings import ENTRIES
from tests.scripts.conftest import ROOT, launch_worker_variables

SCRIPTS = ("extract_activations.py", "create_dataset_streams.py", "convert_hf_to_arc_format.py")
COMMANDS = {"launch_all_workers.sh": "launch", "check_all_workers.sh": "workers"}
PAGES = {**dict.fromkeys(SCRIPTS, "guide.md"), **dict.fromkeys(COMMANDS, "fleet.md")}
SHELL_FLAGS = {"--demo", "--setup"}
# Lines of docs/fleet.md that call other people's programs or are handed to them, whose flags are theirs.
FOREIGN = re.compile(
    r"^(`?(\w+=\$\()?(gcloud|git|docker|kubectl|sky|sbatch|srun) |export GCLOUD_)(\\\n|.)*$|(?<=_flags)='[^']*'",
    re.M,
)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")
# `--name` ... [default: X, variable: Y], as FlagParser writes each flag of --help.
HELP_ENTRY = re.compile(r"^ {2}--(\w+)(.*?)(?=^ {2}-|\Z)", re.M | re.S)


@cache
def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


@cache
def script_flags(script: str) -> dict[str, tuple[str, str]]:
    """Flag -> (variable, default) as --help shows them; "" where there is none."""
    wide = os.environ | {"COLUMNS": "1000"}  # argparse breaks lines at hyphens
    call = [script] if script in SCRIPTS else ["-m", "qwen_jax", COMMANDS.get(script, script)]
    command = [sys.executable, *call, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=wide, capture_output=True, text=True)
    found = {}
    for name, text in HELP_ENTRY.findall(done.stdout):
        notes = " ".join(text.split()).rpartition("[")[2]
        variable = re.search(r"variable: (\w+)", notes)
        default = re.search(r"default: ([^],]+)", notes)
        found[f"--{name}"] = (variable[1] if variable else "", default[1] if default else "required")
    return found


def section(heading: str) -> str:
    """The text below a heading, up to the next one."""
    text = page(PAGES.get(heading, "guide.md"))
    return re.split(r"^#+ ", text.partition(f"\n### {heading}\n")[2], maxsplit=1, flags=re.M)[0]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of each table row, without backticks."""
    for line in text.splitlines():
        if line.startswith("| `"):
            yield [cell.strip().replace("`", "") for cell in line.strip("| ").split(" | ")]


def table_flags(script: str) -> dict[str, tuple[str, str]]:
    lines = [re.sub(r"\| \|", "|  |", line) for line in section(script).splitlines()]
    return {flag: (variable, default) for flag, variable, default, *_ in rows("\n".join(lines))}


@pytest.mark.parametrize("script", PAGES)
def test_every_flag_with_its_variable_and_default(script):
    wanted = script_flags(script)
    assert len(wanted) > 5
    found = table_flags(script)
    assert found == wanted


def settings_table() -> str:
    """The rows of the guide's table that are settings."""
    lines = []
    for name, entry in ENTRIES.items():
        variable = variable_of(name) if entry.variable is None else entry.variable
        default = "off" if entry.default is False else entry.default
        shown = " ".join(default) if isinstance(default, tuple) else default
        cells = ["none" if shown is None else str(shown) if shown == "off" else f"`{shown}`"]
        cells = [f"`--{name}`", f"`{variable}`" if variable else "", *cells, entry.help]
        choices = f" ({', '.join(entry.choices())})" if entry.choices else ""
        lines.append(f"| {' | '.join(cells)}{choices} |".replace("|  |", "| |"))
    return "\n".join(lines)


def test_the_guides_table_is_what_the_settings_say():
    """A new row is the line that this test wants."""
    wanted = settings_table()
    assert [line for line in wanted.splitlines() if line not in section("extract_activations.py")] == []


def test_no_flag_that_does_not_exist():
    known = SHELL_FLAGS.union(*(script_flags(script) for script in PAGES))
    assert set(FLAG.findall(page("guide.md"))) - known == set()
    known |= script_flags("plan").keys() | {"--streams", "--self"}  # of verify and certify
    assert set(FLAG.findall(FOREIGN.sub("", page("fleet.md")))) - known == set()


def test_every_exit_code():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    wanted = {kind.exit_code for kind in kinds if issubclass(kind, errors.ToolkitError)}
    wanted -= {errors.ToolkitError.exit_code}
    codes = page("guide.md").partition("\n## Exit codes\n")[2].partition("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", codes, re.M)} == wanted | {0}


def test_every_variable_of_the_shell_scripts():
    text = (ROOT / "launch_worker.sh").read_text()
    documented = {name: default for name, _, default, *_ in rows(section("Variables without a flag"))}
    assert launch_worker_variables() <= documented.keys()
    defaults = re.findall(r"^(\w+)=\$\{\1:-(.*?)\}$", text, re.M)
    assert defaults and all(documented[variable] == default for variable, default in defaults)


@pytest.mark.parametrize(
    "name",
    sorted(path.relative_to(ROOT) for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]),
    ids=str,
)
def test_links_lead_somewhere(name):
    file = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
        path, _, anchor = target.partition("#")
        linked = (file.parent / path) if path else file
        assert linked.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{name} links to {target}"


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
