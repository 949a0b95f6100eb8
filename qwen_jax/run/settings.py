"""What one worker is asked to do, as the command line and the environment say it."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from qwen_jax.errors import UsageError
from qwen_jax.storage.opening import check_place

_LONGEST_ID = 9
WORKER_ID_VARIABLES = ("WORKER_ID", "JOB_COMPLETION_INDEX", "SKYPILOT_JOB_RANK", "TPU_WORKER_ID")


@dataclass(frozen=True)
class Settings:
    """One field a flag of extract_activations.py; its --help says what each means."""

    worker_id: int
    dataset_path: Path
    model_path: str
    revision: str | None
    output_dir: Path
    checkpoint_dir: Path
    checkpointing: bool
    force_restart: bool
    bucket_url: str | None
    delete_local_after_upload: bool
    layers_to_extract: tuple[int, ...] | None
    activation_types: tuple[str, ...]
    include_embedding: bool
    include_answer: bool
    keep_tokens: str
    skip_first: int
    skip_special_tokens: bool
    dtype: str
    activation_dtype: str
    attention: str
    batch_size: int
    model_parallel: int
    max_seq_length: int
    shard_size_gb: float
    prompt_format: str
    chat_template: bool
    overlong: str
    max_samples: int | None
    max_bad_records: int
    compilation_cache_dir: Path

    @property
    def taps(self) -> tuple[str, ...]:
        """What is captured, the kinds first (model.qwen2.TAPS)."""
        return (*self.activation_types, *(["embedding"] if self.include_embedding else []))

    @property
    def shard_bytes(self) -> int:
        """Raw activation bytes at which a shard closes; a GB is 2**30 bytes."""
        return int(self.shard_size_gb * 2**30)

    @property
    def checkpoint_name(self) -> str:
        return f"checkpoint_worker_{self.worker_id}.json"


def resolve_worker_id(flag: str | None, environment: dict[str, str]) -> int:
    """The id from the flag, else from the first variable that is set; raises UsageError when there is none.

    Takes TPU_WORKER_ID out of `environment`: libtpu would read it as this host's rank in a pod slice and
    wait for the other hosts. Call it before jax is imported.
    """
    candidates = [("--worker_id", flag)]
    candidates += [(name, environment.get(name)) for name in WORKER_ID_VARIABLES]
    environment.pop("TPU_WORKER_ID", None)
    for source, text in candidates:
        if text:
            if not (text.isascii() and text.isdigit()):
                raise UsageError(f"{source} must be a whole number from 0 on, got {text!r}")
            if len(text.lstrip("0")) > _LONGEST_ID:
                raise UsageError(f"{source} may have {_LONGEST_ID} digits, got {len(text)}")
            return int(text)
    raise UsageError(
        f"no worker id: pass --worker_id N or set one of {', '.join(WORKER_ID_VARIABLES)}; "
        "every worker needs an id of its own"
    )


def worker_folder(output_dir: Path, worker_id: int) -> Path:
    """`output_dir/worker_N`, so that workers never share a folder; a path that ends so is taken as it is."""
    name = f"worker_{worker_id}"
    return output_dir if output_dir.name == name else output_dir / name


def bucket_url(bucket: str, prefix: str, worker_id: int) -> str:
    """Where a worker's objects go: `gs://BUCKET/PREFIX/tpu_N`, or a local folder given as file://...

    The prefix is a name, in which `#`, `?` and `%` mean themselves. Raises UsageError for one that cannot be.
    """
    root, below = bucket if "://" in bucket else f"gs://{bucket}", prefix.strip("/")
    check_place(f"gs://any/{below}")  # what a bucket refuses must not lead out of a folder either
    if root.startswith("file://"):
        below = quote(below)
    url = "/".join([root.rstrip("/"), *([below] if below else []), f"tpu_{worker_id}"])
    check_place(url)
    return url
