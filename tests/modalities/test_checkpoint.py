"""What a name means: a folder, a file, an embedded model, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from modalities import embedded
from modalities.checkpoint import CheckpointError, locate


def test_a_folder_with_a_config_is_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    found = locate(str(tmp_path))
    assert (found.path, found.folder, found.is_gguf) == (tmp_path, tmp_path, False)


def test_a_gguf_file_is_one_too_and_its_folder_is_where_it_lies(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    found = locate(str(file))
    assert (found.path, found.folder, found.is_gguf) == (file, tmp_path, True)


def test_a_folder_with_one_gguf_file_means_that_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    (tmp_path / "config.json").write_text("{}")
    assert locate(str(tmp_path)).path == tmp_path / "model.gguf"


def test_safetensors_beside_a_gguf_file_win(tmp_path: Path) -> None:
    for name in ("model.gguf", "model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text("{}")
    assert locate(str(tmp_path)).path == tmp_path


def test_a_relative_path_and_one_from_home_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("here").path == locate("./here").path == locate("~/here").path == tmp_path / "here"


def test_folders_and_files_that_are_no_model_say_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has neither config\.json nor a \.gguf file"):
        locate(str(tmp_path))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"has 2 \.gguf files; name one of them"):
        locate(str(tmp_path))
    (tmp_path / "weights.bin").touch()
    with pytest.raises(CheckpointError, match=r"weights\.bin is no \.gguf file"):
        locate(str(tmp_path / "weights.bin"))


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "a/b/c", ""])
def test_an_unknown_name_lists_what_there_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        locate(name)
    if name:
        assert f"there is no file or folder {name!r}" in str(caught.value)
        assert all(known in str(caught.value) for known in embedded.MODELS)


def test_a_hub_id_without_a_hub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="the model hub gave no model of that id"):
        locate("nobody-at-all/no-such-model")


def test_an_embedded_model_in_the_cache_needs_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path))
    ((name, wheel),) = embedded.MODELS.items()
    file = tmp_path / f"{name}-{wheel.version}" / Path(wheel.member).name
    file.parent.mkdir()
    file.touch()
    assert locate(name).path == file
