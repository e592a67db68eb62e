"""The S2 family's codec: samples to frames of codes and back, whole or in pieces, with the same result."""

from audio.codec.codec import Codec
from audio.codec.config import CodecConfig, TransformerConfig
from audio.codec.streams import StreamingDecoder, StreamingEncoder
from audio.codec.weights import CodecWeightError, save_codec

__all__ = [
    "Codec",
    "CodecConfig",
    "CodecWeightError",
    "StreamingDecoder",
    "StreamingEncoder",
    "TransformerConfig",
    "save_codec",
]
