"""Workers as SkyPilot's managed jobs: what the sky command is asked."""

from collections.abc import Mapping
from pathlib import Path

from qwen_jax.fleet.worker_variables import PLACES, SECRETS, bucket_name, settings_of

TASK = Path("deploy") / "skypilot" / "worker.yaml"


def commands(
    num_workers: int, workers: tuple[int, ...] | None, environment: Mapping[str, str]
) -> list[list[str]]:
    """One command for workers 0 to N-1, whose rank is their id; one each for chosen workers."""
    settings = settings_of(environment, without=(*PLACES, *SECRETS))
    settings["GCS_BUCKET"] = bucket_name(environment)
    values = [part for name, value in settings.items() for part in ("--env", f"{name}={value}")]
    # By its name alone: sky takes the value from the environment.
    values += [part for name in SECRETS if environment.get(name) for part in ("--secret", name)]

    def launch(name: str, *options: str) -> list[str]:
        return [
            "sky",
            "jobs",
            "launch",
            "--name",
            name,
            "--yes",
            "--detach-run",
            *options,
            *values,
            str(TASK),
        ]

    if workers is None:
        return [launch("extraction", "--num-jobs", str(num_workers))]
    return [launch(f"extraction-{worker}", "--env", f"WORKER_ID={worker}") for worker in workers]
