"""Bodies that may be JSON, msgpack or a form, to a checked record."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message

from streaming.http.body import explain, read_body
from streaming.http.errors import ApiError, bad_request, shown

B = TypeVar("B", bound=BaseModel)

_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_MAX_FILES = 64
_MAX_FIELDS = 256
_MAX_FIELD_BYTES = 1 << 20


async def read_fields(request: Request, lists: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The body's fields. Of a form, files are bytes, and what may come several times (`lists`) is a list.

    Raises ApiError for a body that is too large, of another type, or not what it says.
    """
    raw = await read_body(request)
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind in _FORMS:
        return await _form_fields(request, raw, lists)
    if kind in ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack"):
        return decoded(raw, msgspec.msgpack.decode, "the body", "msgpack")
    if kind in ("application/json", "text/plain", ""):
        return decoded(raw, msgspec.json.decode, "the body", "JSON")
    raise ApiError(
        415,
        f"the body's type is {shown(kind)}; it must be application/json, application/msgpack or multipart/form-data",
        code="unsupported_media_type",
    )


def decoded(raw: bytes, decode: Callable[..., Any], what: str, kind: str) -> dict[str, Any]:
    """A map with texts as keys. Raises ApiError if `raw` is anything else."""
    try:
        fields: dict[str, Any] = decode(raw, type=dict[str, Any])
    except (ValueError, RecursionError, OverflowError) as error:  # msgspec's own errors are ValueErrors
        raise bad_request(f"{what} is no map in {kind}: {error}", code="invalid_body") from None
    return fields


def checked(kind: type[B], fields: dict[str, Any], *, strict: bool = True) -> B:
    """Not `strict`, for forms: numbers and truth values may be texts. Raises ApiError."""
    try:
        return kind.model_validate(fields, strict=strict)
    except ValidationError as error:
        raise explain(error) from None


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() in _FORMS


def as_bytes(value: Any) -> Any:
    """For a field of bytes: a text is base64, perhaps after `data:...;base64,`. Raises ValueError."""
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode("".join(value.rpartition(",")[2].split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("a text must be base64") from None


async def _form_fields(request: Request, raw: bytes, lists: frozenset[str]) -> dict[str, Any]:
    """Parsed from memory: what was read is within the limit for bodies."""

    async def replay() -> Message:
        return {"type": "http.request", "body": raw, "more_body": False}

    again = Request(request.scope, replay)
    fields: dict[str, Any] = {}
    async with again.form(max_files=_MAX_FILES, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES) as form:
        for name, value in form.multi_items():
            content = value.file.read() if isinstance(value, UploadFile) else value
            if name in lists:
                fields.setdefault(name, []).append(content)
            else:
                fields[name] = content
    return fields
