import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio.effects import Effects
from audio.errors import AudioError
from audio.filters import Resampler
from tests.audio.sounds import cut_at, dominant_hertz, level_beside, tone, vowels

RATE = 44100


def through(effects: Effects | Resampler, pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([*(effects.push(p) for p in pieces), effects.finish()])


@pytest.mark.parametrize("speed", [0.25, 0.4, 0.5, 0.8, 1.0, 1.25, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("rate", [8000, 24000, 44100])
def test_speed_changes_the_length_and_not_the_pitch(speed: float, rate: int) -> None:
    got = through(Effects(rate, speed=speed), [tone(440, 2, rate)])
    assert len(got) == round(2 * rate / speed)
    assert dominant_hertz(got, rate) == pytest.approx(440, abs=3)
    body = got[len(got) // 10 : -len(got) // 10]
    assert np.sqrt(np.mean(body**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)
    assert len(got) < rate // 4 or level_beside(body, rate, 440) < -30


@pytest.mark.parametrize("speed", [0.5, 1.5, 2.0])
def test_the_end_of_the_sound_is_not_lost(speed: float) -> None:
    sound = np.concatenate([np.zeros(RATE, np.float32), tone(440, 0.1, RATE)])
    got = through(Effects(RATE, speed=speed), [sound])
    last = got[-round(0.08 * RATE / speed) :]
    assert np.abs(last).max() > 0.3
    short = through(Effects(RATE, speed=speed), [tone(440, 0.01, RATE)])
    assert len(short) == round(441 / speed) and np.abs(short).max() > 0.3


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 10**6), max_size=40),
    st.sampled_from([0.25, 0.5, 0.7, 1.0, 1.3, 2.0, 4.0]),
    st.sampled_from([-6.0, 0.0, 12.0]),
    st.floats(0, 0.4),
)
def test_effects_in_any_pieces_are_the_whole(cuts: list[int], speed: float, volume: float, seconds: float) -> None:
    sound = vowels(seconds, 24000)
    whole = through(Effects(24000, speed=speed, volume=volume), [sound])
    np.testing.assert_array_equal(
        through(Effects(24000, speed=speed, volume=volume), cut_at(sound, cuts)), whole, strict=True
    )
    assert len(whole) == round(len(sound) / speed)


def test_volume_is_in_decibels_and_clips_at_full_scale() -> None:
    sound = tone(440, 0.1, RATE, level=0.4)
    np.testing.assert_allclose(through(Effects(RATE, volume=-20), [sound]), sound / 10, rtol=1e-6)
    np.testing.assert_allclose(through(Effects(RATE, volume=6), [sound]), sound * 1.99526, rtol=1e-5)
    loud = through(Effects(RATE, volume=20), [sound])
    assert loud.max() == 1 and loud.min() == -1


def test_sound_comes_out_while_it_goes_in() -> None:
    effects = Effects(RATE, speed=1.25)
    given = np.cumsum([len(effects.push(p)) for p in cut_at(tone(440, 1, RATE), list(range(882, RATE, 882)))])
    due = np.arange(1, 51) * 882 / 1.25
    assert (due - given).max() < 0.15 * RATE


def test_a_resampler_keeps_a_tone_pure_in_any_pieces() -> None:
    for source, target in [(44100, 24000), (24000, 44100), (48000, 44100), (44100, 8000)]:
        sound = tone(1000, 1, source)
        whole = through(Resampler(source, target), [sound])
        pieces = through(Resampler(source, target), cut_at(sound, list(range(0, source, 333))))
        np.testing.assert_array_equal(pieces, whole)
        assert abs(len(whole) - target) <= 1
        assert level_beside(pieces[target // 10 : -target // 10], target, 1000) < -80


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"speed": 0.2}, "speed is 0.2; it goes from 0.25 to 4"),
        ({"speed": float("nan")}, "speed is nan"),
        ({"volume": 21.0}, "volume is 21.0; it goes from -20 to 20"),
    ],
)
def test_an_error_names_the_value_and_the_range(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(AudioError, match=message):
        Effects(RATE, **wrong)
