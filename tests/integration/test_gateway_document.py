"""Requests made from the gateway's own OpenAPI document, right and wrong ones: none fails it, none hangs.

``SCHEMATHESIS_REQUESTS=5000`` makes more of them than the suite does.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.integration.gateways import Gateway, write_run
from tests.integration.processes import Commands

REQUESTS = int(os.environ.get("SCHEMATHESIS_REQUESTS", "300"))
SEED = 20261128
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
pytestmark = [pytest.mark.process, pytest.mark.timeout(max(400, REQUESTS))]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    commands = Commands(tmp_path_factory.mktemp("gateway"))
    yield Gateway(commands, write_run(tmp_path_factory.mktemp("federation")))
    commands.end()


def test_no_request_fails_the_gateway(gateway: Gateway, record_property: Any) -> None:
    base = gateway.url.removesuffix("/v1")
    schema = schemathesis.openapi.from_url(f"{base}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    seen: Counter[int] = Counter()
    for operation in operations:
        count = int(REQUESTS * (0.46 if operation.path.endswith("completions") else 0.05))
        cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))

        @seed(SEED)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases, known=st.integers(0, 3))
        def asked(case: Any, known: int) -> None:
            if known and isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = gateway.model
            if known > 1 and isinstance(case.body, dict):  # more of those that compute
                case.body = {**case.body, "max_tokens": 8, "logit_bias": None, "stream_options": None}
            response = case.call(base_url=base, timeout=60)
            seen[response.status_code] += 1
            case.validate_response(response, checks=CHECKS)

        asked()
    record_property("statuses", dict(seen))
    print(f"{seen.total()} requests: {dict(sorted(seen.items()))}")
    assert seen.total() >= 0.9 * REQUESTS
    assert seen[200] > 0
    assert not [status for status in seen if status >= 500]
    assert requests.get(f"{base}/healthz", timeout=60).json()["running"] == 0
    assert "Traceback" not in gateway.log
    assert "ERROR" not in gateway.log
