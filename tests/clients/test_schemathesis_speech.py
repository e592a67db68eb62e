"""As `test_schemathesis`, for the paths of speech and voices."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.streaming.speech_fakes import FakeSpeechClient, fake_speech_app
from tests.streaming.speech_server import NAME

_CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
_VOICE = ("voice", "references", "ref_audio", "ref_text", "x_vector_only_mode", "word_timestamps", "duration_seconds")
_statuses: dict[str, set[int]] = defaultdict(set)  # by path
_folder = tempfile.TemporaryDirectory()

_app = fake_speech_app(FakeSpeechClient(), Path(_folder.name), max_body_bytes=100_000)
schema = schemathesis.openapi.from_asgi("/openapi.json", _app).include(path_regex="^/v1/audio/")
schema.config.generation.update(modes=list(schemathesis.GenerationMode))


@schema.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
def test_no_request_harms_the_server(case: schemathesis.Case) -> None:
    if isinstance(case.body, dict):
        if isinstance(case.body.get("model"), str):
            case.body["model"] = NAME  # or every request would end at an unknown model
        if isinstance(case.body.get("input"), str) and len(case.body["input"]) % 2:
            for name in (*_VOICE, "speaker_embedding", "sample_rate"):  # and few at what no voice has
                case.body.pop(name, None)
    response = case.call_and_validate(checks=_CHECKS)
    _statuses[case.path].add(response.status_code)


def test_it_sent_good_requests_and_bad_ones() -> None:
    assert _statuses["/v1/audio/speech"] >= {200, 400}
    assert 200 in _statuses["/v1/audio/voices"]
    assert 404 in _statuses["/v1/audio/voices/{id}"]
