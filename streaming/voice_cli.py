"""`triptych say` and `triptych voices`: speech and voices without a server."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from audio.voices import Reference, VoiceLibrary
from streaming.settings import SettingsError, voices_folder

NO_MODEL = "no speech model comes with Triptych yet: name one with --model, a folder or a hub id"

Folder = Annotated[Path | None, typer.Option("--voices", help="Folder of the voice library.")]

voices_app = typer.Typer(no_args_is_help=True, help="The voices that requests and `triptych say` can name.")


@voices_app.command("add")
def add_voice(
    name: Annotated[str, typer.Argument(help="What requests call it.")],
    file: Annotated[Path, typer.Argument(help="A recording of 1 to 60 seconds: wav, mp3, flac, ...")],
    text: Annotated[str, typer.Option(help="What is said in it, word for word.")],
    model: Annotated[
        str | None, typer.Option(help="The speech model that the voice is for: a folder or a hub id.")
    ] = None,
    description: Annotated[str, typer.Option(help="A note about it.")] = "",
    voices: Folder = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Make a voice of a recording."""
    with _errors():
        if model is None:
            raise SettingsError(NO_MODEL)
        from modalities.offline_speech import Recorder
        from streaming.speech.references import refuse_reserved

        refuse_reserved(name)
        recorder = Recorder(model, device)
        codec = recorder.speech.codec
        voice = _library(voices).add(
            name,
            [recorder.reference(file, text)],
            codec=recorder.speech.codec_fingerprint,
            sample_rate=codec.sample_rate,
            samples_per_frame=codec.frame_size,
            description=description,
        )
        print(f"{voice.name}: {voice.duration:.1f} s, {voice.frames} frames")


@voices_app.command("list")
def list_voices(voices: Folder = None) -> None:
    """All voices, with their lengths and what is said in them."""
    with _errors():
        for voice in _library(voices).list():
            said = " / ".join(reference.text for reference in voice.references)
            print(f"{voice.name}\t{voice.duration:.1f} s\t{said if len(said) <= 60 else said[:57] + '...'}")


@voices_app.command("rename")
def rename_voice(old: str, new: str, voices: Folder = None) -> None:
    """Give a voice another name."""
    with _errors():
        from streaming.speech.references import refuse_reserved

        refuse_reserved(new)
        _library(voices).rename(old, new)


@voices_app.command("delete")
def delete_voice(name: str, voices: Folder = None) -> None:
    """Delete a voice."""
    with _errors():
        _library(voices).delete(name)


def say(
    text: Annotated[str, typer.Argument(help="What is spoken; [whisper] and the like say how.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A file that ends in .wav, .mp3, .flac, .opus, .aac or .pcm.")
    ],
    model: Annotated[str | None, typer.Option(help="A speech model: a folder or a hub id.")] = None,
    voice: Annotated[
        str | None, typer.Option(help="A voice's name, or a recording. [default: the model's own]")
    ] = None,
    ref_text: Annotated[str | None, typer.Option(help="What is said in the recording.")] = None,
    style: Annotated[str, typer.Option(help="How it is said, such as whisper.")] = "",
    speed: Annotated[float, typer.Option(min=0.25, max=4)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same speech.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.7,
    max_frames: Annotated[int, typer.Option(min=1, help="Of each part of the text.")] = 1024,
    voices: Folder = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")] = None,
) -> None:
    """Speak a text into a file, without a server."""
    with _errors():
        if model is None:
            raise SettingsError(NO_MODEL)
        options = {"style": style, "seed": seed, "temperature": temperature, "max_frames": max_frames}
        engine = {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
        _say(text, out, model, voice, ref_text, speed, options, engine, voices)


def _say(
    text: str,
    out: Path,
    source: str,
    voice: str | None,
    ref_text: str | None,
    speed: float,
    options: Mapping[str, Any],
    engine_options: Mapping[str, Any],
    folder: Path | None,
) -> None:
    from audio.effects import Effects
    from audio.formats import encode_whole
    from modalities import load
    from modalities.offline_speech import VoiceModel, format_of

    kind = format_of(out)
    console = Console(stderr=True, highlight=False)
    with console.status(f"loading {source}"):
        model = load(source, **engine_options)
    if not isinstance(model, VoiceModel):
        raise ValueError(f"{source} makes text and cannot speak; use triptych chat")
    references = _references(model, voice, ref_text, folder)
    effects = Effects(model.sample_rate, speed=speed)
    take = _Take()
    with _progress(console) as bar:
        task = bar.add_task("", total=None)
        for samples in model.say_stream(text, references, **options):
            take.add(effects.push(samples), len(samples) / model.sample_rate)
            bar.update(task, completed=take.seconds)
    take.add(effects.finish(), 0)
    out.write_bytes(encode_whole(np.concatenate(take.pieces), kind, source_rate=model.sample_rate))
    print(f"{out}: {take.figures}")


class _Take:
    """A speech as it is made, timed."""

    def __init__(self) -> None:
        self.pieces: list[np.ndarray] = []
        self.seconds = 0.0  # of sound, as the model makes it
        self._start = time.perf_counter()
        self._took = 0.0
        self._first: float | None = None

    def add(self, samples: np.ndarray, seconds: float) -> None:
        self._took = time.perf_counter() - self._start
        if self._first is None and seconds:
            self._first = self._took
        self.pieces.append(samples)
        self.seconds += seconds

    @property
    def figures(self) -> str:
        if self._first is None:
            return "the model said nothing"
        factor = self._took / self.seconds
        first = f"first sound after {self._first * 1000:.0f} ms"
        return f"{self.seconds:.2f} s of speech in {self._took:.2f} s, RTF {factor:.2f}, {first}"


def _progress(console: Console) -> Progress:
    columns = (TextColumn("speaking"), BarColumn(), TextColumn("{task.completed:.1f} s of sound"), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _references(model: Any, voice: str | None, ref_text: str | None, folder: Path | None) -> list[Reference]:
    if voice is not None and Path(voice).is_file():
        if not (ref_text or "").strip():
            raise SettingsError(f"{voice} is a recording and needs --ref-text, what is said in it")
        return [model.reference(voice, ref_text)]
    if ref_text is not None:
        raise SettingsError("--ref-text goes with a recording as --voice")
    if voice is None:
        return []
    return list(_library(folder, model.speech.codec_fingerprint).get(voice).references)


def _library(folder: Path | None, codec: str | None = None) -> VoiceLibrary:
    return VoiceLibrary(folder or voices_folder(), codec=codec)


@contextmanager
def _errors() -> Iterator[None]:
    """What a user can mend is one line, and exit status 1."""
    try:
        yield
    except (ValueError, LookupError, RuntimeError, OSError) as error:
        print(f"triptych: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
