"""Verdicts on real files, and on everything that is not one; the report; the heat maps."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from small import SMALL

from dtn_fast import DTN
from dtn_fast.cli.terminal import print_table
from dtn_fast.data.config import FinderConfig
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.dlib_finders import DlibFinder
from dtn_fast.data.even_spacing import PerSecond
from dtn_fast.data.face_finders import FINDERS
from dtn_fast.data.faces import Box, FoundFace, crop_face, cut_of, roll
from dtn_fast.data.media_frames import frames_of
from dtn_fast.data.pictures import read_image
from dtn_fast.data.video import Frame, read_frames
from dtn_fast.data.video_writer import write_video
from dtn_fast.detect import detect_many
from dtn_fast.detect.annotate import annotate
from dtn_fast.detect.config import DetectConfig
from dtn_fast.detect.inputs import find_inputs
from dtn_fast.detect.pipeline import AHEAD, detect, finder_of
from dtn_fast.detect.report import DETAILS, write_report, write_results
from dtn_fast.detect.verdict import Face, FrameResult, Result, aggregate, people_of, short_names
from dtn_fast.errors import DtnWarning, UsageError
from dtn_fast.explain.heatmap import NO_EVIDENCE, UNEXPLAINED, grad_cam, overlay
from dtn_fast.model.config import CropPolicy
from dtn_fast.model.preprocess import normalise
from dtn_fast.runtime.scorer import Scored, Scorer
from dtn_fast.runtime.torch_scorer import TorchScorer


@pytest.fixture(scope="module")
def finder() -> DlibFinder:
    return DlibFinder()


class Fixed(TorchScorer):
    """Scores given beforehand, in order."""

    def __init__(self, model: DTN, scores: list[float]) -> None:
        super().__init__(model)
        self.scores = list(scores)

    def judge(self, crops: np.ndarray) -> Scored:
        taken, self.scores = self.scores[: len(crops)], self.scores[len(crops) :]
        return Scored(np.array(taken), None)


def test_image_with_two_faces_takes_the_higher(small: DTN, finder: DlibFinder, tmp_path: Path) -> None:
    face = data.astronaut()[:256, 96:352]
    Image.fromarray(np.hstack([face, face])).save(tmp_path / "two.png")
    result = detect(tmp_path / "two.png", Fixed(small, [0.2, 0.9]), finder=finder)
    assert (result.verdict, result.score, len(result.frames[0].faces)) == ("fake", 0.9, 2)
    assert [p.score for p in result.pictures] == [0.9, 0.2]
    assert all((p.heat is None) == bool(p.heat_reason) for p in result.pictures)


class NoTorch(Scorer):
    """A scorer of an exported file, which has no torch model."""

    def _outputs(self, crops: np.ndarray) -> np.ndarray:
        return np.zeros((len(crops), 2))


def test_a_face_has_a_heat_map_or_the_words_why_not(finder: DlibFinder, tmp_path: Path) -> None:
    """On a photograph with a face: a map from a place where it shows a region, or the reason that there is none."""
    Image.fromarray(data.astronaut()).save(tmp_path / "face.png")
    blank = DTN(SMALL).eval()
    blank.head.weight.data.zero_()  # the score is the bias, which no region explains
    torch.manual_seed(3)
    seeing = DTN(SMALL).eval()
    torch.nn.init.normal_(seeing.head.weight)
    biased = lambda model, bias: setattr(model.head.bias, "data", torch.tensor([0.0, bias])) or TorchScorer(model)
    cases = (
        (lambda: biased(blank, 3.0), "fake", None, UNEXPLAINED),
        (lambda: biased(blank, -3.0), "real", None, NO_EVIDENCE),
        (lambda: biased(seeing, 99.0), "fake", "head", ""),
        (lambda: NoTorch(SMALL, "", "x.onnx"), "fake", None, "heat maps need a checkpoint, not an exported file"),
    )
    for scorer, verdict, depth, reason in cases:
        result = detect(tmp_path / "face.png", scorer(), finder=finder)
        assert result.verdict == verdict
        (picture,) = result.pictures
        assert (picture.heat is not None, picture.heat_depth, picture.heat_reason) == (bool(depth), depth, reason)
        (stored,) = result.to_json()["pictures"]
        assert stored == {
            "number": 0, "seconds": 0, "score": picture.score, "heat_depth": depth, "heat_reason": reason,
        }  # fmt: skip
        write_report(tmp_path / "r.html", "t", [], None, [result])
        page = (tmp_path / "r.html").read_text()
        for words in ('alt="heat map of frame 0"', "heat map from the model's head", "warm regions raise P(fake)"):
            assert (words in page) == bool(depth), words
        assert (f'<p class="unexplained">{reason}</p>' in page) == (depth is None)


def test_faces_are_cropped_with_the_model_s_margin(finder: DlibFinder, tmp_path: Path) -> None:
    image = np.ascontiguousarray(data.astronaut())
    Image.fromarray(image).save(tmp_path / "face.png")
    for margin in (1.3, 2.0):
        policy = CropPolicy(margin=margin)
        model = DTN(dataclasses.replace(SMALL, crop=policy)).eval()
        result = detect(tmp_path / "face.png", TorchScorer(model), finder=finder)
        box = result.frames[0].faces[0].box
        assert np.array_equal(result.pictures[0].crop, crop_face(image, cut_of(box, None, policy), SMALL.image_size))


def test_video_score_is_the_mean_over_frames_with_a_face(small: DTN, finder: DlibFinder, tmp_path: Path) -> None:
    face = data.astronaut()[:256, 96:352]
    blank = np.zeros_like(face)
    write_video(tmp_path / "v.mp4", [face, face, blank, face], fps=2)
    result = detect(tmp_path / "v.mp4", Fixed(small, [0.1, 0.3, 0.8]), finder=finder)
    assert result.score == pytest.approx(0.4)
    assert (result.verdict, result.frames_read, len(result.frames)) == ("real", 4, 3)
    assert [f.seconds for f in result.frames] == pytest.approx([0, 0.5, 1.5])
    loose = detect(tmp_path / "v.mp4", Fixed(small, [0.1, 0.3, 0.8]), DetectConfig(threshold=0.4), finder)
    assert loose.verdict == "fake"


def seen(*frames: dict[int, float]) -> list[FrameResult]:
    """A frame a second; each a score by person."""
    return [FrameResult(n, n, [Face(Box(0, 0, 9, 9), s, p) for p, s in f.items()], n) for n, f in enumerate(frames)]


def test_people_have_scores_and_spans_and_the_highest_regular_one_decides() -> None:
    frames = seen(*[{0: 0.2, 1: 0.9}] * 6, *[{0: 0.2}] * 3, {0: 0.2, 2: 1.0}, {0: 0.2, 1: 0.8}, {0: 0.6})
    seconds = [(n, n + 1) for n in range(12)]
    people = people_of(frames, 0.5, seconds)
    assert [(p.number, p.frames) for p in people] == [(2, 1), (1, 7), (0, 12)]
    assert people[1].score == pytest.approx((6 * 0.9 + 0.8) / 7)
    assert [(s.start, s.end) for s in people[1].spans] == [(0, 6), (10, 11)]
    assert people[1].spans[0].score == pytest.approx(0.9)
    assert [(s.start, s.end) for s in people[2].spans] == [(11, 12)]
    assert aggregate(people, frames) == pytest.approx(people[1].score)  # person 2 was there once in twelve
    cuts = seen(*({n: 0.1 * (n % 4)} for n in range(20)))  # somebody else in every frame
    assert aggregate(people_of(cuts, 0.5, []), cuts) == pytest.approx(0.15)


def test_two_people_are_told_apart_in_a_video(small: DTN, finder: DlibFinder, tmp_path: Path) -> None:
    face = data.astronaut()[:256, 96:352]
    write_video(tmp_path / "two.mp4", [np.hstack([face, face // 2])] * 5, fps=1, crf=10)

    class ByLight(TorchScorer):
        def judge(self, crops: np.ndarray) -> Scored:
            return Scored(np.where(crops.mean((1, 2, 3)) > 90, 0.9, 0.2), None)

    result = detect(tmp_path / "two.mp4", ByLight(small), finder=finder)
    assert [(p.frames, pytest.approx(p.score)) for p in result.people] == [(5, 0.9), (5, 0.2)]
    assert (result.verdict, result.score) == ("fake", pytest.approx(0.9))
    assert [(s.start, s.end) for s in result.spans] == [(0, 5)]
    stored = result.to_json()
    assert stored["people"][0]["spans"] == [{"start": 0.0, "end": 5.0, "score": pytest.approx(0.9)}]
    assert {f["person"] for frame in stored["frames"] for f in frame["faces"]} == {0, 1}


def test_frames_by_count_rate_or_all(small: DTN, finder: DlibFinder, tmp_path: Path) -> None:
    face = data.astronaut()[:256, 96:352]
    write_video(tmp_path / "v.mp4", [face] * 40, fps=10)
    scorer = TorchScorer(small)
    read = lambda **how: detect(tmp_path / "v.mp4", scorer, DetectConfig(**how), finder).frames_read
    assert (read(frames=7), read(frames=0), read(rate=2.0), read(frames=3, rate=0.1)) == (7, 40, 8, 1)
    told: list[int] = []
    timing = detect(tmp_path / "v.mp4", scorer, DetectConfig(5), finder, watch=told.append).timing
    assert told == [1, 2, 3, 4, 5]
    assert min(timing.decode, timing.find_faces, timing.score) > 0
    assert timing.wall <= timing.decode + timing.find_faces + timing.score + 1
    assert sum(float(part) for part in re.findall(r"(\d+)%", timing.shares())) == pytest.approx(100, abs=2)


def test_a_long_video_streams(small: DTN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it is, a few frames and batches are held, and decoding stops when the work does."""
    alive, before = set[int](), set(threading.enumerate())
    most = made = 0

    def endless(*_: object, **__: object) -> Iterator[Frame]:
        nonlocal most, made
        for number in range(2000):
            image = np.zeros((80, 80, 3), np.uint8)
            alive.add(number)
            weakref.finalize(image, alive.discard, number)
            made, most = made + 1, max(most, len(alive))
            yield Frame(number, number / 25, image)

    class Always:
        shake = 0.1

        def __call__(self, frames: list[np.ndarray], turned: bool) -> list[list[FoundFace]]:
            return [[FoundFace(Box(0, 0, 64, 64), 1.0)] for _ in frames]

        def near(self, image: np.ndarray, face: FoundFace) -> FoundFace:
            return face

    class Quick(TorchScorer):
        def judge(self, crops: np.ndarray) -> Scored:
            return Scored(np.full(len(crops), 0.25), None)

    monkeypatch.setattr("dtn_fast.detect.pipeline.frames_of", endless)
    result = detect(tmp_path / "x.mp4", Quick(small), finder=Always(), model=small)
    assert (result.frames_read, len(result.frames), result.score) == (2000, 2000, 0.25)
    assert most <= AHEAD + 4

    def stop(read: int) -> None:
        if read == 10:
            raise KeyboardInterrupt

    made = 0
    with pytest.raises(KeyboardInterrupt):
        detect(tmp_path / "x.mp4", Quick(small), finder=Always(), watch=stop)
    assert made <= 10 + AHEAD + 2
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith(("decoding", "scoring"))]


def test_the_annotated_video_frames_faces_and_marks_spans(small: DTN, finder: DlibFinder, tmp_path: Path) -> None:
    face = cv2.resize(data.astronaut()[:256, 96:352], (480, 480))
    write_video(tmp_path / "v.mp4", [face] * 12, fps=4)
    result = detect(tmp_path / "v.mp4", Fixed(small, [0.9] * 2 + [0.1] * 4), DetectConfig(6), finder)
    assert list(annotate(result, tmp_path / "out.mp4")) == [*range(1, 13)]
    frames = list(read_frames(tmp_path / "out.mp4"))
    assert (len(frames), frames[0].image.shape) == (12, (480, 480, 3))
    box = result.frames[0].faces[0].box
    edge = lambda frame: frame.image[box.top + 60 : box.bottom - 60, box.left - 4 : box.left + 5].mean(0).astype(int)
    red = [(edge(frame)[:, 0] - edge(frame)[:, 1]).max() for frame in (frames[0], frames[11])]
    green = [(edge(frame)[:, 1] - edge(frame)[:, 0]).max() for frame in (frames[0], frames[11])]
    assert red[0] > 60 > 30 > red[1]  # forged, then not
    assert green[1] > 60 > 30 > green[0]
    bar = frames[11].image[-3]
    assert bar[20][0] > bar[20][1] + 80  # the forged span, at the start
    assert bar[300].max() < 100


def test_no_inputs_is_a_usage_error(small: DTN, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no inputs"):
        detect_many([], TorchScorer(small), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_inputs_are_verdicts_not_crashes(small: DTN, finder: DlibFinder, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((100, 80, 3), np.uint8)).save(tmp_path / "blank.png")
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "notes.txt").write_text("hello")
    scorer = TorchScorer(small)
    for name, verdict, word in (
        ("blank.png", "no face", "no face in 1 frame"),
        ("text.mp4", "failed", "cannot read this video"),
        ("notes.txt", "failed", "neither an image"),
        ("nowhere.png", "failed", "no such file"),
    ):
        result = detect(tmp_path / name, scorer, finder=finder)
        assert (result.verdict, result.ok) == (verdict, False)
        assert word in (result.error or "")
        assert name in (result.error or "")


def test_inputs_are_found_once_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.jpg", "b/1.PNG", "a.mp4", "b/skip.txt", "b/.hidden.png", "b/c/3.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()

    def names(*patterns: str) -> list[str]:
        found = list(find_inputs([str(tmp_path / p) for p in patterns]))
        assert all(error is None for _, error in found)
        return [str(path.relative_to(tmp_path)) for path, _ in found]

    assert names("a.mp4", "b") == ["a.mp4", "b/1.PNG", "b/2.jpg", "b/c/3.jpeg"]
    assert names("b/*.jpg", "b") == ["b/2.jpg", "b/1.PNG", "b/c/3.jpeg"]
    assert names("**/*.jp*g") == ["b/2.jpg", "b/c/3.jpeg"]
    errors = [e for _, e in find_inputs([str(tmp_path / "x*"), str(tmp_path / "empty"), str(tmp_path / "a.mp4")])]
    assert "no such file" in (errors[0] or "")
    assert "no image or video" in (errors[1] or "")
    assert errors[2] is None


def _as_nobody(folder: str, queue: multiprocessing.Queue) -> None:
    os.setuid(65534)
    queue.put([(str(path), error) for path, error in find_inputs([folder])])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_folder_without_permission_is_named_and_the_rest_goes_on() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        Path(folder, "ok.png").touch()
        Path(folder, "locked").mkdir(mode=0o000)
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=_as_nobody, args=(folder, queue))
        process.start()
        found = queue.get(timeout=60)
        process.join()
    assert [(Path(p).name, bool(e)) for p, e in found] == [("ok.png", False), ("locked", True)]
    assert "Permission denied" in found[1][1]


def test_grad_cam_by_its_formula(dataset: CropDataset) -> None:
    """Without gate and blocks the network is linear after the last ReLU but for the pooling, and the map is known."""
    torch.manual_seed(0)
    model = DTN(dataclasses.replace(SMALL, depth=0, num_experts=0)).eval()
    model.head.weight.data.normal_()
    crops = dataset.get(np.arange(2))
    heat = grad_cam(model, crops)
    with torch.no_grad():
        features = model.backbone[:-1](normalise(crops, model.config))
        weights = model.head.weight[1] - model.head.weight[0]  # of fake over real
        expected = F.interpolate(
            (features * weights[:, None, None]).sum(1, keepdim=True).relu(), (64, 64), mode="bilinear"
        )
        expected = expected[:, 0] / expected.amax((2, 3))[:, 0, None, None]
    assert heat == pytest.approx(expected.numpy(), abs=1e-4)
    assert heat.max() == pytest.approx(1)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    laid = overlay(crops[0], heat[0])
    assert np.array_equal(laid[heat[0] == 0], crops[0][heat[0] == 0])
    assert not np.array_equal(laid, crops[0])
    model.head.weight.data.zero_()
    assert not grad_cam(model, crops).any()


class Parsed(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))


def test_report_is_self_contained_and_escaped(small: DTN, finder: DlibFinder, tmp_path: Path) -> None:
    face = data.astronaut()[:256, 96:352]
    evil = tmp_path / "<script>alert(1)<"
    evil.mkdir()
    write_video(evil / "v.mp4", [face] * 3)
    results = [
        detect(evil / "v.mp4", Fixed(small, [0.9, 0.8, 0.1]), finder=finder),
        Result(Path("x<b>.png"), error="x<b>.png: no & such file"),
    ]
    write_report(tmp_path / "r.html", "Title & more", ["a <notice>"], None, results)
    text = (tmp_path / "r.html").read_text()
    page = Parsed(text)
    assert not {"script", "link", "iframe", "b", "notice"} & {tag for tag, _ in page.tags}
    sources = [a["src"] for tag, a in page.tags if tag == "img"]
    assert len(sources) == 3 + sum(p.heat is not None for p in results[0].pictures)
    assert all(s.startswith("data:image/jpeg;base64,") for s in sources)
    assert sum(tag == "circle" for tag, _ in page.tags) == 3
    assert "http" not in text.replace("http://www.w3.org", "")
    write_results(tmp_path / "r.json", results, "notice", [])
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored["results"][0]["score"] == pytest.approx(0.6)
    assert stored["results"][1]["verdict"] == "failed"
    assert len(stored["results"][0]["frames"]) == 3


def with_policy(policy: CropPolicy | None) -> TorchScorer:
    return TorchScorer(DTN(dataclasses.replace(SMALL, crop=policy)).eval())


def test_the_finder_is_the_model_s_unless_another_is_named_and_either_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Yunet(DlibFinder):
        name = "yunet"  # type: ignore[assignment]

    monkeypatch.setitem(FINDERS, "yunet", Yunet)
    config = lambda name: DetectConfig(finder=FinderConfig(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(finder_of(with_policy(CropPolicy("yunet")), DetectConfig()), Yunet)
        assert isinstance(finder_of(with_policy(CropPolicy("yunet")), config("yunet")), Yunet)
    with pytest.warns(DtnWarning, match="--faces dlib: the model was trained on the boxes of yunet"):
        assert not isinstance(finder_of(with_policy(CropPolicy("yunet")), config("dlib")), Yunet)
    with pytest.warns(DtnWarning, match=r"records no crop policy; its faces are taken as dlib at margin 1\.3"):
        assert not isinstance(finder_of(with_policy(None), DetectConfig()), Yunet)
    level = with_policy(CropPolicy("dlib", align="landmarks"))
    with pytest.raises(UsageError, match="eyes are level, which needs landmarks; add --faces yunet"):
        finder_of(level, DetectConfig())


def test_a_model_of_level_eyes_sees_level_eyes(tmp_path: Path) -> None:
    image = np.ascontiguousarray(data.astronaut())
    Image.fromarray(image).save(tmp_path / "face.png")
    points = np.array([[200, 100], [240, 120], [218, 125], [200, 145], [232, 150]], np.float32)

    class Given(DlibFinder):
        def _search(self, frame: np.ndarray, smallest: float, quick: bool = False) -> list[FoundFace]:
            return [FoundFace(Box(170, 70, 270, 170), 1.0, points)]

    policy = CropPolicy("yunet", 1.4, "landmarks")
    result = detect(tmp_path / "face.png", with_policy(policy), finder=Given())
    cut = cut_of(Box(170, 70, 270, 170), roll(points), policy)
    assert cut.degrees == pytest.approx(np.degrees(np.arctan2(20, 40)))
    assert np.array_equal(result.pictures[0].crop, crop_face(image, cut, SMALL.image_size))


def test_a_crowd_is_judged_in_part_and_that_is_said(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((400, 400, 3), np.uint8)).save(tmp_path / "crowd.png")

    class Crowd(DlibFinder):
        def _search(self, frame: np.ndarray, smallest: float, quick: bool = False) -> list[FoundFace]:
            return [FoundFace(Box(3 * n, 0, 3 * n + 40, 40), 1.0) for n in range(130)]

    batch = detect_many([str(tmp_path / "crowd.png")], with_policy(None), tmp_path / "out", finder=Crowd())
    (result,) = batch.results
    assert len(result.frames[0].faces) == 100
    assert result.to_json()["frames_crowded"] == 1
    assert batch.notes == [f"{tmp_path / 'crowd.png'}: in 1 frame only the 100 largest faces are judged"]
    assert "only the 100 largest faces" in (tmp_path / "out" / "report.html").read_text()


def test_a_damaged_video_is_judged_on_the_rest_and_that_is_said(small: DTN, finder: DlibFinder, tmp_path: Path) -> None:
    face, rng = np.ascontiguousarray(data.astronaut()[:256, 96:352]), np.random.default_rng(0)
    noise = [np.vstack([rng.integers(0, 255, (40, 256, 3), np.uint8), face]) for _ in range(40)]
    write_video(tmp_path / "v.mp4", noise, fps=10, crf=30)
    content = bytearray((tmp_path / "v.mp4").read_bytes())
    first, length = int(0.4 * len(content)), len(content) // 8
    content[first : first + length] = bytes(length)
    (tmp_path / "v.mp4").write_bytes(content)
    for most, ok in ((0.0, False), (1.0, True)):
        config = DetectConfig(frames=20, max_lost=most)
        batch = detect_many([str(tmp_path / "v.mp4")], TorchScorer(small), tmp_path / "out", config, finder=finder)
        (result,) = batch.results
        assert result.ok
        assert (batch.ok, result.reading.asked) == (ok, 20)
        assert 0 < result.reading.lost == 20 - result.frames_read
        note = f"{tmp_path / 'v.mp4'}: {result.reading.lost} of 20 frames could not be decoded"
        lost = f"{result.reading.lost} of 20 frames could not be decoded, over --max-lost 0"
        assert batch.notes == [*([] if ok else [f"{tmp_path / 'v.mp4'}: uncertain: {lost}"]), note]
        assert batch.problems == ([] if ok else [f"{note}, over --max-lost 0"])
        assert (result.verdict == "uncertain", result.reasons) == ((False, []) if ok else (True, [lost]))
        stored = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
        assert (stored["frames_asked"], stored["frames_lost"]) == (20, result.reading.lost)
        assert "frames could not be decoded" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(UsageError, match="--max-lost 2"):
        DetectConfig(max_lost=2)


# ------------------------------------------------------------------------------------- names, spans, pictures


NAMES = ["12:30:11.mp4", "Interview: part 1.mp4", "title [dQw4w9WgXcQ].mp4", "[red]bold[-red].mp4", "-x.mp4",
         "a\nb.mp4", "na\u00efve \u4f8b \U0001f600.mp4", os.fsdecode(b"x\xff.mp4"), "\u9854" * 80 + ".mp4",
         "y" * 251 + ".mp4", "<b>&.mp4", "\x1b[31mred.mp4", "rtl\u202e4pm.mp4"]  # fmt: skip


def test_videos_of_any_name_are_judged_annotated_and_shown(
    small: DTN, finder: DlibFinder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "plain", [scene(320)] * 3)
    (tmp_path / "in").mkdir()
    for name in NAMES:
        (tmp_path / "in" / name).write_bytes((tmp_path / "plain").read_bytes())
    monkeypatch.chdir(tmp_path / "in")  # a colon in a relative path looks like a protocol
    batch = detect_many(sorted(NAMES), TorchScorer(small), tmp_path / "out", DetectConfig(frames=2), True, finder)
    assert not batch.problems
    assert len(batch.annotated) == len(NAMES) == len({path.name for path in batch.annotated})
    for path in batch.annotated:
        assert len(list(read_frames(path))) == 3
    stored = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [os.fsencode(row["path"]) for row in stored] == [os.fsencode(name) for name in sorted(NAMES)]
    page = (tmp_path / "out" / "report.html").read_text()
    for shown in ("12:30:11.mp4", "title [dQw4w9WgXcQ].mp4", "[red]bold[-red].mp4", r"a\nb.mp4", r"x\xff.mp4",
                  "&lt;b&gt;&amp;.mp4", r"\x1b[31mred.mp4", r"rtl\u202e4pm.mp4", "\u9854" * 80):  # fmt: skip
        assert shown in page, shown
    print_table("t", ["input"], [[name] for name in short_names([r.path for r in batch.results])[1]])


def test_names_in_tables_are_the_part_that_tells_them_apart() -> None:
    paths = [Path("/data/set/a/1.png"), Path("/data/set/b/1.png")]
    assert short_names(paths) == ("/data/set", ["a/1.png", "b/1.png"])
    assert short_names([Path("x/a.png"), Path("x/b.png")]) == ("x", ["a.png", "b.png"])
    assert short_names([Path("x/a.png")]) == ("", ["x/a.png"])
    assert short_names([Path("a.png"), Path("/b.png")]) == ("", ["a.png", "/b.png"])
    assert short_names([Path("/a.png"), Path("/x/b.png")]) == ("", ["/a.png", "/x/b.png"])
    assert short_names([]) == ("", [])


def scene(side: int) -> np.ndarray:
    image = np.full((side, side, 3), 120, np.uint8)
    face = cv2.resize(data.astronaut()[:256, 96:352], (side * 3 // 4,) * 2)
    image[side // 8 : side // 8 + len(face), side // 8 : side // 8 + len(face)] = face
    return image


def test_a_still_picture_has_no_spans_and_is_shown_whole_with_its_faces_framed(
    small: DTN, finder: DlibFinder, tmp_path: Path
) -> None:
    Image.fromarray(cv2.resize(scene(320), (1400, 1400))).save(tmp_path / "a.png")
    result = detect(tmp_path / "a.png", Fixed(small, [0.9]), finder=finder)
    assert (result.verdict, result.moving, result.spans) == ("fake", False, [])
    assert result.to_json()["kind"] == "picture"
    assert result.whole is not None
    assert result.whole.shape == (960, 960, 3)
    box = result.frames[0].faces[0].box
    edge = result.whole[round((box.top + box.bottom) / 2 * 960 / 1400), round(box.left * 960 / 1400)]
    assert np.abs(edge.astype(int) - (220, 40, 40)).max() < 30
    write_report(tmp_path / "r.html", "t", [], None, [result])
    page = (tmp_path / "r.html").read_text()
    assert 'class="whole"' in page
    assert "forged" not in page.split("<body>")[1].split("person score")[0]
    assert "0.00 s" not in page


def test_spans_end_where_the_forged_stretch_ends(small: DTN, finder: DlibFinder, tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", [scene(320)] * 20, fps=10)
    forged = [0.1] * 5 + [0.9] * 10 + [0.1] * 5
    every = detect(tmp_path / "v.mp4", Fixed(small, forged), DetectConfig(frames=0), finder)
    assert [span[:2] for span in every.spans] == [pytest.approx((0.5, 1.5))]
    some = detect(tmp_path / "v.mp4", Fixed(small, [0.1, 0.9, 0.9, 0.1]), DetectConfig(frames=4), finder)
    assert [frame.number for frame in some.frames] == [0, 6, 13, 19]
    assert [span[:2] for span in some.spans] == [pytest.approx(((0.1 + 0.6) / 2, (1.4 + 1.9) / 2))]
    whole = detect(tmp_path / "v.mp4", Fixed(small, [0.9] * 3), DetectConfig(frames=3), finder)
    assert [span[:2] for span in whole.spans] == [pytest.approx((0, 2))]
    write_report(tmp_path / "r.html", "t", [], None, [every])
    page = (tmp_path / "r.html").read_text()
    assert '<rect x="187.5" width="295.0"' in page  # from a quarter to three quarters of 590, after 40
    assert "0.5 to 1.5 s" in page


def test_a_moving_picture_is_a_video(small: DTN, finder: DlibFinder, tmp_path: Path) -> None:
    frames = [Image.fromarray(np.roll(scene(320), n, 1)) for n in range(6)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=200)
    result = detect(tmp_path / "a.webp", Fixed(small, [0.9] * 6), finder=finder)
    assert (result.frames_read, result.moving, result.reading.seconds) == (6, True, pytest.approx(1.2))
    assert [span[:2] for span in result.spans] == [pytest.approx((0, 1.2))]
    assert [frame.seconds for frame in frames_of(tmp_path / "a.webp", PerSecond(2.5))] == pytest.approx([0, 0.4, 0.8])
    for written in annotate(result, tmp_path / "a.mp4"):
        assert written <= 6
    assert [f.seconds for f in read_frames(tmp_path / "a.mp4")] == pytest.approx([0.2 * n for n in range(6)])


def test_files_that_are_not_read_are_inputs_without_a_verdict(small: DTN, finder: DlibFinder, tmp_path: Path) -> None:
    Image.fromarray(scene(320)).save(tmp_path / "a", format="JPEG")
    shutil.copy(tmp_path / "a", tmp_path / "b.mp4")  # a picture that is named like a video
    write_video(tmp_path / "c.jpg", [scene(320)] * 2)
    (tmp_path / "d.psd").write_bytes(b"8BPS\0\1" + bytes(40))
    pages = Image.fromarray(scene(320))
    pages.save(tmp_path / "e.tif", save_all=True, append_images=[pages])
    batch = detect_many([str(tmp_path)], TorchScorer(small), tmp_path / "out", finder=finder)
    assert [(r.path.name, r.ok) for r in batch.results] == [
        ("a", True), ("b.mp4", True), ("c.jpg", True), ("e.tif", True), ("d.psd", False)]  # fmt: skip
    assert "d.psd: a picture or video in a form that is not read; convert it" in batch.problems[0]
    assert batch.notes == [f"{tmp_path / 'e.tif'}: only the first of its 2 pages was read"]
    assert not batch.ok


def test_thousands_of_results_do_not_keep_their_pictures(small: DTN, finder: DlibFinder, tmp_path: Path) -> None:
    Image.fromarray(scene(320)).save(tmp_path / "a.png")
    for number in range(DETAILS + 1):
        os.link(tmp_path / "a.png", tmp_path / f"{number:03d}.png")
    (tmp_path / "a.png").unlink()
    batch = detect_many([str(tmp_path)], TorchScorer(small), tmp_path / "out", finder=finder)
    kept = [bool(result.pictures) and result.whole is not None for result in batch.results]
    assert kept == [True] * DETAILS + [False]


def test_a_decoder_that_fails_in_any_way_costs_its_input_alone(
    small: DTN, finder: DlibFinder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(scene(320)).save(tmp_path / name)

    def read(path: Path) -> np.ndarray:
        if path.name == "a.png":
            raise IndexError("out of\nrange")
        return read_image(path)

    monkeypatch.setattr("dtn_fast.data.media_frames.read_image", read)
    batch = detect_many([str(tmp_path)], TorchScorer(small), tmp_path / "out", finder=finder)
    assert [result.ok for result in batch.results] == [False, True]
    assert batch.problems == [f"{tmp_path / 'a.png'}: cannot be read (IndexError: out of range)"]


def test_the_results_folder_is_tried_first_and_is_no_input(small: DTN, finder: DlibFinder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file/out: cannot be written to \(Not a directory\); choose another"):
        detect_many([str(tmp_path / "none")], TorchScorer(small), tmp_path / "file" / "out", finder=finder)
    folder = tmp_path / "in"
    folder.mkdir()
    write_video(folder / "a.mp4", [scene(320)] * 3)
    for out in (folder, folder / "out"):  # the inputs' own folder is one to write to as well
        for _ in range(2):
            batch = detect_many([str(folder)], TorchScorer(small), out, DetectConfig(frames=1), True, finder)
            assert [result.path.name for result in batch.results] == ["a.mp4"]
        assert batch.notes == [f"{out}: 1 annotated copies of an earlier run were left out"]
        (out / "001-a.mp4").rename(tmp_path / "001-a.mp4")
    named = detect_many([str(tmp_path / "001-a.mp4")], TorchScorer(small), tmp_path, finder=finder)
    assert len(named.results) == 1  # what is named is judged
