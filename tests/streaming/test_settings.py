"""How a server is set up: what wins, what is refused, and what a refusal says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from streaming.settings import (
    API_KEY_VARIABLE,
    DEFAULT_MODEL,
    ModelSettings,
    ServerSettings,
    SettingsError,
    engine_config,
    load_settings,
)


def load(options: dict[str, Any] | None = None, config: Path | None = None, **environment: str) -> ServerSettings:
    return load_settings(options or {}, config, environment)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "server.yaml"


def refusal(options: dict[str, Any] | None = None, config: Path | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load(options, config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_a_word_it_serves_the_embedded_model() -> None:
    settings = load()
    assert settings == ServerSettings((ModelSettings(DEFAULT_MODEL, DEFAULT_MODEL, engine_config({})),))
    assert (settings.host, settings.port, settings.gateways) == ("127.0.0.1", 8000, 1)


def test_a_file_sets_the_server_and_each_model(file: Path) -> None:
    file.write_text(
        """
        port: 9000
        max_running: 8
        device: cpu
        models:
          - small=/models/small
          - name: large
            path: org/large
            max_running: 2
            dtype: float32
          - path: /models/third.gguf
        """
    )
    settings = load(config=file)
    assert settings.port == 9000
    assert [(model.name, model.source) for model in settings.models] == [
        ("small", "/models/small"),
        ("large", "org/large"),
        ("third.gguf", "/models/third.gguf"),
    ]
    assert [model.engine.max_running for model in settings.models] == [8, 2, 8]
    assert [model.engine.dtype for model in settings.models] == ["auto", "float32", "auto"]
    assert {model.engine.device for model in settings.models} == {"cpu"}


def test_options_win_over_the_file_and_the_file_over_the_environment(file: Path) -> None:
    file.write_text("port: 9000\nhost: 0.0.0.0\napi_key: from the file\nmodels: [a]\n")
    settings = load({"port": 9001, "host": None, "models": ["b"]}, file, TRIPTYCH_API_KEY="from the environment")
    assert (settings.port, settings.host, settings.api_key) == (9001, "0.0.0.0", "from the file")
    assert [model.name for model in settings.models] == ["b"]
    assert load(**{API_KEY_VARIABLE: "secret"}).api_key == "secret"
    assert load({"api_key": "given"}, **{API_KEY_VARIABLE: "secret"}).api_key == "given"
    assert load(**{API_KEY_VARIABLE: ""}).api_key is None


def test_an_empty_file_sets_nothing(file: Path) -> None:
    file.write_text("# nothing yet\n")
    assert load(config=file) == load()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "holds a list; it must hold `key: value` lines"),
        ("just words", "holds a str"),
        ("port: [1\n", "is not YAML"),
        ("\x00", "is not YAML"),
        ("prot: 9000\n", "'prot' is not a setting (did you mean port?)"),
        ("max_runing: 9\n", "did you mean max_running?"),
        ("5: 6\n", "5 is not a setting"),
        ("port: '9000'\n", "port is '9000': Expected `int`, got `str`"),
        ("port: true\n", "port is True"),
        ("api_key: 5\n", "api_key is 5"),
        ("memory_fraction: lots\n", "memory_fraction is 'lots'"),
        ("models: one\n", "models is 'one'; it must be a list"),
        ("models: [5]\n", "a model is 5"),
        ("models: [{name: a, path: 5}]\n", "a model has the path 5"),
        ("models: [{name: [a], path: x}]\n", "a model has the name ['a']; it must be a text"),
        ("models: [{path: x, naem: y}]\n", "'naem' is not a setting of a model (did you mean name?)"),
        ("models: [{path: x, port: 1}]\n", "'port' is not a setting of a model"),
        ("models: [a/x, b/x]\n", "two models are named 'x'; tell them apart with NAME=PATH"),
        ("models: ['=x']\n", "the model '=x' lacks its name"),
        ("models: ['x=']\n", "the model 'x=' lacks its path"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(file: Path, text: str, says: str) -> None:
    file.write_text(text)
    assert says in refusal(config=file)


def test_a_file_that_cannot_be_read_names_itself(tmp_path: Path) -> None:
    assert refusal(config=tmp_path / "none.yaml") == f"cannot read {tmp_path}/none.yaml: No such file or directory"
    assert "Is a directory" in refusal(config=tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("port", -1, "between 0 and 65535"),
        ("port", 65536, "between 0 and 65535"),
        ("gateways", 0, "between 1 and 64"),
        ("gateways", 65, "between 1 and 64"),
        ("max_body_bytes", 1023, "at least 1024"),
        ("drain_seconds", -0.5, "between 0 and 86400"),
        ("log_level", "loud", "debug, info, warning, error"),
        ("device", "tpu", "auto, cpu, cuda or cuda:N"),
        ("device", "cuda:", "auto, cpu, cuda or cuda:N"),
        ("dtype", "int8", "auto, bfloat16, float16 or float32"),
        ("load_format", "pickle", "auto or dummy"),
        ("attention", "flash", "auto, torch or triton"),
        ("memory_fraction", 0.0, "above 0 and at most 1"),
        ("memory_fraction", 1.01, "above 0 and at most 1"),
        ("max_running", 0, "at least 1"),
        ("max_queue", -3, "at least 1"),
        ("max_step_tokens", 0, "at least 1"),
        ("max_context", 0, "at least"),
        ("kv_slots", 0, "at least"),
    ],
)
def test_a_value_out_of_range_names_itself_and_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    message = refusal({name: value})
    assert message.startswith(f"{name} is {value}; it must be ")
    assert allowed in message


@pytest.mark.parametrize("name", ["port", "gateways", "drain_seconds", "memory_fraction"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 10**30])
def test_numbers_that_are_none_are_refused(name: str, value: float) -> None:
    assert refusal({name: value}).startswith(f"{name} is ")


_YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
_KEYS = st.sampled_from(["models", "port", "host", "gateways", "api_key", "dtype", "max_running", "drain_seconds"])


@given(st.dictionaries(_KEYS | st.text(max_size=5), _YAML_VALUES, max_size=4))
def test_whatever_a_file_holds_is_taken_or_refused_in_one_line(tmp_path_factory: Any, content: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True))
    try:
        assert load(config=file).models
    except SettingsError as error:
        assert "\n" not in str(error)
