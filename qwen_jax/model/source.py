"""Where a model comes from: a local folder, or the Hugging Face Hub."""

from dataclasses import dataclass
from pathlib import Path

from qwen_jax.errors import ConfigError, StorageError, first_line
from qwen_jax.model.adapter import CONFIG_NAME, TENSORS_NAME

_SMALL_FILES = ("config.json", "tokenizer*", "chat_template*", "vocab.json", "merges.txt")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_ADAPTER = (CONFIG_NAME, TENSORS_NAME)
# The same weights once more, in their makers' own layout.
_NOT_WANTED = ("consolidated*", "original/*")


@dataclass(frozen=True)
class ModelSource:
    """name: what the user asked for; revision: the hub's commit, "" for a local folder."""

    name: str
    revision: str
    folder: Path


def fetch_model(model_path: str, revision: str | None = None, weights: bool = True) -> ModelSource:
    """Returns a local folder as it is, else downloads the hub's files (once, into the hub's own cache).

    weights: False for the configuration and the tokenizer only.

    Raises ConfigError for a folder, id or revision that does not exist, StorageError when the hub cannot
    be reached and the files are not in its cache.
    """
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        if revision:
            raise ConfigError(f"--revision {revision} is for hub models, but {model_path} is a local folder")
        return ModelSource(model_path, "", folder)
    if model_path.startswith((".", "/", "~")):
        raise ConfigError(f"--model_path {model_path}: no such folder; give a checkpoint folder or a hub id")
    snapshot = _download(model_path, revision, _SMALL_FILES + (_WEIGHTS if weights else ()))
    return ModelSource(model_path, snapshot.name, snapshot)


def fetch_adapter(adapter_path: str) -> ModelSource:
    """As fetch_model, of an adapter: a local folder, or `ID` or `ID@REVISION` of the hub."""
    folder = Path(adapter_path).expanduser()
    if folder.is_dir():
        return ModelSource(adapter_path, "", folder)
    if adapter_path.startswith((".", "/", "~")):
        raise ConfigError(f"--adapter_path {adapter_path}: no such folder; give what PEFT saved, or a hub id")
    name, _, revision = adapter_path.partition("@")
    snapshot = _download(name, revision or None, _ADAPTER, "--adapter_path")
    return ModelSource(name, snapshot.name, snapshot)


def _download(
    model_id: str, revision: str | None, patterns: tuple[str, ...], flag: str = "--model_path"
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                model_id, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_NOT_WANTED)
            )
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"{flag} {model_id}: neither a local folder nor a model on the Hugging Face Hub "
            f"(revision {revision or 'main'}): {first_line(error)}"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise StorageError(
            f"{flag} {model_id}: not in the local cache, and the Hugging Face Hub cannot be reached "
            f"({first_line(error)}); try again, or give a local folder"
        ) from error
