"""``dtn-fast serve`` on loopback: verdicts, limits, bad uploads under load, and the page in headless Chromium."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving import Slow, ask, judge, metric, proxy, serving, wait_for
from small import SMALL

from dtn_fast import DTN
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.errors import UsageError
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.serve.batching import MicroBatcher
from dtn_fast.serve.config import ServeConfig
from dtn_fast.serve.uploads import LOCK

CHROMIUM = shutil.which("chromium")


def test_a_video_gets_verdict_people_frames_and_pictures(port: int, files: dict[str, bytes], model: DTN) -> None:
    status, found = judge(port, "clip.mp4", files["clip.mp4"])
    assert status == 200
    assert found["verdict"] in ("real", "fake")
    assert (found["path"], found["frames_read"], found["frames_with_face"]) == ("clip.mp4", 3, 3)
    assert len(found["people"]) >= 1
    assert found["pictures"][0]["face"].startswith("data:image/jpeg;base64,")
    assert found["pictures"][0]["heat"].startswith("data:image/jpeg;base64,")
    assert (found["pictures"][0]["heat_depth"], found["pictures"][0]["heat_reason"]) == ("head", "")
    assert "person score = mean" in found["rule"]
    assert ask(port, "PUT", "/v1/detect?name=face.jpg", files["face.jpg"])[0] == 200  # curl -T
    about = json.loads(ask(port, "GET", "/v1/about")[1])
    assert (about["runtime"], about["max_mb"], about["notice"]) == ("torch", 1.0, model.notice)
    assert about["analysed"] == "32 frames"


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("text.png", 422, "text.png: cannot read this image"),
        ("cut.mp4", 422, "cut.mp4: cannot read this video"),
        ("list.mp4", 422, "list.mp4: cannot read this video"),
        ("empty.jpg", 400, "the upload is empty"),
        ("blank.png", 200, "blank.png: no face in 1 frame"),
    ],
)
def test_bad_uploads_are_named(name: str, status: int, words: str, port: int, files: dict[str, bytes]) -> None:
    got, found = judge(port, name, files[name])
    assert got == status
    assert words in found["error"]
    assert "/tmp" not in found["error"]


def test_limits_of_what_is_sent(port: int, files: dict[str, bytes]) -> None:
    big = bytes(1_000_001)
    assert judge(port, "a.jpg", big)[0] == 413
    chunks = iter([bytes(600_000)] * 2)  # no content-length: counted as it comes
    assert ask(port, "POST", "/v1/detect?name=a.jpg", chunks)[0] == 413
    for name in ("notes.txt", "", "a", ".jpg/../../etc/passwd"):
        status, found = judge(port, name, b"x")
        assert status == 415
        assert "give the file's name with one of" in found["error"]
    assert ask(port, "GET", "/v1/detect")[0] == 405


def test_whatever_fails_is_one_line_of_json(model: DTN, files: dict[str, bytes]) -> None:
    class Broken(TorchScorer):
        def _outputs(self, crops: np.ndarray) -> np.ndarray:
            return np.full((len(crops), 2), np.nan)

    class Worse(TorchScorer):
        def _outputs(self, crops: np.ndarray) -> np.ndarray:
            raise RuntimeError("out of memory at /secret/path")

    for scorer, words in ((Broken(model), "not finite"), (Worse(model), "the server failed on this upload")):
        with serving(scorer) as port:
            status, found = judge(port, "face.jpg", files["face.jpg"])
            assert status == 500
            assert words in found["error"]
            assert "/secret" not in found["error"]
            assert metric(port, 'dtn_requests_total{status="500"}') == 1
            assert metric(port, "dtn_uploads_inside") == 0


def test_a_video_that_never_gives_a_frame_ends_at_the_time_limit(
    model: DTN, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(path: Path, count: object, threads: int, check: Any, *_: object) -> Iterator[Any]:
        while True:
            check()
            time.sleep(0.01)
        yield

    monkeypatch.setattr("dtn_fast.detect.pipeline.frames_of", endless)
    with serving(TorchScorer(model), workers=1, timeout=1.0) as port:
        begin = time.monotonic()
        assert judge(port, "clip.mp4", files["clip.mp4"])[0] == 504
        assert time.monotonic() - begin < 10
        assert not [t for t in threading.enumerate() if t.name == "decoding"]


def test_only_the_routes_exist(port: int) -> None:
    for path in (
        "/../pyproject.toml",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/serving.html",
        "//etc/passwd",
        "/static/x",
        "/v1/",
    ):
        assert ask(port, "GET", path)[0] == 404
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/")
    answer = connection.getresponse()
    page = answer.read()
    assert b"Is this face forged?" in page
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    connection.close()
    assert ask(port, "GET", "/healthz") == (200, b"ok\n")
    assert ask(port, "GET", "/readyz") == (200, b"ready\n")


def test_under_load_nothing_is_lost(model: DTN, files: dict[str, bytes]) -> None:
    """Good and bad uploads from 12 threads: every one is answered, rightly, and counted; nothing stays behind."""
    expected = {"clip.mp4": 200, "face.jpg": 200, "blank.png": 200, "cut.mp4": 422, "text.png": 422, "empty.jpg": 400,
                "list.mp4": 422}  # fmt: skip
    names = [name for _ in range(8) for name in expected]
    with serving(TorchScorer(model), waiting=100) as port:
        alone = judge(port, "clip.mp4", files["clip.mp4"])[1]["score"]
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda name: judge(port, name, files[name]), names))
        assert [status for status, _ in answers] == [expected[name] for name in names]
        scores = [found["score"] for name, (_, found) in zip(names, answers, strict=True) if name == "clip.mp4"]
        assert scores == pytest.approx([alone] * 8, abs=1e-5)
        assert metric(port, 'dtn_requests_total{status="200"}') == 1 + 24
        assert metric(port, 'dtn_requests_total{status="422"}') == 24
        assert metric(port, "dtn_faces_total") == 9 * 3 + 8
        assert metric(port, "dtn_uploads_inside") == 0
        assert 0 < metric(port, "dtn_batches") < 9 * 3 + 8  # shared


def test_a_full_house_says_come_back(model: DTN, files: dict[str, bytes]) -> None:
    scorer = Slow(model)
    scorer.wait = 0.3
    with serving(scorer, workers=1, waiting=1) as port:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: judge(port, "face.jpg", files["face.jpg"])[0], range(8)))
        assert set(answers) == {200, 503}
        assert 2 <= answers.count(200) < 8
        assert judge(port, "face.jpg", files["face.jpg"])[0] == 200  # and is there again


def test_time_limits(model: DTN, files: dict[str, bytes]) -> None:
    scorer = Slow(model)
    with serving(scorer, workers=1, timeout=0.4) as port:
        with socket.create_connection(("127.0.0.1", port)) as slow:  # an upload that never ends
            slow.sendall(b"POST /v1/detect?name=a.jpg HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
            slow.settimeout(10)
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        scorer.wait = 0.5
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            answers = [s for s, _ in pool.map(lambda _: judge(port, "face.jpg", files["face.jpg"]), range(3))]
        assert 504 in answers  # waited too long behind the others
        scorer.wait = 0.0
        assert judge(port, "face.jpg", files["face.jpg"])[0] == 200


def test_uploads_leave_nothing_behind(model: DTN, files: dict[str, bytes], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with serving(TorchScorer(model)) as port:
        for name in ("clip.mp4", "text.png", "face.jpg"):
            judge(port, name, files[name])
        (folder,) = tmp_path.iterdir()
        assert [path.name for path in folder.iterdir()] == [LOCK]
        assert oct(folder.stat().st_mode & 0o777) == "0o700"
    assert list(tmp_path.iterdir()) == []


def test_the_command_serves_and_a_signal_ends_it_with_all_answers(
    model: DTN, files: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGTERM while two uploads and a job are inside: all are answered, a new upload is refused, the exit code is 0."""
    model.save_pretrained(tmp_path / "model")
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    command = [sys.executable, "-m", "dtn_fast", "serve", str(tmp_path / "model"), "--workers", "1", "--frames", "12",
               "--port", "0"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "TMPDIR": str(uploads)})  # fmt: skip
    try:
        assert process.stdout
        port = int(process.stdout.readline().split("http://127.0.0.1:")[1].split(" ")[0])
        busy = subprocess.run([*command[:-1], str(port)], capture_output=True, text=True)
        assert busy.returncode == 2
        assert "Address already in use; choose another" in busy.stderr
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(judge, port, "long.mp4", files["long.mp4"]) for _ in range(2)]
            job = json.loads(ask(port, "POST", "/v1/jobs?name=long.mp4", files["long.mp4"])[1])["id"]
            wait_for(lambda: metric(port, "dtn_uploads_inside") == 2)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: ask(port, "GET", "/readyz") == (503, b"ending\n"))
            status, found = judge(port, "face.jpg", files["face.jpg"])
            assert (status, found["error"]) == (503, "the server is ending; try again in a few seconds")
            assert [answer.result()[0] for answer in answers] == [200, 200]
        wait_for(lambda: json.loads(ask(port, "GET", f"/v1/jobs/{job}")[1])["state"] == "done")
        assert ask(port, "GET", f"/v1/jobs/{job}/result")[0] == 200
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in errors
    assert process.returncode == 0
    assert list(uploads.iterdir()) == []


def test_settings_out_of_range() -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"workers": 0}, "--workers"), ({"port": 70000}, "--port 70000"), ({"max_mb": 0}, "--max-mb"),
        ({"root_path": "x"}, "--root-path x"), ({"root_path": "/x/"}, "--root-path /x/"),
        ({"allow_origin": ("https://a.org/",)}, "--allow-origin https://a.org/"),
    )  # fmt: skip
    for fields, word in wrong:
        with pytest.raises(UsageError, match=word):
            ServeConfig(**fields)


# ------------------------------------------------------------------------------------------------ batches


def test_concurrent_calls_share_batches(model: DTN, dataset: CropDataset) -> None:
    crops = dataset.get(np.arange(24))
    alone = TorchScorer(model).score(crops)
    scorer = Slow(model, batch_size=16)
    scorer.wait = 0.02
    with MicroBatcher(scorer, wait=0.05) as batcher:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            parts = list(pool.map(lambda i: batcher.score(crops[2 * i : 2 * i + 2]), range(12)))
        assert np.concatenate(parts) == pytest.approx(alone, abs=1e-6)
        assert batcher.crops == 24
        assert batcher.batches <= 4
        assert batcher.score(crops) == pytest.approx(alone, abs=1e-6)  # larger than a batch
        with pytest.raises(UsageError, match=r"it takes uint8 \[B, 64, 64, 3\]"):
            batcher.score(crops.astype(np.float32))
    with pytest.raises(UsageError, match="closed"):
        batcher.score(crops)


def test_an_error_reaches_every_caller_of_its_batch_and_no_other(model: DTN, dataset: CropDataset) -> None:
    class Failing(TorchScorer):
        def _outputs(self, crops: np.ndarray) -> np.ndarray:
            if (crops == 7).all((1, 2, 3)).any():
                raise RuntimeError("seven")
            return super()._outputs(crops)

    crops = dataset.get(np.arange(2))
    with MicroBatcher(Failing(model), wait=0.0) as batcher:
        with pytest.raises(RuntimeError, match="seven"):
            batcher.score(np.full_like(crops, 7))
        assert batcher.score(crops).shape == (2,)


# ------------------------------------------------------------------------------------------------ the page


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize(("width", "prefix"), [(900, ""), (390, "/fakes")], ids=["wide", "narrow, behind a proxy"])
def test_the_page_in_a_browser(width: int, prefix: str, model: DTN, files: dict[str, bytes], tmp_path: Path) -> None:
    """A video is a job with progress, a verdict with timeline and heat maps, and can be cancelled; a picture has a
    verdict at once; a bad file is named; nothing breaks the policy."""
    from playwright.sync_api import sync_playwright

    for name in ("clip.mp4", "long.mp4", "text.png", "face.jpg"):
        (tmp_path / name).write_bytes(files[name])
    evil = tmp_path / "<img src=x onerror=alert(1)>.jpg"
    evil.write_bytes(files["face.jpg"])
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with (
        serving(TorchScorer(model), max_mb=1.0, root_path=prefix) as inner,
        proxy(inner, prefix, strip=True) as port,
        sync_playwright() as play,
    ):
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": width, "height": 900})
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))

        def shoot(name: str) -> None:
            if folder := os.environ.get("DTN_FAST_SCREENSHOTS"):
                page.screenshot(path=str(Path(folder, f"{name}-{width}.png")), full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"

        page.goto(f"http://127.0.0.1:{port}{prefix}/")
        page.wait_for_selector("#limits:has-text('1 MB')")
        page.set_input_files("#file", str(tmp_path / "long.mp4"))
        page.wait_for_selector("#state:has-text('of 32 frames')")
        shoot("progress")
        page.click("#state button")
        page.wait_for_selector("#state .error:has-text('long.mp4: cancelled')")
        assert page.locator(".card").count() == 0
        page.set_input_files("#file", str(tmp_path / "clip.mp4"))
        page.wait_for_selector(".card .verdict")
        assert page.inner_text(".card h2") == "clip.mp4"
        assert "P(fake)" in page.inner_text(".card .verdict")
        assert page.locator(".card svg circle").count() == 3
        assert page.locator(".card figure img[alt*='heat map']").count() == page.locator(".card figure").count() > 0
        assert "heat map from the model's head" in page.locator(".card figcaption").first.inner_text()
        page.set_input_files("#file", str(evil))
        page.locator(".card").nth(1).wait_for()
        assert page.locator(".card h2").first.inner_text() == evil.name
        page.set_input_files("#file", str(tmp_path / "text.png"))
        page.wait_for_selector("#state .error:has-text('cannot read this image')")
        shoot("page")
        page.click("#about a")
        page.wait_for_selector("text=openapi")
        blank = DTN(SMALL).eval()
        blank.head.weight.data.zero_()
        blank.head.bias.data = torch.tensor([0.0, 3.0])
        with serving(TorchScorer(blank)) as other:
            page.goto(f"http://127.0.0.1:{other}/")
            page.set_input_files("#file", str(tmp_path / "face.jpg"))
            page.wait_for_selector(".card figure .unexplained:has-text('no region explains this score')")
            assert not page.locator(".card figure img[alt*='heat map']").count()
            assert "heat map" not in page.inner_text(".card")
            shoot("unexplained")
        browser.close()
        assert metric(inner, 'dtn_jobs_total{state="cancelled"}') == metric(inner, 'dtn_jobs_total{state="done"}') == 1
    assert [text for text in said if "422" not in text] == []
