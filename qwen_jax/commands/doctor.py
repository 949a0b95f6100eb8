"""Whether a worker would run on this machine: one line a check, `pass`, `note` or `fail` with what to do. Takes the
worker's flags and variables. launch_worker.sh runs `doctor --quick` first, which leaves a progress record of a failure.

Exit code 0 when nothing fails, else that of the first failure, as a worker would end.

  python -m qwen_jax doctor --worker_id 0
  GCS_BUCKET=your-bucket UPLOAD_TO_GCS=true python -m qwen_jax doctor --worker_id 0
"""

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from qwen_jax.cli import FlagParser, parse_bool
from qwen_jax.errors import UsageError
from qwen_jax.settings import (
    Settings,
    add_settings,
    bucket_url,
    resolve_worker_id,
    take_settings,
    worker_folder,
)

ENV_FOR_ALL = True
_RETRY_S = "20"
_PLACES = (
    *("worker_id", "output_dir", "checkpoint_dir", "no_checkpointing"),
    *("upload_to_gcs", "gcs_bucket", "gcs_prefix", "quick", "dry_run"),
)
"""Flags that say where a record goes, and whether one is left."""


class Parser(FlagParser):
    """Leaves word of a start whose flags or variables are wrong, where these at least say where."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self._given = list(args or [])
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        _leave_word({name: self._word(name) for name in _PLACES}, dict(os.environ), message)
        super().error(message)

    def _word(self, name: str) -> Any:
        """What stands behind a flag, True where that is nothing; else its variable's word, else its default."""
        for word, following in zip(self._given, [*self._given[1:], "--"], strict=True):
            flag, equals, value = word.partition("=")
            if flag.startswith("--") and flag[2:].replace("-", "_") == name:
                return value if equals else following.startswith("--") or following
        variables = {action.dest: variable for action, variable in self._env_flags}
        return os.environ.get(variables.get(name, "")) or self.get_default(name)


def add_flags(parser: FlagParser) -> None:
    parser.switch("quick", "only what needs neither jax nor the network, and say only what is wrong", env="")
    add_settings(parser)
    parser.switch("dry_run", "the worker's; changes nothing here", env="")
    parser.switch("verbose", "the worker's; changes nothing here", env="")


def run(args: Namespace) -> int:
    values, words, environment = vars(args), dict(vars(args)), dict(os.environ)
    quick, is_dry = values.pop("quick"), values.pop("dry_run")
    try:
        settings = _settings(values)
    except UsageError as error:
        _leave_word(words, environment, str(error))
        raise
    from qwen_jax.run.doctor import FAIL, PASS, Finding, examine
    from qwen_jax.run.progress_record import RecordPlaces, leave_failure

    failed: Finding | None = None
    for finding in examine(settings, quick=quick):
        if not quick or finding.outcome != PASS:
            print(finding, flush=True)
        if finding.outcome == FAIL:
            failed = failed or finding
    if failed is None:
        return 0
    if quick and not is_dry:
        leave_failure(RecordPlaces.of(settings), failed.text, failed.exit_code)
    return failed.exit_code


def _settings(values: dict[str, Any]) -> Settings:
    """The worker's, with what it would refuse at its start refused here; raises UsageError."""
    values.pop("verbose")
    settings = take_settings(values)
    from qwen_jax.run.progress_record import record_interval

    record_interval(os.environ)
    os.environ.setdefault("GCS_RETRY_BUDGET_S", _RETRY_S)  # a worker waits longer
    return settings


def _leave_word(words: Mapping[str, Any], environment: dict[str, str], message: str) -> None:
    """A record of a usage error, where worker and folders are known; of quick checks only."""
    if not _is_on(words["quick"]) or _is_on(words["dry_run"]):
        return
    from qwen_jax.run.progress_record import RecordPlaces, leave_failure

    with suppress(UsageError):
        worker = resolve_worker_id(words["worker_id"], environment)
        checkpoints = None if _is_on(words["no_checkpointing"]) else Path(words["checkpoint_dir"])
        url = None
        if _is_on(words["upload_to_gcs"]) and words["gcs_bucket"]:
            url = bucket_url(words["gcs_bucket"], words["gcs_prefix"], worker)
        output = worker_folder(Path(words["output_dir"]), worker)
        os.environ.setdefault("GCS_RETRY_BUDGET_S", _RETRY_S)
        leave_failure(RecordPlaces(worker, output, checkpoints, url), message, UsageError.exit_code)


def _is_on(word: Any) -> bool:
    with suppress(ValueError):
        return parse_bool(str(word))
    return True  # somebody meant something by it
