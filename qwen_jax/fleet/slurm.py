"""Workers as one Slurm job array: what sbatch is asked. Slurm keeps them going as deploy/slurm/worker.sbatch says."""

from collections.abc import Mapping, Sequence
from pathlib import Path

TASK = Path("deploy") / "slurm" / "worker.sbatch"


def command(
    num_workers: int,
    workers: Sequence[int] | None,
    environment: Mapping[str, str],
    *,
    at_once: int | None = None,
    flags: Sequence[str] = (),
) -> list[str]:
    """sbatch for workers 0 to N-1, or for chosen ones. It hands its own environment on to them, secrets too, which so
    stand in no list of processes. at_once: of them that may run. flags: further words for sbatch."""
    tasks = f"0-{num_workers - 1}" if workers is None else ",".join(map(str, workers))
    limit = f"%{at_once}" if at_once else ""
    upload = ",UPLOAD_TO_GCS=true" if environment.get("GCS_BUCKET") else ""
    return ["sbatch", f"--array={tasks}{limit}", f"--export=ALL{upload}", *flags, str(TASK)]
