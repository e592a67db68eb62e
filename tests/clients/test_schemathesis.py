"""Whatever /openapi.json allows, and what it forbids, sent to a gateway: no 5xx, no hang, and no answer it does not
describe."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.streaming.http_fakes import FakeEngine, fake_app, saying

_CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]


schema = schemathesis.openapi.from_asgi(
    "/openapi.json", fake_app(FakeEngine(script=saying("Hello", together=3)), max_body_bytes=100_000)
)
schema.config.generation.update(modes=list(schemathesis.GenerationMode))


@schema.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
def test_no_request_harms_the_server(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=_CHECKS)
