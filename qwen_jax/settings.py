"""What one worker is asked to do: each setting is one entry here, from which its flag, its variable, what is recorded
of it and what a fleet passes on follow. Standard library only: a fleet's control machine may have no more."""

import os
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qwen_jax.cli import (
    FlagParser,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    seconds,
    variable_of,
)
from qwen_jax.errors import RETRY_BUDGET_S, UsageError
from qwen_jax.files import plain_path
from qwen_jax.kinds import COMPUTE_DTYPES, EMBEDDING, KEEP_ALL, KINDS, STORED_DTYPES
from qwen_jax.ledger.names import bucket_folder, checkpoint_name, local_folder

_LONGEST_ID = 9
WORKER_ID_VARIABLES = (
    "WORKER_ID",
    "JOB_COMPLETION_INDEX",
    "SKYPILOT_JOB_RANK",
    "SLURM_ARRAY_TASK_ID",
    "TPU_WORKER_ID",
)
ATTENTIONS = ("auto", "blocked", "ragged")
AUTO = "auto"
LONGEST = 0
"""As max_seq_length: that of the stream's longest prompt, up to the model's own limit."""

BYTES, HOW = "fingerprint", "settings"
"""Where metadata.json records a setting: among what the shards' bytes depend on, which no resume may change, or
among what only changes the last digits of how they are computed."""


@dataclass(frozen=True)
class Entry:
    """What is known of a setting beside its name and default.

    default: as it is shown. read: makes a value of one word. choices: of the words, found when a parser is made. many:
    takes several words.
    variable: read where the flag is absent; None is the name in capitals, "" none. recorded: BYTES, HOW or nowhere;
    key: its name there. if_set: recorded only where it is not as it is by default. local: a folder of this machine,
    which means nothing in a container.
    """

    help: str
    default: Any
    read: Callable[[str], Any] = str
    choices: Callable[[], Sequence[str]] | None = None
    many: bool = False
    variable: str | None = None
    recorded: str | None = None
    key: str | None = None
    if_set: bool = False
    local: bool = False


def _setting(default: Any, help: str, read: Callable[[str], Any] = str, **more: Any) -> Any:
    value = read(default) if isinstance(default, str) else default
    entry = Entry(help, None if default is MISSING else default, read, **more)
    return field(default=value, metadata={"entry": entry})


def _home_path(text: str) -> Path:
    return Path(text).expanduser()


def _cache_dir(text: str) -> Path:
    if "://" in text:
        raise ArgumentTypeError(
            f"{text}: compiled programs are code, and are taken from a local folder alone; give one"
        )
    return _home_path(text)


def length_or_auto(text: str) -> int:
    return LONGEST if text == AUTO else positive_int(text)


class _OrTemplate(tuple[str, ...]):
    """Names, among which a template file is, too."""

    def __contains__(self, name: object) -> bool:
        from qwen_jax.data.template import SUFFIX

        return super().__contains__(name) or str(name).endswith(SUFFIX)


def _prompt_formats() -> Sequence[str]:
    from qwen_jax.data.layouts import PROMPT_FORMATS

    return _OrTemplate(PROMPT_FORMATS)


def _overlong_policies() -> Sequence[str]:
    from qwen_jax.data.prompts import OVERLONG_POLICIES

    return OVERLONG_POLICIES


@dataclass(frozen=True, kw_only=True)
class Settings:
    """As the command line and the environment give them; what they come to on this machine is below."""

    worker_id: int = _setting(
        MISSING,
        f"worker id, 0 to N-1; without it the first that is set of {', '.join(WORKER_ID_VARIABLES)}",
        variable="",
    )
    dataset_path: Path | None = _setting(
        None, "the stream; without it this worker's file in --dataset_dir", Path, variable=""
    )
    dataset_dir: Path = _setting("./data/streams", "folder of the streams", Path, local=True)
    model_path: str = _setting(
        "Qwen/Qwen2.5-0.5B", "Hugging Face id or local folder of a dense model of a family in docs/guide.md"
    )
    revision: str | None = _setting(
        None, "branch, tag or commit of a Hugging Face model", variable="MODEL_REVISION"
    )
    adapter_path: str | None = _setting(
        None,
        "LoRA adapter of the model, merged as it is loaded: local folder, or Hugging Face ID or ID@REVISION",
    )
    output_dir: Path = _setting(
        "./activations",
        "shards go to worker_N in it; a path that ends in worker_N is taken as it is",
        Path,
        local=True,
    )
    checkpoint_dir: Path = _setting("./checkpoints", "folder of the checkpoint files", Path, local=True)
    enable_checkpointing: bool = _setting(False, "keep checkpoints; this is done anyway", variable="")
    no_checkpointing: bool = _setting(
        False, "write no checkpoint; a later start resumes from metadata.json", variable=""
    )
    force_restart: bool = _setting(False, "delete what this worker has stored and start over", variable="")
    upload_to_gcs: bool = _setting(False, "upload to the bucket")
    gcs_bucket: str | None = _setting(None, "bucket name, or file:///folder")
    gcs_prefix: str = _setting(
        "activations", "objects go to PREFIX/tpu_N in the bucket; taken as it is, # and ? too"
    )
    delete_local_after_upload: bool = _setting(False, "delete a shard here once it is safe in the bucket")
    layers_to_extract: tuple[int, ...] | None = _setting(
        None,
        "layers, from 0; without it all. Layers above the deepest are not run",
        int,
        many=True,
        recorded=BYTES,
        key="layers",
    )
    activation_type: tuple[str, ...] = _setting(
        ("residual",),
        "what to store of a layer, one or more",
        choices=lambda: tuple(KINDS),
        many=True,
        recorded=BYTES,
    )
    include_embedding: bool = _setting(
        False, "store the embedding output too, under the key embedding", recorded=BYTES
    )
    include_answer: bool = _setting(
        False, "go on with a task's test output, and store its log-probabilities", recorded=BYTES
    )
    rollout: int = _setting(
        0,
        "let the model go on with a prompt, by up to so many tokens, and store them with their log-probabilities",
        non_negative_int,
        recorded=BYTES,
        if_set=True,
    )
    rollout_temperature: float = _setting(
        0.0, "of rollouts; 0 takes the likeliest token", non_negative_float, recorded=BYTES, if_set=True
    )
    rollout_seed: int = _setting(
        0, "of rollouts with a temperature", non_negative_int, recorded=BYTES, if_set=True
    )
    keep_tokens: str = _setting(
        KEEP_ALL,
        "which tokens to store: all, last, last:K, every:K, random:P, role:NAME,NAME",
        recorded=BYTES,
    )
    skip_first: int = _setting(
        0, "never store the first so many tokens of a sample", non_negative_int, recorded=BYTES
    )
    skip_special_tokens: bool = _setting(False, "never store the tokenizer's special tokens", recorded=BYTES)
    dtype: str = _setting(
        "auto",
        "compute dtype; auto is bfloat16 on TPU and GPU, float32 on a CPU",
        choices=lambda: (AUTO, *COMPUTE_DTYPES),
        recorded=BYTES,
        key="compute_dtype",
    )
    activation_dtype: str = _setting(
        "auto",
        "stored dtype; auto is the compute dtype; int8 and float8_e4m3fn take a byte a value, and a scale a token",
        choices=lambda: (AUTO, *STORED_DTYPES),
        recorded=BYTES,
    )
    attention: str = _setting(
        "auto",
        "blocked is exact, everywhere; ragged is the vendor's TPU kernel, for bfloat16; auto takes that where it can",
        choices=lambda: ATTENTIONS,
        recorded=HOW,
    )
    batch_size: int = _setting(
        4,
        "tokens per device and step, in units of 2,048, of max_seq_length where that is smaller, of 256 on a CPU",
        positive_int,
        recorded=HOW,
    )
    model_parallel: int = _setting(
        1,
        "chips that share one copy of the weights, for a model that does not fit one",
        positive_int,
        recorded=HOW,
    )
    max_seq_length: int = _setting(
        2048, "longest prompt in tokens; auto is the stream's longest", length_or_auto, recorded=BYTES
    )
    shard_size_gb: float = _setting(
        1.0,
        "a shard closes when its raw activations reach this many times 2**30 bytes",
        positive_float,
        recorded=BYTES,
    )
    prompt_format: str = _setting(
        "rows",
        "how a task becomes text; or a template of yours, NAME.jinja",
        choices=_prompt_formats,
        recorded=BYTES,
    )
    chat_template: bool = _setting(False, "wrap prompts in the model's chat template", recorded=BYTES)
    overlong: str = _setting(
        "drop_examples", "what to do with long prompts", choices=_overlong_policies, recorded=BYTES
    )
    max_samples: int | None = _setting(
        None, "stream lines to process; without it all", positive_int, recorded=BYTES
    )
    max_bad_records: int = _setting(100, "bad lines to skip before the run stops", non_negative_int)
    compilation_cache_dir: Path = _setting(
        "~/.cache/qwen_jax/xla",
        "compiled programs; a local folder that only this user can write",
        _cache_dir,
        local=True,
    )
    gcs_retry_budget_s: float = _setting(
        RETRY_BUDGET_S, "seconds that one operation of the bucket may go on failing", seconds
    )
    progress_interval_s: float = _setting(60.0, "seconds between progress records; 0 writes none", seconds)

    @property
    def stream_path(self) -> Path:
        from qwen_jax.data.streams import stream_name

        return self.dataset_path or self.dataset_dir / stream_name(self.worker_id)

    @property
    def worker_dir(self) -> Path:
        return worker_folder(self.output_dir, self.worker_id)

    @property
    def checkpoint_name(self) -> str:
        return checkpoint_name(self.worker_id)

    @property
    def checkpoint_path(self) -> Path | None:
        """None where no checkpoint is kept here."""
        return None if self.no_checkpointing else self.checkpoint_dir / self.checkpoint_name

    @cached_property
    def bucket_url(self) -> str | None:
        """None where nothing is uploaded."""
        if not self.upload_to_gcs or self.gcs_bucket is None:
            return None
        return bucket_url(self.gcs_bucket, self.gcs_prefix, self.worker_id)

    @property
    def taps(self) -> tuple[str, ...]:
        """What is captured, the kinds first (kinds.py)."""
        return (*self.activation_type, *([EMBEDDING] if self.include_embedding else []))

    @property
    def scores_answers(self) -> bool:
        """Whether log-probabilities are wanted, which take the model's head."""
        return self.include_answer or self.rollout > 0

    @property
    def keeps_all_tokens(self) -> bool:
        return self.keep_tokens == KEEP_ALL and not self.skip_first and not self.skip_special_tokens

    @property
    def shard_bytes(self) -> int:
        """Raw activation bytes at which a shard closes; a GB is 2**30 bytes."""
        return int(self.shard_size_gb * 2**30)


ENTRIES: dict[str, Entry] = {each.name: each.metadata["entry"] for each in fields(Settings)}


def add_settings(parser: FlagParser) -> None:
    """parser: one that reads every flag's variable (`env_for_all`)."""
    for name, entry in ENTRIES.items():
        if entry.default is False:
            parser.switch(name, entry.help, env=entry.variable)
            continue
        more: dict[str, Any] = {"type": entry.read}
        if entry.choices:
            more["choices"] = entry.choices()
        if entry.many:
            more["nargs"] = "+"
        default = list(entry.default) if isinstance(entry.default, tuple) else entry.default
        parser.flag(name, entry.help, env=entry.variable, default=default, **more)


def take_settings(args: dict[str, Any]) -> Settings:
    """Takes the worker's flags out of parsed arguments; raises UsageError for what does not fit together."""
    values = {name: args.pop(name) for name in ENTRIES}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    values["worker_id"] = resolve_worker_id(values["worker_id"], os.environ)
    settings = Settings(**values)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    if settings.upload_to_gcs and not settings.gcs_bucket:
        raise UsageError("--upload_to_gcs needs a bucket: pass --gcs_bucket NAME or set GCS_BUCKET")
    if settings.upload_to_gcs and settings.gcs_bucket:
        _check_folder(settings.gcs_bucket)
    if settings.delete_local_after_upload and not settings.upload_to_gcs:
        raise UsageError("--delete_local_after_upload needs --upload_to_gcs")
    if settings.enable_checkpointing and settings.no_checkpointing:
        raise UsageError("--enable_checkpointing and --no_checkpointing exclude each other")
    kinds = settings.activation_type
    if len(set(kinds)) != len(kinds):
        raise UsageError(f"--activation_type names a kind twice: {' '.join(kinds)}")
    _check_selection(settings)
    _check_rollout(settings)
    for name in ("stream_path", "model_path", "adapter_path"):
        _check_name(str(getattr(settings, name)))
    _ = settings.bucket_url  # complains of what cannot be a bucket's name


def _check_folder(bucket: str) -> None:
    """A folder that stands in for a bucket is there, as a bucket must be: it may be one that is not mounted."""
    if bucket.startswith("file:///") and not Path(plain_path(bucket)).is_dir():
        raise UsageError(f"--gcs_bucket {bucket}: there is no such folder; make it, or mount it")


def _check_name(name: str) -> None:
    """metadata.json holds it."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name}: the name is not UTF-8; rename it, or link to it") from error


def _check_rollout(settings: Settings) -> None:
    if settings.rollout and settings.include_answer:
        raise UsageError("--rollout and --include_answer exclude each other: one answer can follow a prompt")
    if settings.rollout >= settings.max_seq_length > 0:
        raise UsageError(
            f"--rollout {settings.rollout} leaves no room for a prompt in --max_seq_length {settings.max_seq_length}"
        )


def _check_selection(settings: Settings) -> None:
    """Complains about what cannot be read before jax is loaded."""
    from qwen_jax.data.selection import TokenSelection
    from qwen_jax.roles import ANSWER, ROLLOUT, role_name

    names = TokenSelection(settings.keep_tokens).role_names
    if role_name(ROLLOUT) in names and not settings.rollout:
        raise UsageError(
            f"--keep_tokens {settings.keep_tokens}: prompts have no rollout; pass --rollout N, or leave that role out"
        )
    if role_name(ANSWER) in names and not settings.include_answer:
        raise UsageError(
            f"--keep_tokens {settings.keep_tokens}: prompts have no answer; pass --include_answer, or leave that "
            "role out"
        )


def recorded(settings: Settings, where: str) -> dict[str, Any]:
    """What metadata.json says of the settings, as JSON values. where: BYTES or HOW."""
    values = {name: getattr(settings, name) for name, _ in _keys(where)}
    return {
        key: _to_json(values[name])
        for name, key in _keys(where)
        if not ENTRIES[name].if_set or values[name] != ENTRIES[name].default
    }


def recalled(stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The reverse: the fields of Settings; raises KeyError and TypeError for what is not there."""
    return {
        name: _from_json(stored[key], ENTRIES[name])
        for name, key in _keys(where)
        if not ENTRIES[name].if_set or key in stored
    }


def _keys(where: str) -> Iterator[tuple[str, str]]:
    return ((name, entry.key or name) for name, entry in ENTRIES.items() if entry.recorded == where)


def _to_json(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    return " ".join(value) if all(isinstance(each, str) for each in value) else list(value)


def _from_json(value: Any, entry: Entry) -> Any:
    if not entry.many or value is None:
        return value
    return tuple(value.split()) if isinstance(value, str) else tuple(value)


def variables(*, local: bool) -> list[str]:
    """The variables of all settings that are read from one; local: of folders of this machine, or of the others."""
    named = (
        (variable_of(name) if entry.variable is None else entry.variable, entry)
        for name, entry in ENTRIES.items()
    )
    return [variable for variable, entry in named if variable and entry.local == local]


def resolve_worker_id(flag: str | None, environment: MutableMapping[str, str]) -> int:
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
    name = local_folder(worker_id)
    return output_dir if output_dir.name == name else output_dir / name


def bucket_url(bucket: str, prefix: str, worker_id: int) -> str:
    """Where a worker's objects go: `gs://BUCKET/PREFIX/tpu_N`, or a local folder given as file://...

    The prefix is a name, in which `#`, `?` and `%` mean themselves. Raises UsageError for one that cannot be.
    """
    root, below = bucket if "://" in bucket else f"gs://{bucket}", prefix.strip("/")
    from qwen_jax.storage.opening import check_store_url

    check_store_url(f"gs://any/{below}")  # what a bucket refuses must not lead out of a folder either
    if root.startswith("file://"):
        below = quote(below)
    url = "/".join([root.rstrip("/"), *([below] if below else []), bucket_folder(worker_id)])
    check_store_url(url)
    return url
