"""`triptych say`, `triptych voices` and `modalities.load` of a speech checkpoint, without a server."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from ar_core.request import FinishReason, RequestError
from audio.voices import VoiceLibrary
from modalities import load
from modalities.offline_speech import VoiceModel
from modalities.speech.chunks import PACES
from streaming.cli import app
from tests.audio.sounds import decoded
from tests.streaming.speech_server import RATE, TINY, TRANSCRIPT, recording

TEXT = "The quick brown fox."
GREEDY: dict[str, Any] = {"temperature": 0, "max_frames": 24}


@pytest.fixture(scope="module")
def model() -> VoiceModel:
    loaded = load(str(TINY), device="cpu", dtype="float32")
    assert isinstance(loaded, VoiceModel)
    return loaded


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_file(TINY / "speech.safetensors").items()}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def say(*arguments: object) -> Result:
    return run("say", *arguments, "--model", TINY, "--dtype", "float32", "--device", "cpu", "--temperature", "0")


def test_a_loaded_model_says_what_the_reference_computes(model: VoiceModel, golden: dict[str, np.ndarray]) -> None:
    speech = model.say(TEXT, **GREEDY)
    assert np.abs(speech.samples - golden["audio_noref"]).max() < 1e-4
    assert (speech.sample_rate, speech.frames, speech.finish) == (RATE, 24, FinishReason.LENGTH)
    assert speech.seconds == pytest.approx(24 * 2048 / RATE)
    assert speech.prompt_tokens == 85
    again = model.say(TEXT, **GREEDY)
    assert again.cached_tokens == 84 and np.array_equal(again.samples, speech.samples)


def test_pieces_are_the_whole_and_stopping_early_leaves_nothing(model: VoiceModel) -> None:
    whole = model.say(TEXT, **GREEDY).samples
    assert np.array_equal(np.concatenate(list(model.say_stream(TEXT, **GREEDY))), whole)
    stream = model.say_stream(TEXT, **GREEDY)
    assert np.array_equal(next(stream), whole[: PACES["normal"].first * 2048])
    stream.close()
    assert not model.engine.has_work and model.engine.stats().running == 0
    assert len(list(itertools.islice(model.say_stream(TEXT, latency="low", **GREEDY), 3))) == 3
    assert not model.engine.has_work


def test_a_recording_is_a_voice(model: VoiceModel, tmp_path: Path) -> None:
    file = tmp_path / "me.wav"
    file.write_bytes(recording())
    voice = model.reference(file, TRANSCRIPT)
    assert voice.codes.shape[0] == 10
    assert not np.array_equal(model.say(TEXT, voice, **GREEDY).samples, model.say(TEXT, **GREEDY).samples)
    with pytest.raises(RequestError, match="nothing to speak"):
        model.say(" ")


def test_a_speech_is_saved_in_the_format_of_its_name(model: VoiceModel, tmp_path: Path) -> None:
    speech = model.say(TEXT, **GREEDY)
    speech.save(tmp_path / "x.flac")
    samples, rate = soundfile.read(tmp_path / "x.flac", dtype="float32")
    assert rate == RATE and np.abs(samples - speech.samples).max() < 1e-4
    with pytest.raises(ValueError, match=r"'x\.m4a' does not end like a sound file; these do: \.wav"):
        speech.save("x.m4a")


@pytest.mark.parametrize("suffix", ["wav", "mp3", "opus", "aac"])
def test_say_writes_by_the_suffix(tmp_path: Path, golden: dict[str, np.ndarray], suffix: str) -> None:
    out = tmp_path / f"out.{suffix}"
    result = say(TEXT, "-o", out, "--max-frames", 24)
    assert result.exit_code == 0, result.output
    assert "1.11 s of speech in" in result.output and "RTF" in result.output and "first sound after" in result.output
    rate, samples = decoded(out.read_bytes())
    assert len(samples) / rate == pytest.approx(1.11, abs=0.1)
    if suffix == "wav":
        assert np.abs(samples - golden["audio_noref"]).max() < 2e-4


def test_say_faster_is_shorter(tmp_path: Path) -> None:
    assert say(TEXT, "-o", tmp_path / "x.wav", "--max-frames", 24, "--speed", 2).exit_code == 0
    assert soundfile.info(tmp_path / "x.wav").duration == pytest.approx(1.11 / 2, abs=0.01)


def test_voices_are_made_listed_used_renamed_and_deleted(tmp_path: Path) -> None:
    folder, sound = tmp_path / "voices", tmp_path / "me.wav"
    sound.write_bytes(recording())
    where = ("--voices", folder)
    made = run("voices", "add", "ann", sound, "--text", TRANSCRIPT, "--model", TINY, "--device", "cpu", *where)
    assert made.exit_code == 0 and made.output == "ann: 1.5 s, 33 frames\n"
    assert run("voices", "list", *where).output == f"ann\t1.5 s\t{TRANSCRIPT}\n"
    taken = run("voices", "add", "ann", sound, "--text", "x", "--model", TINY, "--device", "cpu", *where)
    assert taken.exit_code == 1 and "there is a voice 'ann' already" in taken.stderr

    named, recorded = tmp_path / "named.wav", tmp_path / "recorded.wav"
    assert say(TEXT, "-o", named, "--voice", "ann", "--max-frames", 8, *where).exit_code == 0
    assert say(TEXT, "-o", recorded, "--voice", sound, "--ref-text", TRANSCRIPT, "--max-frames", 8).exit_code == 0
    assert named.read_bytes() == recorded.read_bytes()

    assert run("voices", "rename", "ann", "bob", *where).exit_code == 0
    assert [voice.name for voice in VoiceLibrary(folder).list()] == ["bob"]
    unknown = say(TEXT, "-o", named, "--voice", "ann", *where)
    assert unknown.exit_code == 1 and "there is no voice 'ann'; there are 'bob'" in unknown.stderr
    assert run("voices", "delete", "bob", *where).exit_code == 0
    assert run("voices", "delete", "bob", *where).exit_code == 1
    assert run("voices", "list", *where).output == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("say", "Hi.", "-o", "x.wav"), "name one with --model"),
        (("say", "Hi.", "-o", "x.m4a", "--model", TINY), "does not end like a sound file"),
        (("say", "Hi.", "-o", "x.wav", "--model", "nowhere"), "there is no file or folder 'nowhere'"),
        (("say", " ", "-o", "x.wav", "--model", TINY, "--device", "cpu"), "nothing to speak"),
        (("say", "Hi.", "-o", "x.wav", "--model", TINY, "--voice", __file__), "needs --ref-text"),
        (("say", "Hi.", "-o", "x.wav", "--model", TINY, "--ref-text", "x"), "--ref-text goes with a recording"),
        (("chat", "--model", TINY), "speaks and cannot chat"),
        (("voices", "add", "x", __file__, "--text", "x"), "name one with --model"),
        (("voices", "add", "x", __file__, "--text", "x", "--model", TINY), "cannot be decoded"),
        (("voices", "add", "default", __file__, "--text", "x", "--model", TINY), "choose another name"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    arguments: tuple[object, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    result = run(*arguments)
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("triptych: ")]
    assert len(lines) == 1 and message in lines[0], result.stderr
    assert not list(tmp_path.glob("x.*"))
