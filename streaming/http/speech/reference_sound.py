"""The recordings that come with a request, as base64 or a data: URL, or as a file that the operator allows."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from streaming.http.errors import ApiError, bad_request

_MAX_BYTES = 64 << 20


def sound_of(value: str, param: str, folder: Path | None) -> bytes:
    """The sound file that a field holds or, if there is such a file in `folder`, names. Raises ApiError."""
    if folder is not None and len(value) < 1024:
        path = _inside(folder, value)
        if path is not None:
            return _read(path, param)
    encoded = value
    if value.startswith("data:"):
        head, _, encoded = value.partition(",")
        if not head.endswith(";base64"):
            raise bad_request(f"{param} is a data: URL without base64; write data:audio/wav;base64,...", param)
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(
            f"{param} is neither base64 nor a data: URL. Nothing is fetched from elsewhere, and {_files(folder)}", param
        ) from None


def sound_in(name: str, param: str, folder: Path | None) -> bytes:
    """The file of that name in `folder`. Raises ApiError."""
    path = _inside(folder, name) if folder is not None else None
    if path is None:
        raise ApiError(400, f"{param} names no recording here: {_files(folder)}", param=param, code="invalid_value")
    return _read(path, param)


def _inside(folder: Path, name: str) -> Path | None:
    """The file, links followed, if it is one and in the folder still."""
    try:
        root = folder.resolve()
        path = (root / name.removeprefix("file://")).resolve()
        return path if path.is_relative_to(root) and path.is_file() else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def _read(path: Path, param: str) -> bytes:
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise bad_request(f"{param} names a file of {size} bytes; at most {_MAX_BYTES} are allowed", param)
    return path.read_bytes()


def _files(folder: Path | None) -> str:
    if folder is None:
        return "files of the server can be named only if it was started with --reference-folder"
    return "of the server's files, those in its reference folder can be named"
