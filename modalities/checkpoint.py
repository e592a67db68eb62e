"""Where a model's files are: on disk, in the cache of embedded models, or on the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from modalities import embedded

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What of a hub repository is fetched: configuration, tokenizer, safetensors; no pickles of other frameworks.
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.pth", "*.tiktoken")


class CheckpointError(ValueError):
    """A model's files cannot be had; the message says what was looked for, and where."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`path` is a folder with config.json and safetensors, or a .gguf file."""

    path: Path

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"

    @property
    def folder(self) -> Path:
        """Where configuration and tokenizer are. Beside a .gguf file they may be missing: it has them inside too."""
        return self.path.parent if self.is_gguf else self.path


def locate(source: str) -> Checkpoint:
    """The checkpoint that `source` means: a folder, a .gguf file, an embedded model's name, or a hub id `owner/name`.

    An embedded model or one of the hub is fetched first if it is not there yet. Raises CheckpointError.
    """
    path = Path(source).expanduser()
    if path.exists():
        return _local(path)
    if source in embedded.MODELS:
        return Checkpoint(embedded.obtain(source))
    if _HUB_ID.fullmatch(source):
        return _from_hub(source)
    known = ", ".join(embedded.MODELS)
    raise CheckpointError(
        f"there is no file or folder {source!r}, and it is neither an embedded model ({known}) nor a hub id "
        "like owner/name"
    )


def _local(path: Path) -> Checkpoint:
    path = path.resolve()
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is no .gguf file; a model is one, or a folder with config.json")
        return Checkpoint(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1 and not any(path.glob("*.safetensors")):
        return Checkpoint(files[0])
    if not (path / "config.json").exists():
        what = f"{len(files)} .gguf files; name one of them" if files else "neither config.json nor a .gguf file"
        raise CheckpointError(f"the folder {path} has {what}")
    return Checkpoint(path)


def _from_hub(repository: str) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Checkpoint(Path(snapshot_download(repository, allow_patterns=list(_HUB_FILES))))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"there is no folder {repository!r} here, and the model hub gave no model of that id: {first_line}"
        ) from error
