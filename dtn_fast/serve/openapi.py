"""OpenAPI 3.1 document of the service; a test compares it with the routes, and the answers with it."""

from __future__ import annotations

from typing import Any

from dtn_fast.version import __version__

Json = dict[str, Any]
Texts = dict[int, str]
NUMBER, INTEGER, TEXT = {"type": "number"}, {"type": "integer", "minimum": 0}, {"type": "string"}
MAYBE_NUMBER, MAYBE_TEXT = {"type": ["number", "null"]}, {"type": ["string", "null"]}
SHARE = {"type": "number", "minimum": 0, "maximum": 1}
REFUSALS: Texts = {
    400: "the upload is empty, was interrupted, or its form cannot be read",
    408: "the upload was too slow",
    413: "the upload is over the size limit",
    415: "the name has none of the known endings",
    500: "the server failed on this upload",
    503: "all places are taken, or the server is ending",
    507: "the upload cannot be stored",
}
"""Statuses of the routes that take an upload."""
UNREADABLE: Texts = {422: "the file cannot be read as a picture or video, or its pixels are over the limit",
              504: "no verdict within the time limit"}  # fmt: skip


def _object(properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(schema: Json, kind: str = "application/json") -> Json:
    return {kind: {"schema": schema}}


def _answers(status: int, text: str, schema: Json, refusals: Texts | None = None, headers: Json | None = None) -> Json:
    """The answers of a route: its success, and its refusals, which are all of one form."""
    refused = {str(n): {"description": t, "content": _content(_ref("Error"))} for n, t in (refusals or {}).items()}
    if "503" in refused:
        refused["503"]["headers"] = {"Retry-After": {"schema": TEXT}}
    return {str(status): {"description": text, "content": _content(schema), "headers": headers or {}}, **refused}


def _text(statuses: Texts) -> Json:
    return {str(status): {"description": t, "content": _content(TEXT, "text/plain")} for status, t in statuses.items()}


def _upload(name: str, summary: str, answers: Json) -> Json:
    """The operations of a route that takes an upload, as POST and PUT."""
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    form = _object({"file": file})
    query = {"name": "name", "in": "query", "schema": TEXT, "description":
             "the file's name, whose ending says its format; a form's file has its own"}  # fmt: skip
    body = {"required": True, "content": {**_content(file, "application/octet-stream"),
                                          **_content(form, "multipart/form-data")}}  # fmt: skip
    operation = {"summary": summary, "parameters": [query], "requestBody": body, "responses": answers}
    return {method: {"operationId": f"{name}_{method}", **operation} for method in ("post", "put")}


def _schemas() -> Json:
    span = _object({"start": NUMBER, "end": NUMBER, "score": SHARE})
    face = _object({"box": {**_list(NUMBER), "minItems": 4, "maxItems": 4}, "score": SHARE, "person": INTEGER,
                    "novelty": MAYBE_NUMBER,
                    "regions": {"type": ["array", "null"], "items": _list(_list(NUMBER))}})  # fmt: skip
    limits = _object({"fake_from": NUMBER, "real_up_to": NUMBER, "false_alarms": MAYBE_NUMBER,
                      "reals": {"type": ["integer", "null"]}, "novel_from": MAYBE_NUMBER})  # fmt: skip
    return {
        "Error": _object({"error": {"type": "string", "description": "the reason, in one line"}}),
        "About": _object({
            "version": TEXT, "runtime": TEXT, "notice": TEXT, "remarks": _list(TEXT), "max_mb": NUMBER,
            "analysed": TEXT, "pictures": limits, "videos": limits, "formats": _list(TEXT),
            "video_formats": _list(TEXT),
        }),
        "Verdict": _object({
            "path": TEXT, "kind": {"enum": ["picture", "video"]}, "seconds": NUMBER,
            "verdict": {"enum": ["fake", "real", "uncertain", "no face", "failed"]}, "score": MAYBE_NUMBER,
            "reasons": _list(TEXT), "novelty": MAYBE_NUMBER, "threshold": NUMBER, "limits": limits,
            "frame_limits": limits, "rule": TEXT, "notice": TEXT, "notes": _list(TEXT),
            "error": MAYBE_TEXT, "frames_asked": INTEGER, "frames_read": INTEGER, "frames_lost": INTEGER,
            "frames_missing": INTEGER, "frames_with_face": INTEGER, "frames_crowded": INTEGER,
            "people": _list(_object({"number": INTEGER, "score": SHARE, "frames": INTEGER, "spans": _list(span)})),
            "frames": _list(_object({"number": INTEGER, "seconds": NUMBER, "score": SHARE, "faces": _list(face)})),
            "timing": {"type": "object", "additionalProperties": NUMBER},
            "pictures": _list(_object({"number": INTEGER, "seconds": NUMBER, "score": SHARE, "face": TEXT,
                                       "heat": MAYBE_TEXT, "heat_depth": MAYBE_TEXT, "heat_reason": TEXT})),
        }),
        "Job": _object({
            "id": TEXT, "name": TEXT, "state": {"enum": ["queued", "running", "done", "failed", "cancelled"]},
            "frames": _object({"done": INTEGER, "total": {"type": ["integer", "null"]}}), "seconds": NUMBER,
            "error": MAYBE_TEXT,
        }),
    }  # fmt: skip


def document(root_path: str) -> Json:
    """The document of a service under a path prefix."""
    location = {"Location": {"schema": TEXT, "description": "path of the job"}}
    unknown: Texts = {404: "the job is unknown or forgotten"}
    verdict, job = _ref("Verdict"), _ref("Job")
    job_id = [{"name": "id", "in": "path", "required": True, "schema": TEXT}]
    late: Texts = {**unknown, **UNREADABLE, 409: "the job is not finished", 410: "the job was cancelled",
            500: "the server failed on this upload"}  # fmt: skip

    def get(name: str, summary: str, responses: Json) -> Json:
        return {"get": {"operationId": name, "summary": summary, "responses": responses}}

    remove = {"operationId": "job_delete", "summary": "Cancels an unfinished job; forgets a finished one",
              "responses": _answers(200, "the job", job, unknown)}  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "dtn_fast", "version": __version__, "description":
                 "Verdicts on whether pictures and videos show forged faces. Every refusal is JSON with an error."},
        "servers": [{"url": root_path or "/"}],
        "paths": {
            "/": {"get": {"operationId": "page", "summary": "The web page", "responses": {
                "200": {"description": "the page", "content": _content(TEXT, "text/html")}}}},
            "/openapi.json": get("openapi", "This document", _answers(200, "the document", {"type": "object"})),
            "/v1/about": get("about", "Version, runtime and limits", _answers(200, "the facts", _ref("About"))),
            "/v1/detect": _upload("detect", "The verdict on a picture or video",
                                  _answers(200, "the verdict", verdict, {**REFUSALS, **UNREADABLE})),
            "/v1/jobs": _upload("jobs", "A job that makes the verdict on a video",
                                _answers(202, "the job is accepted", job, REFUSALS, location)),
            "/v1/jobs/{id}": {"parameters": job_id, "delete": remove,
                              **get("job", "State and progress of a job", _answers(200, "the job", job, unknown))},
            "/v1/jobs/{id}/result": {"parameters": job_id, **get(
                "result", "The verdict of a finished job", _answers(200, "the verdict", verdict, late))},
            "/healthz": get("healthy", "Whether the server answers", _text({200: "it does"})),
            "/readyz": get("ready", "Whether a place is free", _text({200: "ready", 503: "busy or ending"})),
            "/metrics": get("metrics", "Counters for Prometheus", _text({200: "the counters"})),
        },
        "components": {"schemas": _schemas()},
    }  # fmt: skip
