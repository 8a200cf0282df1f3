"""The budget of decoded bytes."""

from __future__ import annotations

import concurrent.futures
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import judge, serving

from dtn_fast import DTN
from dtn_fast.data.pictures import PIXEL_BYTES
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.serve import judging
from dtn_fast.serve.memory import FRAME, Budget, decoded_bytes


def test_bytes_by_the_header(files: dict[str, bytes], tmp_path: Path) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert decoded_bytes(tmp_path / "blank.png") == 90 * 70 * PIXEL_BYTES
    assert decoded_bytes(tmp_path / "clip.mp4") > 256 * 256 * FRAME
    assert decoded_bytes(tmp_path / "text.png") == decoded_bytes(tmp_path / "list.mp4") == 0
    frames = [Image.fromarray(np.full((40, 30, 3), 90 * n, np.uint8)) for n in range(3)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    assert decoded_bytes(tmp_path / "moves.gif") > 40 * 30 * (PIXEL_BYTES + FRAME)
    (tmp_path / "light.hdr").write_bytes(b"#?RADIANCE\n\n-Y 2 +X 2\n" + bytes(16))
    assert decoded_bytes(tmp_path / "light.hdr") == 2 * 2 * 2 * PIXEL_BYTES


def test_parts_are_held_in_order_and_never_over_the_total() -> None:
    budget, lock = Budget(10), threading.Lock()
    held, most = 0.0, 0.0
    order: list[int] = []

    def work(number: int, size: float) -> None:
        nonlocal held, most
        with budget.part(size, lambda: None):
            with lock:
                order.append(number)
                held += min(size, 10)
                most = max(most, held)
            threading.Event().wait(0.02)
            with lock:
                held -= min(size, 10)

    with concurrent.futures.ThreadPoolExecutor(8) as pool, budget.part(10, lambda: None):
        for number, size in enumerate((math.inf, 4, 4, 4, 10, 1)):
            pool.submit(work, number, size)
            while len(budget._queue) <= number:
                threading.Event().wait(0.001)
    assert most == 10
    assert order.index(0) == 0
    assert order.index(4) > max(order.index(n) for n in (1, 2, 3))  # a large one is not passed by for ever
    assert order[-1] == 5
    assert budget.held == 0


def test_a_wait_ends_with_its_error() -> None:
    budget = Budget(10)

    def gone() -> None:
        raise KeyError

    with budget.part(10, lambda: None), pytest.raises(KeyError), budget.part(1, gone):
        pass
    with budget.part(10, gone):
        assert budget.held == 10


def test_large_pictures_wait_for_each_other(
    model: DTN, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most = 0, 0
    lock = threading.Lock()
    detect = judging.detect

    def counted(*args: Any, **named: Any) -> object:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        try:
            return detect(*args, **named)
        finally:
            with lock:
                inside -= 1

    monkeypatch.setattr(judging, "detect", counted)
    size = 256 * 256 * PIXEL_BYTES / 1e6
    for budget, expected in ((1.5 * size, 1), (100 * size, 2)):
        most = 0
        with serving(TorchScorer(model), decode_mb=budget) as port, concurrent.futures.ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda _: judge(port, "face.jpg", files["face.jpg"])[0], range(3)))
        assert answers == [200] * 3
        assert most == expected
