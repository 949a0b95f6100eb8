"""A run's settings, read back from its metadata.json: to compute some of its samples again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_jax.errors import ConfigError
from qwen_jax.run.devices import find_devices
from qwen_jax.run.fingerprint import check_fingerprint
from qwen_jax.run.job import Job, make_fingerprint, prepare
from qwen_jax.run.settings import Settings


def recorded_settings(
    metadata: dict[str, Any], model_path: str | None, dataset_path: str | None, output_dir: Path
) -> Settings:
    """The settings of the run that wrote `metadata`; paths as given, else as they were then.

    Raises ConfigError where they are not all recorded.
    """
    try:
        fingerprint, settings, model = metadata["fingerprint"], metadata["settings"], metadata["model"]
        return Settings(
            worker_id=metadata["worker_id"],
            dataset_path=Path(dataset_path or metadata["dataset"]["path"]),
            model_path=model_path or model["name"],
            revision=None if model_path else model["revision"],
            output_dir=output_dir,
            checkpoint_dir=output_dir,
            checkpointing=False,
            force_restart=False,
            bucket_url=None,
            delete_local_after_upload=False,
            layers_to_extract=tuple(fingerprint["layers"]),
            activation_types=tuple(fingerprint["activation_type"].split()),
            include_embedding=fingerprint["include_embedding"],
            include_answer=fingerprint["include_answer"],
            keep_tokens=fingerprint["keep_tokens"],
            skip_first=fingerprint["skip_first"],
            skip_special_tokens=fingerprint["skip_special_tokens"],
            dtype=fingerprint["compute_dtype"],
            activation_dtype=fingerprint["activation_dtype"],
            attention=settings["attention"],
            batch_size=settings["batch_size"],
            model_parallel=settings["model_parallel"],
            max_seq_length=fingerprint["max_seq_length"],
            shard_size_gb=fingerprint["shard_size_gb"],
            prompt_format=fingerprint["prompt_format"],
            chat_template=fingerprint["chat_template"],
            overlong=fingerprint["overlong"],
            max_samples=fingerprint["max_samples"],
            max_bad_records=len(metadata["skipped"]),
            compilation_cache_dir=Path("~/.cache/qwen_jax/xla").expanduser(),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"metadata.json does not record {error}; it was written by another version of the toolkit"
        ) from error


def recorded_job(
    metadata: dict[str, Any], model_path: str | None, dataset_path: str | None, output_dir: Path
) -> Job:
    """The same run once more, for the same bytes: model, stream and tokenizer are those of `metadata`, and this
    machine can compute as the run did, or ConfigError says what differs."""
    return _job(metadata, recorded_settings(metadata, model_path, dataset_path, output_dir))


def reference_job(
    metadata: dict[str, Any], model_path: str | None, dataset_path: str | None, output_dir: Path
) -> Job:
    """The same samples once more, on any machine, for a float32 reference that is exact however it is computed.

    So no fused kernel, and the weights are shared over several devices only where this machine has as many.
    Raises ConfigError where model, stream or tokenizer are not those of `metadata`.
    """
    settings = recorded_settings(metadata, model_path, dataset_path, output_dir)
    parts = 1 if len(find_devices()) % settings.model_parallel else settings.model_parallel
    return _job(metadata, replace(settings, attention="blocked", model_parallel=parts))


def _job(metadata: dict[str, Any], settings: Settings) -> Job:
    job = prepare(settings)
    check_fingerprint(metadata["fingerprint"], make_fingerprint(job), "metadata.json")
    return job
