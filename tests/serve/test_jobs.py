"""Jobs: their states, progress, results, cancelling and forgetting."""

from __future__ import annotations

import json
import time
from typing import Any

from serving import ask, judge, metric, serving

from dtn_fast import DTN
from dtn_fast.runtime.torch_scorer import TorchScorer


def call(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, Any]]:
    status, text = ask(port, method, f"/v1/jobs{path}", body)
    return status, json.loads(text)


def until(port: int, number: str, *states: str) -> dict[str, Any]:
    """The job, once it is in one of these states."""
    end = time.monotonic() + 60
    while (found := call(port, "GET", f"/{number}")[1])["state"] not in states:
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return found


def test_a_job_gives_the_verdict_of_an_upload(port: int, files: dict[str, bytes]) -> None:
    status, made = call(port, "POST", "?name=clip.mp4", files["clip.mp4"])
    assert (status, made["name"], made["frames"]["done"]) == (202, "clip.mp4", 0)
    done = until(port, made["id"], "done")
    assert (done["frames"], done["error"]) == ({"done": 3, "total": 3}, None)
    status, found = call(port, "GET", f"/{made['id']}/result")
    direct = judge(port, "clip.mp4", files["clip.mp4"])[1]
    for one in (found, direct):
        del one["timing"]
    assert (status, found) == (200, direct)
    assert call(port, "DELETE", f"/{made['id']}") == (200, done)
    assert call(port, "GET", f"/{made['id']}")[0] == call(port, "GET", f"/{made['id']}/result")[0] == 404
    assert call(port, "DELETE", "/unknown")[0] == 404


def test_a_job_that_fails(port: int, files: dict[str, bytes]) -> None:
    made = call(port, "PUT", "?name=cut.mp4", files["cut.mp4"])[1]
    assert "cut.mp4: cannot read this video" in until(port, made["id"], "failed")["error"]
    status, found = call(port, "GET", f"/{made['id']}/result")
    assert status == 422
    assert "cut.mp4: cannot read this video" in found["error"]
    assert call(port, "POST", "?name=a.txt", b"x")[0] == 415
    assert metric(port, 'dtn_jobs_total{state="failed"}') == 1


def test_progress_and_cancelling(model: DTN, files: dict[str, bytes]) -> None:
    """A running and a queued job are cancelled; their places are free at once, and nothing stays in the folder."""
    with serving(TorchScorer(model), job_waiting=1, frames=40) as port:
        running = call(port, "POST", "?name=long.mp4", files["long.mp4"])[1]["id"]
        queued = call(port, "POST", "?name=long.mp4", files["long.mp4"])[1]["id"]
        assert call(port, "POST", "?name=long.mp4", files["long.mp4"])[0] == 503
        assert judge(port, "face.jpg", files["face.jpg"])[0] == 200  # uploads have workers of their own
        while not (found := until(port, running, "running"))["frames"]["done"]:
            assert call(port, "GET", f"/{running}/result") == (409, {"error": "the job is running; ask again later"})
        assert (found["frames"]["total"], found["seconds"] > 0) == (40, True)
        assert call(port, "GET", f"/{queued}")[1]["state"] == "queued"
        for number in (queued, running):
            assert call(port, "DELETE", f"/{number}")[1]["state"] == "cancelled"
            assert call(port, "GET", f"/{number}/result") == (410, {"error": "the job was cancelled"})
            if number == queued:
                assert metric(port, "dtn_jobs_inside") == 1
        assert until(port, call(port, "POST", "?name=clip.mp4", files["clip.mp4"])[1]["id"], "done")
        assert metric(port, "dtn_jobs_inside") == 0
        assert metric(port, 'dtn_jobs_total{state="cancelled"}') == 2


def test_finished_jobs_are_forgotten(model: DTN, files: dict[str, bytes]) -> None:
    with serving(TorchScorer(model), keep_jobs=2) as port:
        made = [call(port, "POST", "?name=blank.png", files["blank.png"])[1]["id"] for _ in range(4)]
        until(port, made[3], "done")
        assert [call(port, "GET", f"/{number}")[0] for number in made] == [404, 404, 200, 200]
    with serving(TorchScorer(model), keep_seconds=0.1) as port:
        number = call(port, "POST", "?name=blank.png", files["blank.png"])[1]["id"]
        while call(port, "GET", f"/{number}")[0] == 200:
            time.sleep(0.02)


def test_a_job_over_its_time_limit_fails(model: DTN, files: dict[str, bytes]) -> None:
    with serving(TorchScorer(model), job_timeout=0.05) as port:
        number = call(port, "POST", "?name=long.mp4", files["long.mp4"])[1]["id"]
        found = until(port, number, "failed", "done")
        assert "no verdict within 0.05 s; send a shorter video" in found["error"]
        assert call(port, "GET", f"/{number}/result")[0] == 504
