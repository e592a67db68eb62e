"""Whatever /openapi.json allows, and what it forbids, sent to a gateway: no 5xx, no hang, and no answer it does not
describe."""

from __future__ import annotations

from collections import defaultdict

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.streaming.http_fakes import FakeEngine, fake_app, saying

_CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
_statuses: dict[str, set[int]] = defaultdict(set)  # by path

engine = FakeEngine(script=saying("Hello", together=3))
schema = schemathesis.openapi.from_asgi("/openapi.json", fake_app(engine, max_body_bytes=100_000))
schema.config.generation.update(modes=list(schemathesis.GenerationMode))


@schema.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
def test_no_request_harms_the_server(case: schemathesis.Case) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "fake"  # or every request would end at an unknown model
    response = case.call_and_validate(checks=_CHECKS)
    _statuses[case.path].add(response.status_code)


def test_it_sent_good_requests_and_bad_ones() -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/tokenize", "/v1/detokenize"):
        assert _statuses[path] >= {200, 400}, path
    assert 200 in _statuses["/v1/models"]
