"""Makes single shards of a run again, exactly as they were."""

import logging
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from qwen_jax.data.steps import lay_into_steps
from qwen_jax.errors import ConfigError, UsageError
from qwen_jax.run.devices import device_errors
from qwen_jax.run.exclusive import exclusive_folders
from qwen_jax.run.job import Job
from qwen_jax.run.pipeline import CapturedSample, captured_samples
from qwen_jax.run.recorded import recorded_job
from qwen_jax.run.rollout import prompt_maker
from qwen_jax.run.sample_reader import SampleReader
from qwen_jax.run.worker import load_capture
from qwen_jax.run.written_by import in_words, written_by
from qwen_jax.shards import write_shard
from qwen_jax.storage.atomic import AtomicFile

log = logging.getLogger(__name__)


def repair(
    folder: Path,
    metadata: dict[str, Any],
    shards: Sequence[str],
    model_path: str | None = None,
    dataset_path: str | None = None,
    adapter_path: str | None = None,
) -> None:
    """Extracts `shards` of the run in a worker's local `folder` again and puts them in their places.

    Only their samples are computed. On the same kind of machine their bytes are the recorded ones; where they are not,
    the place is left as it is. The metadata is not changed.
    model_path, dataset_path, adapter_path: where model, stream and adapter lie now, if not where the run had them.

    Raises ConfigError where model, stream or tokenizer differ from those of the run, and, when all has been tried,
    where bytes do; WriterConflictError while a worker uses the folder; UsageError for a shard that the run does not
    have.
    """
    entries = {entry["filename"]: entry for entry in metadata["shards"]}
    unknown = [name for name in shards if name not in entries]
    if unknown:
        raise UsageError(f"{folder}/metadata.json lists no {', '.join(unknown)}; nothing to repair there")
    job = recorded_job(metadata, model_path, dataset_path, adapter_path)
    with exclusive_folders([folder], job.settings.worker_id), device_errors():
        maker = _Extraction(job)
        failed = [name for name in shards if not maker.replace(folder / name, entries[name])]
    if failed:
        then, now = metadata.get("written_by", {}), written_by(list(job.step.mesh.devices.flat))
        raise ConfigError(
            f"{folder}: this machine computes other bytes of {', '.join(failed)} than the run did (their last places "
            f"depend on the processor and on versions; the run was written by {in_words(then)}; here is "
            f"{in_words(now)}); repair them on a machine like the run's, or restart the worker with --force_restart"
        )


class _Extraction:
    """Computes chosen samples of a run."""

    def __init__(self, job: Job):
        from qwen_jax.data.prompts import load_tokenizer

        self._job = job
        tokenizer = load_tokenizer(str(job.source.folder))
        self._capture = load_capture(job)
        self._make_prompt = prompt_maker(job, tokenizer, self._capture)

    def replace(self, path: Path, entry: dict[str, Any]) -> bool:
        """Puts the shard in its place if its bytes are the recorded ones; says whether they are."""
        log.info("extracting samples %d to %d again", entry["first_sample_idx"], entry["last_sample_idx"])
        samples = [sample.for_shard() for sample in self._samples(entry)]
        file = AtomicFile(path)
        try:
            write_shard(file, self._job.layers, samples)
        except BaseException:
            file.discard()
            raise
        same = (file.size, file.crc32c) == (entry["bytes"], entry["crc32c"])
        (file.finish if same else file.discard)()
        return same

    def _samples(self, entry: dict[str, Any]) -> list[CapturedSample]:
        settings, first = self._job.settings, entry["first_sample_idx"]
        reader = SampleReader(settings, self._make_prompt, first, bad_before=0, stream=self._job.stream)
        wanted = takewhile(lambda sample: sample.sample_idx <= entry["last_sample_idx"], reader)
        return list(captured_samples(lay_into_steps(wanted, self._job.step.shape), self._capture))
