"""``dtn-fast serve`` on loopback: verdicts, limits, bad uploads under load, and the page in headless Chromium."""

from __future__ import annotations

import concurrent.futures
import contextlib
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
import uvicorn
from PIL import Image
from skimage import data
from small import SMALL

from dtn_fast import DTN
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.video_writer import write_video
from dtn_fast.detect.config import DetectConfig
from dtn_fast.errors import UsageError
from dtn_fast.runtime.scorer import Scored
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.serve.app import Judge, create_app
from dtn_fast.serve.batching import MicroBatcher
from dtn_fast.serve.config import ServeConfig

CHROMIUM = shutil.which("chromium")


class Slow(TorchScorer):
    """Takes its time, and counts."""

    wait = 0.0

    def judge(self, crops: np.ndarray) -> Scored:
        time.sleep(self.wait)
        return super().judge(crops)

    def _outputs(self, crops: np.ndarray) -> np.ndarray:
        time.sleep(self.wait)
        return super()._outputs(crops)


@contextlib.contextmanager
def serving(scorer: TorchScorer, **limits: Any) -> Iterator[int]:
    """The port of a server in a thread; limits: fields of ServeConfig and DetectConfig."""
    looked = DetectConfig(**{name: limits.pop(name) for name in ("frames", "threshold") if name in limits})
    app = create_app(scorer, ServeConfig(**limits), looked)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def ask(
    port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def judge(port: int, name: str, body: bytes) -> tuple[int, dict[str, Any]]:
    status, text = ask(port, "POST", f"/v1/detect?name={name}", body)
    return status, json.loads(text)


def metric(port: int, name: str) -> float:
    lines = ask(port, "GET", "/metrics")[1].decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Good and bad uploads by name."""
    folder = tmp_path_factory.mktemp("uploads")
    face = data.astronaut()[:256, 96:352]
    write_video(folder / "clip.mp4", [face, np.hstack([face, face])[:, :256], face], fps=2)
    Image.fromarray(face).save(folder / "face.jpg")
    Image.fromarray(np.zeros((90, 70, 3), np.uint8)).save(folder / "blank.png")
    made = {p.name: p.read_bytes() for p in folder.iterdir()}
    made |= {"cut.mp4": made["clip.mp4"][:200], "text.png": b"hello", "empty.jpg": b""}
    made["list.mp4"] = b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n"
    return made


@pytest.fixture(scope="module")
def model() -> DTN:
    torch.manual_seed(3)
    model = DTN(SMALL).eval()
    torch.nn.init.normal_(model.head.weight)  # so that its heat maps show a region
    return model


@pytest.fixture(scope="module")
def port(model: DTN) -> Iterator[int]:
    with serving(TorchScorer(model), max_mb=1.0) as number:
        yield number


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
        ("empty.jpg", 400, "the body is empty"),
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
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    status, text = ask(port, "POST", "/v1/detect?name=a.jpg", b"--x--", form)
    assert status == 415
    assert b"curl -T" in text
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
    def endless(path: Path, count: object, check: Any, reading: Any) -> Iterator[Any]:
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
    names = [name for _ in range(15) for name in expected]
    with serving(TorchScorer(model), waiting=100) as port:
        alone = judge(port, "clip.mp4", files["clip.mp4"])[1]["score"]
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda name: judge(port, name, files[name]), names))
        assert [status for status, _ in answers] == [expected[name] for name in names]
        scores = [found["score"] for name, (_, found) in zip(names, answers, strict=True) if name == "clip.mp4"]
        assert scores == pytest.approx([alone] * 15, abs=1e-5)
        assert metric(port, 'dtn_requests_total{status="200"}') == 1 + 45
        assert metric(port, 'dtn_requests_total{status="422"}') == 45
        assert metric(port, "dtn_faces_total") == 16 * 3 + 15
        assert metric(port, "dtn_uploads_inside") == 0
        assert 0 < metric(port, "dtn_batches") < 16 * 3 + 15  # shared


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
        assert list(folder.iterdir()) == []
        assert oct(folder.stat().st_mode & 0o777) == "0o700"
    assert list(tmp_path.iterdir()) == []


def test_the_command_serves_and_ends_on_a_signal(trained: Path, files: dict[str, bytes]) -> None:
    command = [sys.executable, "-m", "dtn_fast", "serve", str(trained), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        line = process.stdout.readline()
        port = int(line.split("http://127.0.0.1:")[1].split(" ")[0])
        assert "synthetic" in process.stdout.readline()
        assert judge(port, "face.jpg", files["face.jpg"])[0] == 200
        busy = subprocess.run([*command[:-1], str(port)], capture_output=True, text=True)
        assert busy.returncode == 2
        assert "Address already in use; choose another" in busy.stderr
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors


def test_settings_out_of_range() -> None:
    for fields, word in (({"workers": 0}, "--workers"), ({"port": 70000}, "--port 70000"), ({"max_mb": 0}, "--max-mb")):
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


def test_a_judge_closes_clean(model: DTN) -> None:
    judge_ = Judge(TorchScorer(model), ServeConfig(), DetectConfig())
    folder = Path(judge_._folder.name)
    assert folder.is_dir()
    judge_.close()
    assert not folder.exists()


# ------------------------------------------------------------------------------------------------ the page


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1100, 390])
def test_the_page_in_a_browser(width: int, port: int, files: dict[str, bytes], tmp_path: Path) -> None:
    """Choose a video, see verdict, timeline and heat maps; a bad file is named; nothing breaks the policy."""
    from playwright.sync_api import sync_playwright

    for name in ("clip.mp4", "text.png", "face.jpg"):
        (tmp_path / name).write_bytes(files[name])
    evil = tmp_path / "<img src=x onerror=alert(1)>.jpg"
    evil.write_bytes(files["face.jpg"])
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": width, "height": 900})
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#limits:has-text('1 MB')")
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
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"
        folder = os.environ.get("DTN_FAST_SCREENSHOTS")
        if folder:
            page.screenshot(path=str(Path(folder, f"page-{width}.png")), full_page=True)
        blank = DTN(SMALL).eval()
        blank.head.weight.data.zero_()
        blank.head.bias.data = torch.tensor([0.0, 3.0])
        with serving(TorchScorer(blank)) as other:
            page.goto(f"http://127.0.0.1:{other}/")
            page.set_input_files("#file", str(tmp_path / "face.jpg"))
            page.wait_for_selector(".card figure .unexplained:has-text('no region explains this score')")
            assert not page.locator(".card figure img[alt*='heat map']").count()
            assert "heat map" not in page.inner_text(".card")
            if folder:
                page.screenshot(path=str(Path(folder, f"unexplained-{width}.png")), full_page=True)
        browser.close()
    assert [text for text in said if "422" not in text] == []
