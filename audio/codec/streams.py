"""Many sounds decoded or encoded piece by piece at once, each at its own pace, with the samples of one whole call.

Streams that bring equally many new frames pass through the network as one batch; a call in which they differ makes one
pass for each number. Padding them to one length instead would run the padding through every layer's tail, and those
tails are the streams' memory. A server brings one frame per stream and step, so in practice there is one pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from audio.codec.codec import PIECE_FRAMES, Codec
from audio.codec.slots import Slots


class StreamingDecoder:
    """Codes in, samples out, for up to `slots` streams."""

    def __init__(self, codec: Codec, slots: int) -> None:
        self._codec = codec
        self._slots = Slots(codec.decoder_plan, slots, codec.device, codec.dtype)

    def open(self) -> int:
        """A slot for a new stream. Raises RuntimeError if all are taken."""
        return self._slots.open()

    def close(self, slot: int) -> None:
        """Forget the stream. Raises ValueError if the slot is not open."""
        self._slots.close(slot)

    def decode(self, codes: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """The next frames of some of the streams.

        codes: slot -> integers [K, n], n of 0 or more. Returns slot -> samples float32 [n * frame_size]. Raises
        ValueError, before any stream has moved, for slots that are not open and codes of other shapes.
        """
        self._slots.require_open(codes)
        for new in codes.values():
            self._codec.check_codes(new, 2)
        samples: dict[int, torch.Tensor] = {}
        for slots in _grouped({slot: new.shape[1] for slot, new in codes.items()}):
            batch = torch.stack([codes[slot].to(self._codec.device) for slot in slots])
            for slot, decoded in zip(slots, self._pass(slots, batch)):
                samples[slot] = decoded
        return samples

    @torch.no_grad()
    def step(self, slots: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """One pass of the network: slots int64 [B] without repeats, codes [B, K, n] -> float32 [B, n * frame_size].

        All on the device, nothing checked, nothing waited for: this is what a CUDA graph captures, after
        `codec.reserve` for the longest stream to come.
        """
        history = self._slots.gather(slots)
        samples = self._codec.decode_frames(codes, history)
        self._slots.scatter(slots, history.advance(codes.shape[2]))
        return samples

    def _pass(self, slots: list[int], codes: torch.Tensor) -> torch.Tensor:
        if codes.shape[2] == 0:
            return torch.zeros(len(slots), 0, device=self._codec.device)
        self._codec.reserve(self._slots.lengthen(slots, codes.shape[2]))
        index = torch.tensor(slots, device=self._codec.device)
        return torch.cat([self.step(index, piece) for piece in codes.split(PIECE_FRAMES, 2)], 1)


class StreamingEncoder:
    """Samples in, codes out, for up to `slots` streams. Samples wait here until a frame is complete."""

    def __init__(self, codec: Codec, slots: int) -> None:
        self._codec = codec
        self._slots = Slots(codec.encoder_plan, slots, codec.device, codec.encoder_dtype)
        self._waiting = torch.zeros(slots, codec.config.frame_size, device=codec.device)
        self._waiting_counts: dict[int, int] = {}

    def open(self) -> int:
        """A slot for a new stream. Raises RuntimeError if all are taken."""
        slot = self._slots.open()
        self._waiting_counts[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        """Forget the stream. Raises ValueError if the slot is not open."""
        self._slots.close(slot)
        del self._waiting_counts[slot]

    def encode(self, samples: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """The next samples of some of the streams.

        samples: slot -> floats [n] in -1 to 1, n of 0 or more. Returns slot -> codes int64 [K, m] of the m frames that
        they complete. Raises ValueError, before any stream has moved, for slots that are not open and other shapes.
        """
        self._slots.require_open(samples)
        for new in samples.values():
            if new.ndim != 1 or not new.is_floating_point():
                raise ValueError(f"samples are {new.dtype} {list(new.shape)}; they must be floats [samples]")
        complete = {slot: self._complete_frames(slot, new) for slot, new in samples.items()}
        codes: dict[int, torch.Tensor] = {}
        for slots in _grouped({slot: len(ready) for slot, ready in complete.items()}):
            for slot, encoded in zip(slots, self._pass(slots, torch.stack([complete[slot] for slot in slots]))):
                codes[slot] = encoded
        return codes

    def finish(self, slot: int) -> torch.Tensor:
        """Pad the stream's end with zeros to a whole frame: its codes int64 [K, 1], or [K, 0]. Closes the slot."""
        self._slots.require_open([slot])
        missing = -self._waiting_counts[slot] % self._codec.config.frame_size
        codes = self.encode({slot: torch.zeros(missing)})[slot]
        self.close(slot)
        return codes

    @torch.no_grad()
    def step(self, slots: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        """One pass of the network: slots int64 [B] without repeats, samples [B, n * frame_size] -> codes [B, K, n].

        As in `StreamingDecoder.step`, nothing is checked.
        """
        history = self._slots.gather(slots)
        codes = self._codec.encode_frames(samples, history)
        self._slots.scatter(slots, history.advance(codes.shape[2]))
        return codes

    def _complete_frames(self, slot: int, new: torch.Tensor) -> torch.Tensor:
        """Take the whole frames among a stream's waiting and new samples."""
        size, count = self._codec.config.frame_size, self._waiting_counts[slot]
        samples = torch.cat((self._waiting[slot, :count], new.to(self._codec.device, torch.float32)))
        whole = len(samples) // size * size
        self._waiting_counts[slot] = len(samples) - whole
        self._waiting[slot, : len(samples) - whole] = samples[whole:]
        return samples[:whole]

    def _pass(self, slots: list[int], samples: torch.Tensor) -> torch.Tensor:
        size = self._codec.config.frame_size
        if samples.shape[1] == 0:
            return torch.zeros(
                len(slots), self._codec.config.num_codebooks, 0, dtype=torch.int64, device=samples.device
            )
        self._codec.reserve(self._slots.lengthen(slots, samples.shape[1] // size))
        index = torch.tensor(slots, device=self._codec.device)
        return torch.cat([self.step(index, piece) for piece in samples.split(PIECE_FRAMES * size, 1)], 2)


def _grouped(sizes: Mapping[int, int]) -> list[list[int]]:
    """The slots, those of equal size together."""
    groups: dict[int, list[int]] = defaultdict(list)
    for slot, size in sizes.items():
        groups[size].append(slot)
    return list(groups.values())
