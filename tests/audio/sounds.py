"""Sounds that tests are made with."""

from __future__ import annotations

import io

import av
import numpy as np


def tone(hertz: float, seconds: float, rate: int, level: float = 0.5) -> np.ndarray:
    """float32 [seconds * rate]."""
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def vowels(seconds: float, rate: int) -> np.ndarray:
    """float32 [seconds * rate]: something with harmonics, a changing level and a little noise."""
    t = np.arange(round(seconds * rate)) / rate
    harmonics = sum(np.sin(2 * np.pi * 140 * k * t + k * k) / k for k in range(1, 16))
    noise = np.random.default_rng(7).standard_normal(len(t))
    return (0.15 * harmonics * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t)) + 0.002 * noise).astype(np.float32)


def cut_at(samples: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    return np.split(samples, sorted(c % (len(samples) + 1) for c in cuts))


def decoded(data: bytes, container: str | None = None, options: dict[str, str] | None = None) -> tuple[int, np.ndarray]:
    """(Hz, float32 [n]) of a mono file, by FFmpeg."""
    with av.open(io.BytesIO(data), mode="r", format=container, options=options) as file:
        rate = file.streams.audio[0].rate
        to_float = av.AudioResampler(format="flt", layout="mono", rate=rate)
        frames = [f for whole in file.decode(audio=0) for f in to_float.resample(whole)]
        return rate, np.concatenate([f.to_ndarray()[0] for f in frames])


def dominant_hertz(samples: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * rate / len(samples))


def level_beside(samples: np.ndarray, rate: int, hertz: float, width: float = 60.0) -> float:
    """How loud, in dB below a tone, the loudest thing is that lies more than `width` Hz from it."""
    spectrum = np.abs(np.fft.rfft(samples * np.blackman(len(samples))))
    at = np.fft.rfftfreq(len(samples), 1 / rate)
    return float(20 * np.log10(spectrum[np.abs(at - hertz) > width].max() / spectrum.max()))
