"""From the bytes of a request's body to a checked record, or to an error that says what to change."""

from __future__ import annotations

import re
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request
from starlette.types import Receive

from streaming.http.connection import ClientGone
from streaming.http.errors import ApiError, bad_request, shown

B = TypeVar("B", bound=BaseModel)

# What pydantic puts into a location to say which member of a union it tried.
_UNION_TAG = re.compile(r"str|constrained-(str|int)|list\[.*\]|\[key\]|dict\[.*\]|[A-Z]\w*")


async def parse_body(request: Request, kind: type[B]) -> B:
    """Read and check the body. Raises ApiError: 413 if it is too large, else 400."""
    raw = await read_body(request)
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise explain(error) from None


async def read_body(request: Request) -> bytes:
    """Raises ApiError 413 for a body that is too large, ClientGone if it ends before it is whole."""
    return await _read(request.receive, request.headers.get("content-length"), request.app.state.max_body_bytes)


async def _read(receive: Receive, announced: str | None, limit: int) -> bytes:
    if announced is not None and announced.isdecimal() and int(announced) > limit:
        raise _too_large(announced, limit)
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(f"more than {limit}", limit)
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


def _too_large(size: str, limit: int) -> ApiError:
    return ApiError(413, f"the body has {size} bytes; at most {limit} are allowed", code="body_too_large")


def explain(error: ValidationError) -> ApiError:
    """The first wrong field, by its name, value, and what it may be."""
    found = error.errors(include_url=False)
    first = found[0]
    if first["type"] == "json_invalid":
        reason = first["ctx"]["error"]
        return bad_request(f"the body is not valid JSON: {reason}", code="invalid_json")
    if not first["loc"]:
        return bad_request("the body must be a JSON object", code="invalid_type")
    best = _meant(found)
    param = _name(best[0]["loc"])
    if best[0]["type"] == "missing":
        return bad_request(f"{param} is missing; it is required", param, "missing_required_parameter")
    allowed = " or ".join(dict.fromkeys(_allowed(e["msg"]) for e in best))
    code = "invalid_type" if best[0]["type"].endswith("_type") else "invalid_value"
    return bad_request(f"{param} is {shown(best[0]['input'])}; it must {allowed}", param, code)


def _meant(found: list[ErrorDetails]) -> list[ErrorDetails]:
    """The first error. If that is one of a union, whose members each report why they did not fit, then those of the
    members that came nearest: a value that is wrong beats a type that is wrong, and a late element an early one."""
    location = found[0]["loc"]
    tags = [at for at, part in enumerate(location) if isinstance(part, str) and _UNION_TAG.fullmatch(part)]
    if not tags:
        return found[:1]
    members = [error for error in found if error["loc"][: tags[0]] == location[: tags[0]]]

    def nearness(error: ErrorDetails) -> tuple[bool, list[int]]:
        return not error["type"].endswith("_type"), [part for part in error["loc"] if isinstance(part, int)]

    nearest = max(members, key=nearness)
    name = _name(nearest["loc"])
    return [error for error in members if nearness(error) == nearness(nearest) and _name(error["loc"]) == name]


def _allowed(message: str) -> str:
    text = re.sub(r"^\w+ should ", "", message)
    return text if text != message else f"be right: {message}"


def _name(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "role")` as `messages[0].role`."""
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif not _UNION_TAG.fullmatch(part):
            name += f".{part}" if name else part
    return name
