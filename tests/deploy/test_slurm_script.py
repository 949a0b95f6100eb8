"""deploy/slurm/worker.sbatch asks for what it needs and fits the exit codes; tests/fleet/test_slurm.py runs it."""

import re

from qwen_jax.errors import StorageError
from qwen_jax.fleet.slurm import TASK
from qwen_jax.fleet.supervise import FINAL_EXITS
from qwen_jax.run.shutdown import GRACE_S
from tests.scripts.conftest import ROOT

TEXT = (ROOT / TASK).read_text()
OPTIONS = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", TEXT, re.M))


def test_it_goes_on_where_it_was():
    assert "requeue" in OPTIONS and OPTIONS["open-mode"] == "append"
    assert OPTIONS["output"] == "logs/worker_%a.log"


def test_sigterm_comes_in_time_before_the_limit():
    """To the script alone, which passes it on; Slurm may be a minute late."""
    signal, seconds = OPTIONS["signal"].split("@")
    assert signal == "B:TERM" and int(seconds) > 60 + GRACE_S


def test_what_starting_again_does_not_help_is_held():
    held = re.search(r"^([\d |]+)\) again=requeuehold", TEXT, re.M)
    assert held and tuple(map(int, held[1].split(" | "))) == FINAL_EXITS
    assert f"\n{StorageError.exit_code}) again=requeue ;;" in TEXT
