"""One worker, from its settings to a completed run."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from threading import Event

import jax.numpy as jnp
from tqdm.contrib.logging import logging_redirect_tqdm

from qwen_jax.data.prompts import SkippedSample, load_tokenizer, most_prompt_bytes
from qwen_jax.data.steps import lay_into_steps
from qwen_jax.errors import BadDataError
from qwen_jax.ledger.metadata import Ledger
from qwen_jax.ledger.schema import COMPLETED
from qwen_jax.model.capture import Capture, Compilation
from qwen_jax.model.weights import load_model
from qwen_jax.prefetch import prefetch
from qwen_jax.run.background import BackgroundCommitter
from qwen_jax.run.cache import use_cache
from qwen_jax.run.commit import Committer
from qwen_jax.run.device_check import checked
from qwen_jax.run.devices import device_errors
from qwen_jax.run.exclusive import exclusive
from qwen_jax.run.failpoints import arm
from qwen_jax.run.job import Job, identify, prepare
from qwen_jax.run.memory import activation_bytes_bound, prompt_memory_bound, reuse_freed_memory
from qwen_jax.run.pipeline import CapturedSample, captured_samples, filled_shards
from qwen_jax.run.places import Places
from qwen_jax.run.preemption import watch_for_notice
from qwen_jax.run.progress_bar import Progress
from qwen_jax.run.record_writer import ProgressWriter, record_writer
from qwen_jax.run.resume import take_up
from qwen_jax.run.rollout import prompt_maker
from qwen_jax.run.sample_reader import SampleReader
from qwen_jax.run.shutdown import raise_if
from qwen_jax.run.stages import Stages, timed
from qwen_jax.run.written_by import differences
from qwen_jax.settings import Settings
from qwen_jax.storage.opening import open_store

log = logging.getLogger(__name__)


def extract(settings: Settings, stop: Event) -> Ledger:
    """Runs one worker to the end of its stream and returns what is then durable.

    Raises a ToolkitError (its exit_code says which) and leaves everything consistent; the next call with
    the same settings resumes. `stop` set from another thread ends it with TerminatedError.
    """
    arm(os.environ)
    watch_for_notice()
    if settings.gcs_bucket and not settings.upload_to_gcs:
        log.warning("nothing is uploaded to %s: that takes --upload_to_gcs too", settings.gcs_bucket)
    reuse_freed_memory()
    # The lock comes first: a second start must touch neither the device nor the record of the one that runs.
    with record_writer(settings) as records, exclusive(settings), device_errors():
        records.begin()
        job = prepare(settings)
        committer = open_committer(job, stop)
        if committer.ledger.status != COMPLETED:
            run(job, committer, stop, records)
    return committer.ledger


def open_committer(job: Job, stop: Event) -> Committer:
    """Finds where to go on, and brings the places to one state."""
    settings = job.settings
    places = open_places(settings, stop)
    identity = identify(job)
    committer, resumed = take_up(
        identity,
        places,
        job.layers,
        force_restart=settings.force_restart,
        delete_local_after_upload=settings.delete_local_after_upload,
        stop=stop,
    )
    _report_start(job, places, committer.ledger, resumed.is_new)
    if committer.ledger.status != COMPLETED:
        _report_changes(resumed.settings, identity.header["settings"])
        writer = identity.header["written_by"]
        if not resumed.is_new:
            _report_writer(resumed.written_by, writer)
        committer.describe(written_by=checked(job, writer, resumed.written_by))
    return committer


def open_places(settings: Settings, stop: Event) -> Places:
    """Makes the local folders and opens the bucket."""
    store = None
    if settings.bucket_url:
        store = open_store(settings.bucket_url, stop=stop, budget_s=settings.gcs_retry_budget_s)
    places = Places(settings.worker_dir, settings.checkpoint_path, settings.checkpoint_name, store)
    places.remove_leftovers()
    return places


def run(job: Job, committer: Committer, stop: Event, records: ProgressWriter) -> None:
    """Extracts from the first sample that is not yet durable to the end of the stream."""
    settings = job.settings
    first = committer.ledger.next_sample_idx
    tokenizer = load_tokenizer(str(job.source.folder))
    capture = load_capture(job)
    make_prompt = prompt_maker(job, tokenizer, capture)
    reader = SampleReader(settings, make_prompt, first, committer.ledger.bad_records, job.stream)
    _report_memory(job, most_prompt_bytes(tokenizer, settings.max_seq_length))
    shape, stages = job.step.shape, Stages()
    log.debug(
        "a step: %d rows of %d tokens, %d positions carried",
        shape.rows,
        shape.tokens,
        settings.max_seq_length,
    )
    steps = stages.each("prompts", prefetch(lay_into_steps(reader, shape), depth=1))
    samples = stages.each("prompts and the device", captured_samples(steps, capture))
    with (
        BackgroundCommitter(committer, stop) as background,
        logging_redirect_tqdm(),
        Progress(
            first, job.lines, lambda: len(committer.ledger.shards), lambda: background.backlog
        ) as progress,
    ):
        records.follow(partial(progress.record, settings.worker_id))
        for shard in filled_shards(_watched(samples, progress, stop), settings.shard_bytes, reader):
            with stages.waiting_for("shards"):
                background.add(shard)
            progress.shard()
        with stages.waiting_for("shards"):
            background.wait()
        log.debug("waited for: %s", stages)
        progress.finish()
        skipped = reader.take_skipped()
        if skipped and not committer.ledger.samples_written:
            raise _nothing_to_store(job, skipped)
        committer.complete(job.lines, skipped)


def _nothing_to_store(job: Job, skipped: list[SkippedSample]) -> BadDataError:
    reasons = Counter(sample.reason for sample in skipped).most_common(1)
    return BadDataError(
        f"{job.settings.stream_path}: nothing was stored, since none of its {job.lines:,} lines can be used; "
        f"of {reasons[0][1]:,} the reason is: {reasons[0][0]}; nothing is marked as done"
    )


def _watched(samples: Iterator[CapturedSample], progress: Progress, stop: Event) -> Iterator[CapturedSample]:
    """Passes samples on; shows progress; ends the run once `stop` is set."""
    for sample in samples:
        raise_if(stop)
        progress.sample(sample.sample_idx, len(sample.tokenized.token_ids), sample.nbytes)
        yield sample


def load_capture(job: Job) -> Capture:
    """Loads the weights up to the deepest layer, each device its part, and returns the capture step.

    Where all tokens are kept there is one program, which is compiled meanwhile.
    Log-probabilities of answers need all layers and the LM head.
    """
    settings = job.settings
    use_cache(settings.compilation_cache_dir)
    compilation = Compilation(job.step)
    if settings.keeps_all_tokens:
        compilation.begin()
    log.info("loading %d of %d layers in %s", job.layers_run, job.config.num_layers, job.dtype)
    with timed("loading the weights"):
        model = load_model(
            job.checkpoint,
            job.config,
            job.layers_run,
            jnp.dtype(job.dtype),
            job.step.mesh,
            settings.scores_answers,
        )
    return Capture(compilation, model)


def _report_memory(job: Job, most_bytes: int) -> None:
    """most_bytes: of a prompt."""
    bound = activation_bytes_bound(job.step.shape, job.bytes_per_token, job.settings.shard_bytes)
    log.info(
        "activations take at most %.1f GB of host memory, prompts while they are made %.1f GB (docs/performance.md)",
        bound / 1e9,
        prompt_memory_bound(most_bytes) / 1e9,
    )


def _report_changes(before: dict, now: dict) -> None:
    """Names settings that may change on a resume, but then change the last places of later samples."""
    changed = [
        f"{name} was {before[name]}, is {now[name]}"
        for name in now
        if before.get(name, now[name]) != now[name]
    ]
    if changed:
        log.warning(
            "%s: samples from here on agree with an undisturbed run within the dtype's precision, not bit for bit",
            "; ".join(changed),
        )


def _report_writer(before: dict, now: dict) -> None:
    """Names versions and devices that differ on a resume."""
    changed = differences(before, now) if before else ["they are not recorded"]
    if changed:
        log.warning(
            "the run so far had other versions or devices (%s): the bits of shards from here on may differ from an "
            "undisturbed run's",
            "; ".join(changed),
        )


def _report_start(job: Job, places: Places, ledger: Ledger, is_new: bool) -> None:
    worker = job.settings.worker_id
    if ledger.status == COMPLETED:
        log.info("worker %d has completed its stream already; nothing to do", worker)
    elif is_new:
        log.info("worker %d: %d samples from %s to %s", worker, job.lines, job.settings.stream_path, places)
    else:
        log.info(
            "worker %d resumes at sample %d of %d (%d shards are done)",
            worker,
            ledger.next_sample_idx,
            job.lines,
            len(ledger.shards),
        )
