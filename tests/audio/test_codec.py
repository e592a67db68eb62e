"""The codec against the reference's own results, and its manners."""

from __future__ import annotations

import pytest
import torch

from audio.codec import Codec, CodecConfig, TransformerConfig
from audio.codec.history import Beginning
from audio.codec.layers import Snake
from audio.codec.snake import fused_snake
from tests.audio.tiny_codec import FOLDER, golden, greedy_speech, some_codes, some_sound, tiny_codec

SMALL = CodecConfig(
    sample_rate=24_000,
    encoder_dim=8,
    encoder_rates=(2, 4),
    encoder_transformer_layers=(0, 1),
    encoder_window_size=6,
    decoder_dim=16,
    decoder_rates=(4, 2),
    n_codebooks=2,
    codebook_size=16,
    semantic_codebook_size=32,
    downsample_factor=(2,),
    latent_dim=32,
    transformer=TransformerConfig(window_size=4, n_layer=1, n_head=2, dim=32, intermediate_size=48, head_dim=16),
)


def test_codes_are_the_references():
    codes = tiny_codec().encode(golden()["wav"][None])
    assert codes.dtype == torch.int64
    assert torch.equal(codes[0], golden()["codes"].long())


@pytest.mark.parametrize(("codes", "samples"), [("codes", "decoded"), ("random_codes", "random_decoded")])
def test_samples_are_the_references(codes, samples):
    decoded = tiny_codec().decode(golden()[codes][None])
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded[0], golden()[samples], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["ref", "noref"])
def test_greedy_speech_sounds_as_the_references(name):
    codes, samples = greedy_speech(name)
    torch.testing.assert_close(tiny_codec().decode(codes[None])[0], samples, atol=2e-5, rtol=0)


def test_a_batch_gives_what_its_rows_give():
    codes = torch.stack([some_codes(9, seed) for seed in range(3)])
    together = tiny_codec().decode(codes)
    for row in range(3):
        torch.testing.assert_close(together[row], tiny_codec().decode(codes[row : row + 1])[0], atol=2e-5, rtol=0)


def test_samples_after_a_rows_length_do_not_count():
    size = tiny_codec().config.frame_size
    wav = torch.stack([some_sound(5 * size, 1), some_sound(5 * size, 2)])
    codes = tiny_codec().encode(wav, torch.tensor([5 * size, 2 * size + 1]))
    assert torch.equal(codes[0], tiny_codec().encode(wav[:1])[0])
    assert tiny_codec().frame_count(2 * size + 1) == 3
    assert torch.equal(codes[1, :, :3], tiny_codec().encode(wav[1:, : 2 * size + 1])[0])


def test_a_sound_of_several_pieces_is_one_sound():
    codes = some_codes(150)
    samples = tiny_codec().decode(codes[None])
    with torch.no_grad():
        at_once = tiny_codec().decode_frames(codes[None], Beginning())
    torch.testing.assert_close(samples, at_once, atol=2e-5, rtol=0)
    assert torch.equal(tiny_codec().encode(samples), tiny_codec().encode_frames(samples, Beginning()))


def test_codes_above_a_codebook_mean_its_last_entry():
    codes = some_codes(4)
    last = torch.tensor(tiny_codec().config.codebook_sizes)[:, None] - 1
    beyond, at_end = codes.clone(), codes.clone()
    beyond[:, 2:] = last + torch.tensor([1, 5000])
    at_end[:, 2:] = last
    assert torch.equal(tiny_codec().decode(beyond[None]), tiny_codec().decode(at_end[None]))


def test_the_gpus_snake_is_the_layers():
    layer = Snake(24)
    with torch.no_grad():
        layer.alpha.copy_(torch.linspace(-2, 3, 24))
        x = torch.randn(2, 77, 24) * 3
        device = "cuda" if torch.cuda.is_available() else "cpu"
        got = fused_snake(x.to(device), layer.alpha.to(device)).cpu()
        torch.testing.assert_close(got, layer(x, Beginning()), atol=2e-6, rtol=1e-5)


def test_no_frames_are_no_samples():
    assert tiny_codec().decode(torch.zeros(2, 10, 0, dtype=torch.int64)).shape == (2, 0)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 9, 4, dtype=torch.int64), r"\[1, 9, 4\]; they must be integers \[batch, 10, frames\]"),
        (torch.zeros(10, 4, dtype=torch.int64), r"\[10, 4\]; they must be integers \[batch, 10, frames\]"),
        (torch.zeros(1, 10, 4), r"torch.float32 \[1, 10, 4\]; they must be integers"),
        (torch.full((1, 10, 4), -1), "a code is -1; codes must be at least 0"),
    ],
)
def test_codes_of_another_form_are_refused(codes, message):
    with pytest.raises(ValueError, match=message):
        tiny_codec().decode(codes)


@pytest.mark.parametrize(
    ("wav", "lengths", "message"),
    [
        (torch.zeros(5000), None, r"\[5000\]; it must be floats \[batch, samples\]"),
        (torch.zeros(1, 0), None, "not empty"),
        (torch.zeros(1, 50, dtype=torch.int16), None, r"torch.int16 \[1, 50\]; it must be floats"),
        (torch.zeros(2, 50), torch.tensor([50]), r"\[1\]; they must be integers \[2\]"),
        (torch.zeros(1, 50), torch.tensor([51]), r"\[51\]; they must be in 0 to 50"),
    ],
)
def test_sounds_of_another_form_are_refused(wav, lengths, message):
    with pytest.raises(ValueError, match=message):
        tiny_codec().encode(wav, lengths)


def test_bfloat16_stays_within_a_fiftieth_of_the_loudest_sample():
    codec = Codec.load(FOLDER, dtype=torch.bfloat16)
    assert codec.decoder.transformer.norm.weight.dtype == torch.bfloat16
    decoded, exact = codec.decode(golden()["codes"][None])[0], golden()["decoded"]
    assert decoded.dtype == torch.float32
    error = (decoded - exact).abs()
    assert error.max() < 0.1 * exact.abs().max()
    assert error.square().mean().sqrt() < 0.02 * exact.abs().max()
    # Its encoder keeps more digits, so that nearly every code is the same.
    codes = codec.encode(golden()["wav"][None])[0]
    assert (codes == golden()["codes"]).float().mean() > 0.95


def test_gradients_reach_every_weight():
    torch.manual_seed(0)
    codec = Codec(SMALL)
    wav = torch.randn(2, 12 * SMALL.frame_size) * 0.1
    samples, quantized = codec(wav)
    assert samples.shape == wav.shape
    assert quantized.codes.shape == (2, 12, SMALL.num_codebooks)
    loss = (samples - wav).square().mean() + 0.25 * quantized.commitment_loss + quantized.codebook_loss
    loss.backward()
    without = [name for name, parameter in codec.named_parameters() if parameter.grad is None]
    assert without == []
    # A gradient that were cut at the codes would leave the encoder to the commitment loss alone.
    codec.zero_grad()
    samples, _ = codec(wav)
    (samples - wav).square().mean().backward()
    assert codec.encoder.convolutions.get_submodule("0").weight.grad.abs().sum() > 0


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    codec = Codec(SMALL)
    wav = torch.sin(torch.arange(16 * SMALL.frame_size) * 0.3)[None] * 0.5
    optimizer = torch.optim.Adam(codec.parameters(), 3e-3)
    losses = []
    for _ in range(50):
        samples, quantized = codec(wav)
        loss = (samples - wav).square().mean() + 0.05 * quantized.commitment_loss + 0.2 * quantized.codebook_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float((samples - wav).square().mean().detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_fewer_codebooks_can_be_trained_at_once():
    latent = torch.randn(1, 5, SMALL.latent_dim)
    quantizer = Codec(SMALL).quantizer
    assert torch.equal(quantizer(latent, 2).codes, quantizer.encode(latent)[:, :, :2])


def test_what_training_sees_is_what_decoding_gives():
    quantizer = tiny_codec().quantizer
    latent = torch.randn(1, 5, tiny_codec().config.latent_dim)
    with torch.no_grad():
        quantized = quantizer(latent)
        torch.testing.assert_close(quantized.latent, quantizer.decode(quantized.codes), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_rates": [4, 4]}, r"decoder_rates \(4, 4\) make 16; they must be equal"),
        ({"n_codebooks": 0}, "n_codebooks is 0; it must be at least 1"),
        ({"latent_dim": 64}, "transformer.dim is 32; it must be latent_dim, 64"),
        ({"decoder_dim": 18}, "decoder_dim is 18; it must halve 2 times"),
        (
            {"encoder_transformer_layers": [0]},
            "encoder_transformer_layers has 1 numbers; it needs one for each of the 2",
        ),
        ({"depth": 3}, "unknown codec setting depth; known are"),
        ({"transformer": {"heads": 3}}, "unknown codec setting transformer.heads; known are"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CodecConfig.from_dict(SMALL.to_dict() | changes)


def test_the_default_sizes_are_the_released_codecs():
    config = CodecConfig()
    assert (config.frame_size, config.num_codebooks) == (2048, 10)
    assert round(config.frame_rate, 2) == 21.53
    assert config.codebook_sizes == (4096, *[1024] * 9)
