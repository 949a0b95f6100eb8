import os

import pytest

# Before jax, transformers or google-cloud-storage are imported: one CPU device, no hub, no real bucket.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PROGRESS_INTERVAL_S"] = "0"  # records come at their own time; tests/fleet turns them on
for name in ("TPU_WORKER_ID", "WORKER_ID", "GCS_BUCKET", "UPLOAD_TO_GCS", "STORAGE_EMULATOR_HOST"):
    os.environ.pop(name, None)


LONG = (
    *(
        "tpu/test_compiled.py",
        "fleet/test_slurm.py",
        "simulation/test_simulation.py",
        "run_worker/test_torture.py",
    ),
    *("run_worker/test_memory.py", "reading/test_hostile_files.py", "scripts/test_launch_all.py"),
)
"""Files of which each keeps a process busy for a minute: begun last, they would leave the others idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not str(item.path).endswith(LONG))
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(0))
