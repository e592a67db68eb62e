"""/v1/audio/voices: the voices that requests can name, made, listed and deleted."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from audio.errors import AudioError
from audio.voices import Voice
from streaming.http.connection import while_connected
from streaming.http.errors import bad_request, unsupported
from streaming.http.fields import checked, read_fields
from streaming.http.served import ServedVoice
from streaming.http.speech.requests import VoiceForm
from streaming.http.speech.schema import AudioVoice, AudioVoiceDeleted, AudioVoiceList
from streaming.http.speech.speaking import model_of
from streaming.speech.references import DEFAULT_VOICE

_MAX_BYTES = 10 << 20
_LEAST_SECONDS = 1.0


async def create_voice(request: Request) -> Response:
    form = await _form(request)
    model = model_of(request.app.state.models, form.model)
    voice = await while_connected(request.receive, _add(model, form))
    return _answer(_shape(voice))


async def list_voices(request: Request) -> Response:
    voices = [_shape(voice) for voice in await asyncio.to_thread(_library_model(request).references.library.list)]
    return _answer(AudioVoiceList(voices, [DEFAULT_VOICE, *(voice.name for voice in voices)]))


async def show_voice(request: Request) -> Response:
    library = _library_model(request).references.library
    return _answer(_shape(await asyncio.to_thread(library.get, request.path_params["id"])))


async def delete_voice(request: Request) -> Response:
    name = request.path_params["id"]
    await asyncio.to_thread(_library_model(request).references.library.delete, name)
    return _answer(AudioVoiceDeleted(name))


async def _form(request: Request) -> VoiceForm:
    fields = await read_fields(request)
    if fields.get("type") not in (None, "audio_sample"):
        raise unsupported('type must be "audio_sample": voices are made of recordings here', "type")
    if "ref_text" not in fields:
        raise bad_request(
            "ref_text is missing: it must be what is said in audio_sample, as there is no speech recognition here",
            "ref_text",
            "missing_required_parameter",
        )
    return checked(VoiceForm, fields)


async def _add(model: ServedVoice, form: VoiceForm) -> Voice:
    size = len(form.audio_sample)
    if size > _MAX_BYTES:
        raise bad_request(f"audio_sample has {size} bytes; at most {_MAX_BYTES} are allowed", "audio_sample")
    if not form.ref_text.strip():
        raise bad_request("ref_text is blank; it must be what is said in audio_sample", "ref_text")
    codec = model.speech.codec
    reference = await model.references.recorded(form.audio_sample, form.ref_text)
    seconds = reference.codes.shape[1] * codec.frame_size / codec.sample_rate
    if seconds < _LEAST_SECONDS:
        raise AudioError(f"audio_sample has {seconds:.2f} s of sound; at least {_LEAST_SECONDS:g} s are needed")
    return await model.references.keep(form.name, [reference], form.speaker_description)


def _library_model(request: Request) -> ServedVoice:
    return model_of(request.app.state.models, request.query_params.get("model"))


def _shape(voice: Voice) -> AudioVoice:
    texts = "\n".join(reference.text for reference in voice.references)
    return AudioVoice(voice.name, int(voice.created_at), voice.name, texts, voice.description, round(voice.duration, 3))


def _answer(record: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(record), media_type="application/json")
