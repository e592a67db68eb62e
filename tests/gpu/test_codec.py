"""The codec on a real GPU against the reference's results, and its streaming step in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from audio.codec import Codec, StreamingDecoder, StreamingEncoder
from tests.audio.tiny_codec import FOLDER, golden, some_codes, tiny_codec


@pytest.fixture
def codec() -> Codec:
    return Codec.load(FOLDER, "cuda")


def test_samples_are_the_references(codec: Codec) -> None:
    decoded = codec.decode(golden()["random_codes"][None])[0].cpu()
    torch.testing.assert_close(decoded, golden()["random_decoded"], atol=1e-4, rtol=0)


def test_codes_are_nearly_all_the_references(codec: Codec) -> None:
    """On a GPU the encoder has float32 only: of 300 codes one lies within its rounding of another entry, and those
    after it in the frame follow it."""
    codes = codec.encode(golden()["wav"][None])[0].cpu()
    assert ((codes != golden()["codes"]).any(0)).sum() <= 1


def test_streams_of_different_ages_give_whole_decodes(codec: Codec) -> None:
    decoder = StreamingDecoder(codec, 3)
    codes = {decoder.open(): some_codes(20, seed) for seed in range(3)}
    first = decoder.decode({0: codes[0][:, :7], 2: codes[2][:, :1]})
    second = decoder.decode({0: codes[0][:, 7:], 1: codes[1], 2: codes[2][:, 1:]})
    for slot, samples in second.items():
        streamed = torch.cat((first[slot], samples)) if slot in first else samples
        expected = tiny_codec().decode(codes[slot][None])[0]
        torch.testing.assert_close(streamed.cpu(), expected, atol=1e-4, rtol=0)


def test_streamed_codes_are_those_of_a_whole_encode(codec: Codec) -> None:
    encoder = StreamingEncoder(codec, 1)
    slot = encoder.open()
    pieces = [encoder.encode({slot: piece})[slot] for piece in golden()["wav"].split(5000)]
    codes = torch.cat([*pieces, encoder.finish(slot)], 1).cpu()
    assert ((codes != golden()["codes"]).any(0)).sum() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_captured_step_streams_as_an_eager_one(dtype: torch.dtype) -> None:
    codec = Codec.load(FOLDER, "cuda", dtype)
    codec.reserve(64)
    decoder, eager = StreamingDecoder(codec, 4), StreamingDecoder(codec, 4)
    for streams in (decoder, eager):
        for _ in range(4):
            streams.open()
    slots = torch.tensor([3, 1], device="cuda")
    codes = torch.stack([some_codes(12, seed) for seed in range(2)]).cuda()
    piece = codes[:, :, :2].clone()
    replay, samples = _capture(lambda: decoder.step(slots, piece))
    for slot in range(4):  # what warming up left there
        decoder.close(slot)
    for _ in range(4):
        decoder.open()
    for first in range(0, 12, 2):
        piece.copy_(codes[:, :, first : first + 2])
        replay()
        expected = eager.step(slots, codes[:, :, first : first + 2])
        torch.testing.assert_close(samples, expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def _capture(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        samples = step()
    return graph.replay, samples
