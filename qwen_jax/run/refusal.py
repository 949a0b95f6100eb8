"""What a worker refuses before jax is imported, with a progress record, so that the fleet's watchers see it."""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from qwen_jax.cli import FlagParser, parse_bool
from qwen_jax.errors import ToolkitError, UsageError
from qwen_jax.settings import Settings, bucket_url, resolve_worker_id, take_settings, worker_folder

log = logging.getLogger(__name__)


class WorkerParser(FlagParser):
    """Writes a record of a start whose flags or variables are wrong, where these at least say where."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self._given = list(args or [])
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        _record(self._word, UsageError(message))
        super().error(message)

    def _word(self, name: str) -> Any:
        """What stands behind a flag, True where that is nothing; else its variable's word, else its default."""
        for word, following in zip(self._given, [*self._given[1:], "--"], strict=True):
            flag, equals, value = word.partition("=")
            if flag.startswith("--") and flag[2:].replace("-", "_") == name:
                return value if equals else following.startswith("--") or following
        variables = {action.dest: variable for action, variable in self._env_flags}
        return os.environ.get(variables.get(name, "")) or self.get_default(name)


def accept(args: dict[str, Any]) -> Settings:
    """Takes the settings of a worker that may start out of parsed arguments.

    Raises the first ToolkitError of what can be seen without jax and the network, and logs the others.
    """
    from qwen_jax.run.doctor import examine  # not before main runs, where Ctrl-C ends with a word and 130

    words = dict(args)
    try:
        settings = take_settings(args)
    except UsageError as error:
        _record(words.__getitem__, error)
        raise
    refusals = [finding.error for finding in examine(settings, quick=True) if finding.error is not None]
    for refusal in refusals[1:]:
        log.error("%s", refusal)
    if refusals:
        _record(words.__getitem__, refusals[0])
        raise refusals[0]
    return settings


def _record(word: Callable[[str], Any], error: ToolkitError) -> None:
    """Where worker and folders are known, and something was to be done. word: what was given for a flag, by name."""
    if _is_on(word("dry_run")) or word("progress_interval_s") in (0.0, "0"):
        return
    from qwen_jax.run.record_writer import RecordPlaces, record_refusal

    with suppress(UsageError):
        worker = resolve_worker_id(word("worker_id"), dict(os.environ))
        checkpoints = None if _is_on(word("no_checkpointing")) else Path(word("checkpoint_dir"))
        url = None
        if _is_on(word("upload_to_gcs")) and word("gcs_bucket"):
            url = bucket_url(word("gcs_bucket"), word("gcs_prefix"), worker)
        output = worker_folder(Path(word("output_dir")), worker)
        record_refusal(RecordPlaces(worker, output, checkpoints, url), error)


def _is_on(word: Any) -> bool:
    with suppress(ValueError):
        return parse_bool(str(word))
    return True  # somebody meant something by it
