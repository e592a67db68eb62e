"""Reading codecs from disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from audio.codec import Codec, CodecWeightError, save_codec
from tests.audio.tiny_codec import FOLDER, some_codes, tiny_codec


@pytest.fixture
def stored() -> dict[str, torch.Tensor]:
    return torch.load(FOLDER / "codec.pth", weights_only=True)


def write(folder: Path, tensors: object) -> Path:
    shutil.copy(FOLDER / "codec.json", folder / "codec.json")
    torch.save(tensors, folder / "codec.pth")
    return folder


def test_a_saved_codec_is_the_same_codec(tmp_path):
    save_codec(tiny_codec(), tmp_path)
    again = Codec.load(tmp_path)
    assert again.config == tiny_codec().config
    for name, parameter in tiny_codec().state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name
    assert load_file(tmp_path / "codec.safetensors")["decoder.model.1.block.1.conv.weight"].shape == (64, 32, 16)


def test_a_file_can_be_named_itself():
    codec = Codec.load(FOLDER / "codec.pth")
    codes = some_codes(3)[None]
    assert torch.equal(codec.decode(codes), tiny_codec().decode(codes))


def test_a_training_checkpoint_holds_the_codec_under_generator(tmp_path, stored):
    wrapped = {"state_dict": {f"generator.{k}": v for k, v in stored.items()} | {"discriminator.x": torch.zeros(1)}}
    codes = some_codes(3)[None]
    assert torch.equal(Codec.load(write(tmp_path, wrapped)).decode(codes), tiny_codec().decode(codes))


def test_tables_that_the_sizes_imply_may_be_stored(tmp_path, stored):
    stored["quantizer.pre_module.freqs_cis"] = torch.zeros(3)
    stored["quantizer.pre_module.causal_mask"] = torch.zeros(3)
    Codec.load(write(tmp_path, stored))


def test_tensors_that_do_not_fit_are_named(tmp_path, stored):
    del stored["encoder.block.5.alpha"]
    stored["decoder.model.0.conv.bias"] = torch.zeros(3)
    stored["decoder.surprise"] = torch.zeros(3)
    with pytest.raises(CodecWeightError) as caught:
        Codec.load(write(tmp_path, stored))
    message = str(caught.value)
    assert "encoder.block.5.alpha is missing" in message
    assert "decoder.model.0.conv.bias is [3], not [64]" in message
    assert "decoder.surprise is not part of this codec" in message


def test_a_codec_of_other_sizes_is_told_apart(tmp_path):
    shutil.copy(FOLDER / "codec.pth", tmp_path / "codec.pth")
    (tmp_path / "codec.json").write_text(
        (FOLDER / "codec.json").read_text().replace('"codebook_size": 128', '"codebook_size": 64')
    )
    with pytest.raises(
        CodecWeightError, match=r"quantizers.0.codebook.weight is \[128, 8\], not \[64, 8\].*and 1 more"
    ):
        Codec.load(tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "codec.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(CodecWeightError, match=r"codec.pth is no file of plain tensors"):
        Codec.load(tmp_path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    with pytest.raises(CodecWeightError, match="no file of plain tensors"):
        Codec.load(write(tmp_path, {"state_dict": Path}))


def test_a_folder_without_a_codec_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder with codec.pth or codec.safetensors"):
        Codec.load(tmp_path)


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"dtype is torch.float16; a codec runs in torch.float32 or torch.bfloat16"):
        Codec.load(FOLDER, dtype=torch.float16)
