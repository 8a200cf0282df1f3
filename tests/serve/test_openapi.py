"""The OpenAPI document: every route is in it, and what it promises is what is answered."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import jsonschema
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from serving import ask

from dtn_fast import DTN
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.serve.app import Service
from dtn_fast.serve.config import ServeConfig
from dtn_fast.serve.openapi import document

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance,
          unsupported_method]  # fmt: skip


def test_answers_are_as_the_document_says(port: int) -> None:
    """Requests that follow the document, and others that do not, to every operation."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
    statuses: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=3, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            def run(case: Any) -> None:
                answer = case.call_and_validate(checks=CHECKS)
                statuses.setdefault(case.operation.label, set()).add(answer.status_code)

            with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with an operation without parameters
                run()
    assert set(statuses) == {found.ok().label for found in schema.get_all_operations()}
    assert statuses["POST /v1/detect"] >= {415}


def test_every_route_is_in_the_document(model: DTN) -> None:
    routes, service = {}, Service(TorchScorer(model), ServeConfig())
    for route in service.app.app.routes:
        routes[route.path] = {method.lower() for method in route.methods} - {"head"}
    service.judge.close()
    paths = document("")["paths"]
    assert {path: set(operations) - {"parameters"} for path, operations in paths.items()} == routes


def test_a_verdict_and_a_job_are_as_the_document_says(port: int, files: dict[str, bytes]) -> None:
    schemas = document("")["components"]["schemas"]
    answers = {
        "Verdict": ask(port, "POST", "/v1/detect?name=clip.mp4", files["clip.mp4"]),
        "Job": ask(port, "POST", "/v1/jobs?name=blank.png", files["blank.png"]),
        "About": ask(port, "GET", "/v1/about"),
        "Error": ask(port, "POST", "/v1/detect?name=text.png", files["text.png"]),
    }
    for name, (_, text) in answers.items():
        found = json.loads(text)
        jsonschema.validate(found, schemas[name])
        assert set(found) == set(schemas[name]["properties"])
