"""The worker's flags: what extract_activations.py takes, and `python -m qwen_jax plan` with it."""

import os
from pathlib import Path
from typing import Any

from qwen_jax.cli import FlagParser, non_negative_int, positive_float, positive_int
from qwen_jax.data.layouts import PROMPT_FORMATS
from qwen_jax.data.prompts import OVERLONG_POLICIES
from qwen_jax.data.selection import TokenSelection
from qwen_jax.data.streams import stream_name
from qwen_jax.errors import UsageError
from qwen_jax.roles import ANSWER, role_name
from qwen_jax.run.settings import WORKER_ID_VARIABLES, Settings, bucket_url, resolve_worker_id, worker_folder

TAPS = ("residual", "attn", "mlp")
ATTENTIONS = ("auto", "blocked", "ragged")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_worker_flags(parser: FlagParser) -> None:
    """parser: one that reads every flag's variable (`env_for_all`)."""
    flag, switch = parser.flag, parser.switch
    ids = ", ".join(WORKER_ID_VARIABLES)
    flag("worker_id", f"worker id, 0 to N-1; without it the first that is set of {ids}", env="")
    flag("dataset_path", "stream file; without it this worker's file in dataset_dir", env="")
    flag("dataset_dir", "folder of stream files", default="./data/streams")
    flag("model_path", "Hugging Face id or local folder", default="Qwen/Qwen2.5-0.5B")
    flag("revision", "branch, tag or commit of a Hugging Face model", env="MODEL_REVISION")
    flag("output_dir", "shards go to worker_N in it", default="./activations")
    flag("checkpoint_dir", "folder of checkpoint files", default="./checkpoints")
    switch("enable_checkpointing", "keep checkpoints, as is done anyway", env="")
    switch("no_checkpointing", "write no checkpoint; a later start resumes from metadata.json", env="")
    switch("force_restart", "delete what this worker has stored, and start over", env="")
    switch("upload_to_gcs", "upload to the bucket")
    flag("gcs_bucket", "bucket name, or file:///folder to stand in for a bucket")
    flag("gcs_prefix", "objects go to PREFIX/tpu_N in the bucket", default="activations")
    switch("delete_local_after_upload", "keep shards in the bucket only")
    flag("layers_to_extract", "layers, 0-based; without it all of them", nargs="+", type=int)
    flag(
        "activation_type",
        "what to store of a layer, one or more",
        default=["residual"],
        nargs="+",
        choices=TAPS,
    )
    switch("include_embedding", 'store the embedding output too, under the key "embedding"')
    switch("include_answer", "go on with a task's test output; store its tokens' log-probabilities")
    flag("keep_tokens", "all, last, last:K, every:K, random:P, role:NAME,NAME", default="all")
    flag("skip_first", "never keep the first K tokens of a sample", default=0, type=non_negative_int)
    switch("skip_special_tokens", "never keep the tokenizer's special tokens")
    flag("dtype", "compute dtype; auto: bfloat16 on TPU and GPU", default="auto", choices=DTYPES[:3])
    flag("activation_dtype", "stored dtype; auto: the compute dtype", default="auto", choices=DTYPES)
    flag(
        "attention",
        "auto: the ragged kernel in bfloat16 on TPU, else blocked",
        default="auto",
        choices=ATTENTIONS,
    )
    flag(
        "batch_size",
        "tokens per device and step, in units of 2,048 (on a CPU 256)",
        default=4,
        type=positive_int,
    )
    flag("model_parallel", "chips that share one copy of the weights", default=1, type=positive_int)
    flag("max_seq_length", "longest prompt in tokens", default=2048, type=positive_int)
    flag("shard_size_gb", "raw 2**30 bytes at which a shard closes", default=1.0, type=positive_float)
    flag("prompt_format", "how a task becomes text", default="rows", choices=tuple(PROMPT_FORMATS))
    switch("chat_template", "wrap prompts in the model's chat template")
    flag("overlong", "prompts beyond max_seq_length", default="drop_examples", choices=OVERLONG_POLICIES)
    flag("max_samples", "stream lines to process; without it all of them", type=positive_int)
    flag("max_bad_records", "bad lines to skip before giving up", default=100, type=non_negative_int)
    flag("compilation_cache_dir", "compiled programs, for the next start", default="~/.cache/qwen_jax/xla")


def to_settings(args: dict[str, Any]) -> Settings:
    """The parsed worker flags, and no others, as Settings; raises UsageError for what does not fit together."""
    worker_id = resolve_worker_id(args.pop("worker_id"), os.environ)
    upload = args.pop("upload_to_gcs")
    bucket, prefix = args.pop("gcs_bucket"), args.pop("gcs_prefix")
    if upload and not bucket:
        raise UsageError("--upload_to_gcs needs a bucket: pass --gcs_bucket NAME or set GCS_BUCKET")
    if args["delete_local_after_upload"] and not upload:
        raise UsageError("--delete_local_after_upload needs --upload_to_gcs")
    no_checkpointing = args.pop("no_checkpointing")
    if args.pop("enable_checkpointing") and no_checkpointing:
        raise UsageError("--enable_checkpointing and --no_checkpointing exclude each other")
    dataset_dir, layers = Path(args.pop("dataset_dir")), args.pop("layers_to_extract")
    kinds = tuple(args.pop("activation_type"))
    if len(set(kinds)) != len(kinds):
        raise UsageError(f"--activation_type names a kind twice: {' '.join(kinds)}")
    selection = TokenSelection(
        args["keep_tokens"]
    )  # complains about what it cannot read, before jax is loaded
    if role_name(ANSWER) in selection.role_names and not args["include_answer"]:
        raise UsageError(
            f"--keep_tokens {selection.keep_tokens}: prompts have no answer; pass --include_answer, or leave that "
            "role out"
        )
    return Settings(
        activation_types=kinds,
        worker_id=worker_id,
        dataset_path=Path(args.pop("dataset_path") or dataset_dir / stream_name(worker_id)),
        output_dir=worker_folder(Path(args.pop("output_dir")), worker_id),
        checkpoint_dir=Path(args.pop("checkpoint_dir")),
        checkpointing=not no_checkpointing,
        bucket_url=bucket_url(bucket, prefix, worker_id) if upload else None,
        layers_to_extract=tuple(layers) if layers else None,
        compilation_cache_dir=Path(args.pop("compilation_cache_dir")).expanduser(),
        **args,
    )
