"""Fuzzing: schemathesis generates valid and invalid requests from the OpenAPI schema.

SCHEMATHESIS_REQUESTS sets how many; the default is for every run of the tests.
"""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig

from nanochat.tokenizer import Tokenizer
from tests.serve.serving import Served, scripted

PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/api/chat", "/api/generate"),
    *("/tokenize", "/detokenize", "/render"),
)
CASES = [
    *((path, mode) for path in PATHS for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)),
    ("/v1/models/{name}", GenerationMode.POSITIVE),  # no name is wrong by its form
]
REQUESTS = int(os.environ.get("SCHEMATHESIS_REQUESTS", "300"))


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer) -> Iterator[Served]:
    with scripted(tokenizer) as (served, _):
        yield served


@pytest.mark.parametrize(("path", "mode"), CASES)
def test_no_request_breaks_the_server(served: Served, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json", config=SchemathesisConfig())
    operation = schema[path]["GET" if "{" in path else "POST"]

    @hypothesis.settings(
        max_examples=-(-REQUESTS // len(CASES)),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        response = case.call(base_url=served.url)
        case.validate_response(response, checks=[not_a_server_error])
        if response.status_code >= 400:
            error = response.json()["error"]
            fields = {"message", "type", "param", "code"}
            assert isinstance(error, str) if path.startswith("/api/") else set(error) == fields

    send()
    assert served.client.get("/health").status_code == 200
