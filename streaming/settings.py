"""How a server is set up: by the command line, then `--config server.yaml`, then the environment."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from ar_core.config import EngineConfig

DEFAULT_MODEL = "smollm2-135m-instruct"
API_KEY_VARIABLE = "TRIPTYCH_API_KEY"

_ENGINE_KEYS = (
    "device",
    "dtype",
    "load_format",
    "attention",
    "memory_fraction",
    "max_running",
    "max_queue",
    "max_step_tokens",
    "max_context",
    "kv_slots",
)
_ENGINE_TYPES: Mapping[str, Any] = {
    "device": str,
    "dtype": str,
    "load_format": str,
    "attention": str,
    "memory_fraction": float,
    "max_running": int,
    "max_queue": int,
    "max_step_tokens": int | None,
    "max_context": int | None,
    "kv_slots": int | None,
}


class SettingsError(ValueError):
    """A setting that cannot be used; the message names it and says what could."""


class ModelSettings(msgspec.Struct, frozen=True):
    name: str  # what requests call it
    source: str  # a folder, a file, a hub id or the name of an embedded model
    engine: EngineConfig


class ServerSettings(msgspec.Struct, frozen=True):
    models: tuple[ModelSettings, ...]
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    gateways: int = 1  # processes that speak HTTP
    api_key: str | None = None
    max_body_bytes: int = 32 << 20
    voices: str | None = None  # folder of the voice library; None: in the user's data folder
    reference_folder: str | None = None  # whose files requests may name as recordings; None: no files
    drain_seconds: float = 30.0  # that open answers have to finish once the server is told to stop
    log_level: str = "info"


class EngineAddress(msgspec.Struct, frozen=True):
    """Where a gateway finds the engine of a model, and the checkpoint whose tokenizer it needs."""

    name: str
    checkpoint: str  # what `modalities.checkpoint.locate` finds without a network
    address: str  # ipc://...


class GatewayConfig(msgspec.Struct, frozen=True):
    """All that a gateway process is told."""

    settings: ServerSettings
    engines: tuple[EngineAddress, ...]


_SERVER_KEYS = tuple(name for name in ServerSettings.__struct_fields__ if name != "models")
_SERVER_TYPES = {field.name: field.type for field in msgspec.structs.fields(ServerSettings)}
_ALL_KEYS = ("models", *_SERVER_KEYS, *_ENGINE_KEYS)
_MODEL_KEYS = ("name", "path", *_ENGINE_KEYS)


def load_settings(
    options: Mapping[str, Any], config: Path | None = None, environment: Mapping[str, str] = os.environ
) -> ServerSettings:
    """`options` are the command line's, None where one was not given; "models" is a list of NAME=SOURCE or SOURCE.

    Raises SettingsError.
    """
    given = {key: value for key, value in options.items() if value is not None}
    merged = {**(_read(config) if config else {}), **given}
    if not merged.get("api_key") and environment.get(API_KEY_VARIABLE):
        merged["api_key"] = environment[API_KEY_VARIABLE]
    _refuse_unknown(merged, _ALL_KEYS, "a setting")
    models = _models(merged.get("models") or [DEFAULT_MODEL], _pick(merged, _ENGINE_KEYS))
    server = {key: _convert(key, merged[key], _SERVER_TYPES[key]) for key in _SERVER_KEYS if key in merged}
    settings = ServerSettings(models=models, **server)
    _check_server(settings)
    return settings


def _read(config: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(config.read_text())
    except OSError as error:
        raise SettingsError(f"cannot read {config}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{config} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{config} holds a {type(content).__name__}; it must hold `key: value` lines")
    try:
        _refuse_unknown(content, _ALL_KEYS, "a setting")
    except SettingsError as error:
        raise SettingsError(f"{config}: {error}") from None
    return content


def _models(entries: Any, common: Mapping[str, Any]) -> tuple[ModelSettings, ...]:
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise SettingsError(f"models is {entries!r}; it must be a list of NAME=PATH or of mappings with name and path")
    models = tuple(_model(entry, common) for entry in entries)
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"two models are named {name!r}; tell them apart with NAME=PATH")
    return models


def _model(entry: Any, common: Mapping[str, Any]) -> ModelSettings:
    if isinstance(entry, str):
        entry = _split(entry)
    if not isinstance(entry, Mapping):
        raise SettingsError(f"a model is {entry!r}; it must be NAME=PATH, a path, a hub id, or a mapping with a path")
    _refuse_unknown(entry, _MODEL_KEYS, "a setting of a model")
    source = entry.get("path") or entry.get("name")
    if not isinstance(source, str):
        raise SettingsError(f"a model has the path {source!r}; it must be a path, a hub id or an embedded model's name")
    name = entry.get("name") or _folder_name(source)
    if not isinstance(name, str):
        raise SettingsError(f"a model has the name {name!r}; it must be a text")
    return ModelSettings(name, source, engine_config({**common, **_pick(entry, _ENGINE_KEYS)}))


def _split(text: str) -> dict[str, str]:
    name, separator, source = text.partition("=")
    if not separator:
        return {"path": text}
    if not name or not source:
        raise SettingsError(f"the model {text!r} lacks its {'path' if name else 'name'}; write NAME=PATH or PATH")
    return {"name": name, "path": source}


def _folder_name(source: str) -> str:
    """`org/model` and `/some/where/model` are both called `model`."""
    return Path(source).expanduser().resolve().name if source in {".", ".."} else Path(source).name


def voices_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where voices are kept unless a setting says otherwise: `triptych/voices` in the user's data folder."""
    data = environment.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "triptych" / "voices"


def engine_config(values: Mapping[str, Any]) -> EngineConfig:
    """Raises SettingsError for a value that no engine could use."""
    converted = {key: _convert(key, value, _ENGINE_TYPES[key]) for key, value in values.items()}
    try:
        config = EngineConfig(**converted)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    _check_words(config)
    return config


def _check_words(config: EngineConfig) -> None:
    for name, allowed, ok in (
        ("device", "auto, cpu, cuda or cuda:N", re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device)),
        ("dtype", "auto, bfloat16, float16 or float32", config.dtype in {"auto", "bfloat16", "float16", "float32"}),
        ("load_format", "auto or dummy", config.load_format in {"auto", "dummy"}),
        ("attention", "auto, torch or triton", config.attention in {"auto", "torch", "triton"}),
    ):
        if not ok:
            raise SettingsError(f"{name} is {getattr(config, name)}; it must be {allowed}")


def _check_server(settings: ServerSettings) -> None:
    levels = ("debug", "info", "warning", "error")
    for name, allowed, ok in (
        ("port", "between 0 and 65535", 0 <= settings.port <= 65535),
        ("gateways", "between 1 and 64", 1 <= settings.gateways <= 64),
        ("max_body_bytes", "at least 1024", settings.max_body_bytes >= 1024),
        ("drain_seconds", "between 0 and 86400", 0 <= settings.drain_seconds <= 86400),
        (
            "reference_folder",
            "a folder that exists",
            settings.reference_folder is None or Path(settings.reference_folder).is_dir(),
        ),
        ("log_level", ", ".join(levels), settings.log_level in levels),
    ):
        if not ok:
            raise SettingsError(f"{name} is {getattr(settings, name)}; it must be {allowed}")


def _convert(name: str, value: Any, kind: Any) -> Any:
    """YAML's types are taken as they are; nothing is guessed."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{name} is {value!r}: {error}") from None


def _refuse_unknown(given: Iterable[Any], known: Sequence[str], what: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise SettingsError(f"{key!r} is not {what}{hint}; these are: {', '.join(known)}")


def _pick(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}
