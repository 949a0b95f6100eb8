"""What the settings come to: model, layers, stream and the identity of the run that they define."""

import hashlib
import logging
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import cast

from jax.sharding import AbstractMesh, Mesh

from qwen_jax.data.layouts import PROMPT_FORMATS
from qwen_jax.data.prompts import load_tokenizer
from qwen_jax.data.steps import StepShape, step_tokens
from qwen_jax.data.streams import StreamSummary, read_stream, stream_summary
from qwen_jax.errors import ConfigError, UsageError
from qwen_jax.kinds import ALL_KINDS, EMBEDDING, KINDS, STORED_DTYPES
from qwen_jax.ledger.metadata import RunIdentity
from qwen_jax.ledger.schema import UPLOADED_TO
from qwen_jax.model.attention import make_form, resolve_attention
from qwen_jax.model.config import ModelConfig, read_config
from qwen_jax.model.program import Program, resolve_dtype
from qwen_jax.model.sharding import check_split, make_mesh
from qwen_jax.model.source import ModelSource, fetch_adapter, fetch_model
from qwen_jax.model.weights import Checkpoint, open_checkpoint
from qwen_jax.run.devices import find_devices
from qwen_jax.run.fingerprint import Fingerprint, files_digest
from qwen_jax.run.sample_reader import PromptMaker
from qwen_jax.run.written_by import written_by
from qwen_jax.settings import BYTES, HOW, LONGEST, Settings, recorded

log = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Outline:
    """What the settings come to on any machine, before weights and devices are looked at."""

    settings: Settings
    source: ModelSource
    config: ModelConfig
    stream: StreamSummary
    layers: tuple[int, ...]
    dtype: str
    activation_dtype: str

    @property
    def bytes_per_token(self) -> int:
        """Raw bytes of activations that a kept token gives."""
        stored = STORED_DTYPES[self.activation_dtype]
        return sum(
            (1 if kind == EMBEDDING else len(self.layers)) * stored.row_bytes(width, self.dtype)
            for kind, width in self.widths.items()
        )

    @property
    def widths(self) -> dict[str, int]:
        """Values of a row, by kind."""
        return {kind: ALL_KINDS[kind].width(self.config.dims) for kind in self.settings.taps}

    @property
    def lines(self) -> int:
        """Stream lines that this run deals with."""
        limit = self.settings.max_samples
        return self.stream.lines if limit is None else min(limit, self.stream.lines)

    @property
    def layers_run(self) -> int:
        """Layers that are loaded and run: up to the deepest one asked for, but log-probabilities take all."""
        return self.config.num_layers if self.settings.scores_answers else self.layers[-1] + 1

    def program(self, mesh: Mesh | AbstractMesh, platform: str) -> Program[StepShape]:
        """The step of this run on the devices of `mesh`; ConfigError for an attention that they do not have."""
        settings, rows = self.settings, mesh.shape["data"]
        name = resolve_attention(settings.attention, self.dtype, platform)
        tokens = step_tokens(settings.batch_size, settings.max_seq_length, platform == "cpu")
        form = make_form(name, platform, tokens, settings.max_seq_length)
        return Program(
            config=self.config,
            num_layers=self.layers_run,
            layers=self.layers,
            taps=settings.taps,
            dtype=self.dtype,
            stored_dtype=self.activation_dtype,
            mesh=cast(Mesh, mesh),  # to lower a program no device need be there
            shape=StepShape.of(tokens, settings.max_seq_length, rows, form.page),
            form=form,
            with_answers=settings.scores_answers,
            rollout=settings.rollout,
        )


@dataclass(frozen=True)
class Job(Outline):
    """An outline on this machine, its checkpoint opened."""

    checkpoint: Checkpoint
    step: Program[StepShape]
    adapter: ModelSource | None = None

    @property
    def resolved(self) -> Settings:
        """The settings with what `auto` and `all` mean here."""
        return replace(
            self.settings,
            layers_to_extract=self.layers,
            dtype=self.dtype,
            activation_dtype=self.activation_dtype,
            attention=self.step.form.name,
        )


def outline(settings: Settings, weights: bool = True) -> Outline:
    """Reads the stream's digest and the model's config, and checks the settings against them.

    weights: whether a model of the hub is fetched with them.
    """
    stream = stream_summary(settings.stream_path)
    source = fetch_model(settings.model_path, settings.revision, weights)
    config = read_config(source.folder)
    if settings.max_seq_length == LONGEST:
        settings = replace(settings, max_seq_length=longest_prompt(settings, stream, source.folder, config))
    if settings.max_seq_length > config.max_positions:
        raise ConfigError(
            f"--max_seq_length {settings.max_seq_length} is beyond the {config.max_positions} positions that "
            "the model knows"
        )
    check_split(config, settings.model_parallel)
    dtype = resolve_dtype(settings.dtype)
    activation_dtype = dtype if settings.activation_dtype == "auto" else settings.activation_dtype
    layers = choose_layers(settings.layers_to_extract, config.num_layers)
    return Outline(settings, source, config, stream, layers, dtype, activation_dtype)


def longest_prompt(settings: Settings, stream: StreamSummary, folder: Path, config: ModelConfig) -> int:
    """Tokens of the longest prompt of the lines that the run deals with, at most those that the model knows; tokenises
    them all, and says so."""
    log.info("looking for the longest prompt of %s", settings.stream_path)
    settings = replace(settings, max_seq_length=config.max_positions)
    make_prompt = PromptMaker(settings, load_tokenizer(str(folder)), stream.sha256)
    records = islice(read_stream(settings.stream_path, 0, stream), settings.max_samples)
    longest = settings.rollout + max((made.full_length for made in make_prompt.many(records)), default=1)
    found = min(max(longest, 1), config.max_positions)
    log.info("max_seq_length is %d", found)
    return found


def prepare(settings: Settings) -> Job:
    """The outline, the checkpoint's headers and this machine's devices; checks every setting against them."""
    devices = find_devices()
    mesh = make_mesh(settings.model_parallel)
    planned = outline(settings)
    step = planned.program(mesh, devices[0].platform)
    adapter = None if settings.adapter_path is None else fetch_adapter(settings.adapter_path)
    checkpoint = open_checkpoint(planned.source.folder, None if adapter is None else adapter.folder)
    return Job(**vars(planned), checkpoint=checkpoint, step=step, adapter=adapter)


def choose_layers(wanted: tuple[int, ...] | None, num_layers: int) -> tuple[int, ...]:
    """The layers in ascending order; None is all. Raises UsageError naming the range."""
    if wanted is None:
        return tuple(range(num_layers))
    outside = [layer for layer in wanted if not 0 <= layer < num_layers]
    if outside:
        raise UsageError(
            f"--layers_to_extract: this model has layers 0 to {num_layers - 1}, "
            f"got {' '.join(map(str, outside))}"
        )
    if len(set(wanted)) != len(wanted):
        raise UsageError(f"--layers_to_extract names a layer twice: {' '.join(map(str, wanted))}")
    return tuple(sorted(wanted))


def identify(job: Job) -> RunIdentity:
    """The fingerprint and the descriptive header that every commit of this run carries.

    settings: those that may change on a resume; the others are in the fingerprint.
    """
    settings = job.settings
    fingerprint = make_fingerprint(job)
    header = {
        "model": {
            "name": settings.model_path,
            "revision": job.source.revision,
            "weights_digest": fingerprint["weights_digest"],
            "hidden_size": job.config.hidden_size,
            "num_layers": job.config.num_layers,
            **_adapter_words(job.adapter),
        },
        "dataset": {
            "path": str(settings.stream_path),
            "sha256": job.stream.sha256,
            "lines": job.stream.lines,
        },
        "activation_type": settings.activation_type[0],
        "activation_types": list(settings.activation_type),
        "layers": list(job.layers),
        "widths": job.widths,
        "layer_meaning": KINDS[settings.activation_type[0]].meaning,
        "layer_meanings": {tap: ALL_KINDS[tap].meaning for tap in settings.taps},
        "compute_dtype": job.dtype,
        "activation_dtype": job.activation_dtype,
        UPLOADED_TO: settings.bucket_url,
        "written_by": written_by(list(job.step.mesh.devices.flat), settings.compilation_cache_dir),
        "settings": recorded(job.resolved, HOW) | {"tokens_per_step": job.step.shape.tokens},
    }
    return RunIdentity(
        settings.worker_id, str(settings.stream_path), settings.model_path, fingerprint, header
    )


def _adapter_words(adapter: ModelSource | None) -> dict[str, str]:
    return {} if adapter is None else {"adapter": adapter.name, "adapter_revision": adapter.revision}


def make_fingerprint(job: Job) -> Fingerprint:
    """Everything that the bytes of the shards depend on, but for how it is computed (the settings of the header)."""
    folder = job.source.folder
    weights = files_digest(folder, ("config.json",)) + job.checkpoint.digest()
    return {
        "stream_sha256": job.stream.sha256,
        "weights_digest": hashlib.sha256(weights.encode()).hexdigest(),
        "tokenizer_digest": files_digest(folder, _TOKENIZER_FILES),
        **recorded(job.resolved, BYTES),
        **_template_digest(job.settings.prompt_format),
    }


def _template_digest(prompt_format: str) -> dict[str, str]:
    """Of a prompt format that is a file."""
    path = Path(prompt_format).expanduser()
    if prompt_format in PROMPT_FORMATS:
        return {}
    return {"template_digest": files_digest(path.parent, (path.name,))}
