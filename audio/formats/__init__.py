"""Sound out: float32 mono samples to wav, pcm, flac, mp3, opus and aac, streamed."""

from audio.formats.encoder import Encoder, encode_whole, open_encoder
from audio.formats.table import AUTO_BITRATE, FORMATS, Format, Settings

__all__ = ["AUTO_BITRATE", "FORMATS", "Encoder", "Format", "Settings", "encode_whole", "open_encoder"]
