"""The README's pictures, taken of the demo in headless Chromium: ``make screenshots``.

    python -m dtn_fast.cli.screenshots runs/demo

writes report.png beside the template of the report, and page.png beside the page of ``dtn-fast serve``.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from dtn_fast.detect.batch import detect_many
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.files import write_whole
from dtn_fast.packages import require
from dtn_fast.runtime.load import load_scorer
from dtn_fast.runtime.scorer import Scorer
from dtn_fast.serve.config import ServeConfig

PACKAGE = Path(__file__).parent.parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
WIDTH, COLOURS = 1000, 128
"""Width of the pictures in pixels, and their palette, which keeps each under 300 kB."""


def take(demo: Path) -> list[Path]:
    """Takes both pictures of a finished demo in ``demo`` and returns their paths.

    Raises UsageError without Chromium, playwright or the demo's files.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        raise UsageError("Chromium is not installed; on Debian: apt-get install chromium")
    video = demo / "videos" / "synthetic-fake.mp4"
    if not video.is_file():
        raise UsageError(f"{video}: missing; run dtn-fast demo --out {demo} first")
    scorer = load_scorer(demo / "run")
    detect_many([str(video), str(demo / "videos")], scorer, demo / "detect")
    playwright = require("playwright.sync_api", "playwright")
    made = [PACKAGE / "detect" / "report.png", PACKAGE / "serve" / "page.png"]
    with playwright.sync_playwright() as play, _served(scorer) as address:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        page.goto((demo / "detect" / "report.html").resolve().as_uri())
        _save(page, made[0], ".faces")
        page.goto(f"{address}/")
        page.wait_for_selector("#limits:has-text('MB')")
        page.set_input_files("#file", str(video))
        page.wait_for_selector(".card .verdict", timeout=60_000)
        _save(page, made[1], ".card")
        browser.close()
    return made


def _save(page: Any, path: Path, last: str) -> None:
    """A picture of the page from its top to the end of the first element ``last``, in few colours."""
    box = page.locator(last).first.bounding_box()
    if box is None:
        raise DtnError(f"{path.name}: the page has no {last} to end its picture with")
    height = int(box["y"] + box["height"] + 16)
    whole = page.screenshot(full_page=True)
    picture = Image.open(io.BytesIO(whole)).convert("RGB")
    picture = picture.crop((0, 0, WIDTH, min(height, picture.height))).quantize(COLOURS, dither=Image.Dither.NONE)
    write_whole(path, lambda file: picture.save(file, "PNG", optimize=True))


@contextlib.contextmanager
def _served(scorer: Scorer) -> Iterator[str]:
    """Serves ``scorer`` on a free local port and yields its address."""
    require("uvicorn")
    from dtn_fast.serve.app import Service
    from dtn_fast.serve.server import Server, listen

    config = ServeConfig(port=0)
    listening, address = listen(config)
    server = Server(Service(scorer, config))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise DtnError("the web service did not start")
        time.sleep(0.05)
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    try:
        print("\n".join(str(path) for path in take(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))))
    except DtnError as error:
        raise SystemExit(f"screenshots: error: {error}") from None
