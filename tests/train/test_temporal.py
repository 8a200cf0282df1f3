"""The temporal head learns what the order of frames alone tells, and scores videos by it wherever the model runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import RECIPE, SMALL, changed

from dtn_fast import DTN
from dtn_fast.data.augment import Augment
from dtn_fast.data.clips import ClipLoader, clips_of, tracks_of
from dtn_fast.data.config import AUGMENTATIONS
from dtn_fast.data.crop_dataset import CropDataset, ShardFiles
from dtn_fast.data.faces import Box
from dtn_fast.data.finder_base import FoundFace
from dtn_fast.data.replay import part
from dtn_fast.data.video_table import Video
from dtn_fast.data.video_writer import write_video
from dtn_fast.detect.config import DetectConfig
from dtn_fast.detect.pipeline import detect
from dtn_fast.errors import DtnWarning, UsageError
from dtn_fast.evaluation.calibration import Calibrated, calibrate
from dtn_fast.evaluation.config import CalibrateConfig
from dtn_fast.evaluation.evaluate import evaluate
from dtn_fast.evaluation.metrics import auc_interval, evaluate_scores
from dtn_fast.export.pipeline import export
from dtn_fast.model.build import TimmDetector, load_detector
from dtn_fast.model.config import TimmConfig
from dtn_fast.model.temporal import TemporalHead
from dtn_fast.runtime.clips import TrackClips, clip_file, clip_probability, score_clips
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.load import load_model, load_scorer
from dtn_fast.runtime.scorer import Scorer
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.serve.batching import MicroBatcher
from dtn_fast.train.checkpoint import load_state
from dtn_fast.train.config import TemporalRecipe
from dtn_fast.train.distill import train_initial
from dtn_fast.train.log_lines import read_lines
from dtn_fast.train.loop import Epoch, Step, Stopped, fit
from dtn_fast.train.run_folder import METRICS, STATE, start_run
from dtn_fast.train.temporal import FEATURES, TemporalRun

SIDE, FRAMES, CLIP = SMALL.image_size, 12, 8
COUNTS = {"train": 40, "val": 12, "test": 24}
HEAD = TemporalRecipe(clip=CLIP, epochs=24, batch_size=16, versions=2, augment="light")
NOISE = 12


def levels_of(label: int, rng: np.random.Generator) -> np.ndarray:
    """Brightness of each frame: of a real rising, of a fake the same numbers in a random order."""
    levels = np.sort(rng.uniform(40, 200, FRAMES))
    return rng.permutation(levels) if label else levels


def pictures(levels: np.ndarray, rng: np.random.Generator, side: int = SIDE) -> np.ndarray:
    """Noise pictures of these brightnesses, darker at the top, by which a tracker knows them again."""
    shade = np.linspace(-30, 30, side)[:, None, None]
    noise = rng.normal(0, NOISE, (len(levels), side, side, 3))
    return (levels[:, None, None, None] + shade + noise).clip(0, 255).astype(np.uint8)


def set_of(shards: list[np.ndarray], videos: list[Video], frames: int) -> CropDataset:
    place = np.repeat(np.arange(len(videos)), frames)
    status = [{"asked": frames, "frames": frames, "faces": frames, "boxes": "own", "error": None, "reason": None}
              for _ in videos]  # fmt: skip
    frame = np.tile(np.arange(frames) * 5, len(videos))
    return CropDataset(ShardFiles(shards, SIDE), place, frame, np.zeros_like(place), videos, status, True, folder="/o")


@pytest.fixture(scope="module")
def data() -> CropDataset:
    """Videos whose single frames are of one distribution for reals and fakes, and whose order tells them apart."""
    rng = np.random.default_rng(0)
    kinds = [(split, number, method) for split, count in COUNTS.items() for number in range(count)
             for method in ("real", "Shuffled")]  # fmt: skip
    videos = [Video(f"{split}/{method}/{number}", int(method != "real"), method, split)
              for split, number, method in kinds]  # fmt: skip
    return set_of([pictures(levels_of(video.label, rng), rng) for video in videos], videos, FRAMES)


@pytest.fixture(scope="module")
def base(data: CropDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the frame model."""
    run = tmp_path_factory.mktemp("base") / "run"
    start_run(run, changed(RECIPE, epochs=1, batch_size=32, augment="none"), SMALL)
    for _ in train_initial(run, data):
        pass
    return run


def trained_head(base: Path, data: CropDataset, out: Path, recipe: TemporalRecipe = HEAD) -> TemporalRun:
    job = TemporalRun(base, data, out, recipe, "cpu")
    assert all(state.done <= state.total for state in job.features())
    for _ in job.fit():
        pass
    return job


@pytest.fixture(scope="module")
def head(base: Path, data: CropDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a temporal head."""
    out = tmp_path_factory.mktemp("head") / "run-temporal"
    trained_head(base, data, out)
    return out


def shuffled(data: CropDataset) -> CropDataset:
    """The same frames, each video's in a random order."""
    rng = np.random.default_rng(1)
    frame = np.concatenate([rng.permutation(data.frame[data.video == v]) for v in range(len(data.videos))])
    return dataclasses.replace(data, frame=frame)


def test_order_alone_tells_reals_from_fakes(base: Path, head: Path, data: CropDataset) -> None:
    frames = evaluate(load_scorer(base), data).rows[0]
    found = evaluate(load_scorer(head), data)
    row = found.rows[0]
    assert row.clip is not None
    assert row.frame_interval is not None
    assert row.clip.gain_interval is not None
    assert row.clip.gain is not None
    assert row.video.auc is not None
    assert row.frame_interval[0] < 0.5 < row.frame_interval[1]
    assert row[1:5] == frames[1:5], "the frame model is as it was"
    assert frames.clip is None
    assert row.clip.video.auc is not None
    assert row.clip.video.auc > 0.95
    assert row.clip.gain == pytest.approx(row.clip.video.auc - row.video.auc)
    assert row.clip.gain_interval[0] > 0
    header, (cells, *_) = found.clip_table()
    assert cells[header.index("video AUC")] == f"{row.clip.video.auc:.4f}"
    assert f"| {cells[header.index('video AUC')]} |" in found.markdown()
    assert "by the temporal head: mean over clips of 8 frames" in found.note()
    assert not evaluate(load_scorer(base), data).clip_table()[1]
    assert json.loads(json.dumps(found.to_json()))["rows"][0]["clip"]["video"]["auc"] == row.clip.video.auc
    mixed = evaluate(load_scorer(head), shuffled(data)).rows[0]
    assert mixed.clip is not None
    assert mixed.clip.interval is not None
    assert mixed.clip.interval[0] < 0.5 < mixed.clip.interval[1], "without the order nothing is left"


class Whole:
    """A finder that takes the middle of every frame for a face."""

    shake = 0.1
    gives_points = False

    def __call__(self, frames: list[np.ndarray], turned: bool) -> list[list[FoundFace]]:
        return [[FoundFace(Box(16, 16, 80, 80), 1.0)] for _ in frames]

    def near(self, image: np.ndarray, face: FoundFace) -> FoundFace:
        return face


def test_detection_scores_videos_by_clips_while_they_stream(
    base: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reals and fakes as videos: told apart by the head, not by the frames, in constant memory; a picture has none."""
    kept: list[int] = []
    add = TrackClips.add
    monkeypatch.setattr(TrackClips, "add", lambda self, *x: (add(self, *x), kept.append(len(self._last)))[0])
    rng, labels = np.random.default_rng(2), [0, 1] * 6
    scores: dict[str, list[float]] = {"frames": [], "clips": []}
    for number, label in enumerate(labels):
        path = tmp_path / f"{number}.mp4"
        write_video(path, list(pictures(levels_of(label, rng), rng, 96)), fps=5)
        for name, folder in (("frames", base), ("clips", head)):
            result = detect(path, load_scorer(folder), DetectConfig(frames=0), Whole())
            assert result.score is not None
            assert len(result.frames) == FRAMES
            assert bool(result.clips) == (name == "clips")
            (person,) = result.people
            assert person.score == result.score == result.clips.get(person.number, result.score)
            scores[name].append(result.score)
            assert any("frames are 1 apart, those of the temporal head's clips 5" in n for n in result.notes) == (
                name == "clips"
            )
    assert evaluate_scores(labels, scores["clips"], 0.5).auc == 1
    names = list(map(str, range(len(labels))))
    interval = auc_interval(labels, scores["frames"], names, 500, 0.95)
    assert interval is not None
    assert interval[0] < 0.5 < interval[1]
    assert max(kept) == CLIP < FRAMES
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / "one.png"), pictures(np.array([90.0]), rng, 96)[0])
    still = detect(tmp_path / "one.png", load_scorer(head), finder=Whole())
    assert not still.clips
    assert still.score == still.frames[0].faces[0].score


@pytest.mark.parametrize("count", [1, 5, 8, 9, 16, 21])
def test_streamed_and_stored_tracks_have_one_score(head: Path, count: int) -> None:
    """Clips side by side, the last one ending with the track, a short track stretched; each frame counts once."""
    rng = np.random.default_rng(count)
    videos = [Video(f"test/{number}", number % 2, ("real", "Shuffled")[number % 2], "test") for number in range(3)]
    dataset = set_of([pictures(rng.uniform(40, 200, count), rng) for _ in videos], videos, count)
    scorer, rows = load_scorer(head), np.arange(3 * count)[::-1]
    assert scorer.clips is not None
    made = score_clips(scorer, dataset, rows)
    stored = clip_probability(scorer, made.logits)[made.of]
    for number in range(len(videos)):
        track = TrackClips(scorer)
        outputs = scorer.judge(dataset.get(np.flatnonzero(dataset.video == number)))
        assert outputs.features is not None
        assert outputs.logits is not None
        for features, logits in zip(outputs.features, outputs.logits, strict=True):
            track.add(features, logits)
        assert track.score() == pytest.approx(stored[dataset.video[rows] == number].mean(), abs=1e-5)
    assert np.allclose(made.frames, scorer.outputs(dataset.get(rows))[:, :2], atol=1e-5)
    frames, of = clips_of(count, CLIP)
    assert (np.diff(frames) >= 0).all()
    assert set(frames.ravel().tolist()) == set(range(count))
    assert all(place in frames[clip] and place not in frames[:clip] for place, clip in enumerate(of))


def test_an_exported_file_scores_clips_as_torch_does(
    head: Path, data: CropDataset, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    rows = np.flatnonzero(np.isin(data.video, np.arange(6)))
    expected = score_clips(load_scorer(head), data, rows)
    export(head, tmp_path / "m.onnx")
    for runtime in ("onnxruntime", "openvino"):
        if runtime == "openvino":
            pytest.importorskip("openvino")
        scorer = load_scorer(tmp_path / "m.onnx", Runtime(runtime=runtime))
        made = score_clips(scorer, data, rows)
        assert np.abs(made.logits - expected.logits).max() < 1e-5
        assert np.abs(made.frames - expected.frames).max() < 1e-5
    with MicroBatcher(scorer) as batcher:
        assert np.array_equal(score_clips(batcher, data, rows).logits, made.logits)
    assert not [w for w in recwarn if issubclass(w.category, DtnWarning)]
    onnx = pytest.importorskip("onnx")
    other = onnx.load(clip_file(tmp_path / "m.onnx"))
    onnx.helper.set_model_props(other, {"weights": "of another"})
    onnx.save(other, clip_file(tmp_path / "m.onnx"))
    with pytest.raises(UsageError, match=r"m\.clip\.onnx: not the temporal head of m\.onnx"):
        load_scorer(tmp_path / "m.onnx")
    clip_file(tmp_path / "m.onnx").unlink()
    with pytest.raises(UsageError, match=r"m\.clip\.onnx: missing; it holds the temporal head of m\.onnx"):
        load_scorer(tmp_path / "m.onnx")


class Plain(Scorer):
    """A scorer without a temporal head."""

    def _outputs(self, crops: np.ndarray) -> np.ndarray:
        return np.zeros((len(crops), 3))


def test_a_runtime_without_the_head_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Plain(dataclasses.replace(SMALL, clip=CLIP), "", "another runtime")
    monkeypatch.setattr("dtn_fast.runtime.load._opened", lambda *_: plain)
    with pytest.warns(DtnWarning, match=r"m\.mnn: its temporal head does not run through another runtime"):
        judged = load_scorer(tmp_path / "m.mnn").judge(np.zeros((2, SIDE, SIDE, 3), np.uint8))
    assert judged.features is None
    assert judged.novelty is not None


def test_limits_of_videos_are_calibrated_on_clips(
    head: Path, data: CropDataset, tmp_path: Path, monkeypatch: Any
) -> None:
    shutil.copytree(head, tmp_path / "head")
    assert load_model(head).config.card.calibration is None, "the frame model's would not hold"
    monkeypatch.setattr("dtn_fast.evaluation.calibration.open_data", lambda *_: data)
    *_, made = calibrate(tmp_path / "head", Path("/o"), CalibrateConfig(false_alarms=0.1))
    assert isinstance(made, Calibrated)
    limits = made.card.calibration
    assert limits is not None
    assert limits.clip is not None
    assert limits.video is not None
    scorer = load_scorer(tmp_path / "head")
    rows = data.select("val")
    clips = score_clips(scorer, data, rows)
    scores = clip_probability(scorer, clips.logits)[clips.of]
    reals = [scores[data.video[rows] == v].mean() for v in np.unique(data.video[rows]) if not data.videos[v].label]
    assert sum(score >= limits.clip.fake_from for score in reals) <= 0.1 * (len(reals) + 1)
    assert limits.clip.brier < 0.1 < limits.video.brier
    assert [row.level for row in limits.measured] == ["frame", "video", "clip"]
    write_video(tmp_path / "v.mp4", list(pictures(np.linspace(40, 200, FRAMES), np.random.default_rng(0), 96)), fps=5)
    result = detect(tmp_path / "v.mp4", scorer, DetectConfig(novelty=False), Whole())
    assert result.limits.fake_from >= limits.clip.fake_from
    assert result.limits.reals == limits.clip.reals
    card = json.loads((tmp_path / "head" / "card.json").read_text())
    del card["calibration"]["clip"]
    (tmp_path / "head" / "card.json").write_text(json.dumps(card))
    with pytest.raises(UsageError, match="calibrated without the temporal head that scores its videos"):
        load_scorer(tmp_path / "head")


def test_a_head_begins_as_the_mean_and_leaves_the_frame_model_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = DTN(SMALL).eval()
    torch.manual_seed(0)
    model = DTN(dataclasses.replace(SMALL, clip=5)).eval()
    images = torch.randn(3, 3, SIDE, SIDE)
    assert torch.equal(plain(images), model(images))
    assert plain.state_dict().keys() == {name for name in model.state_dict() if not name.startswith("temporal.")}
    assert model.classifiers() == [model.head]
    assert isinstance(model.temporal, TemporalHead)
    features, logits = torch.randn(2, 5, 64), torch.randn(2, 5, 2)
    assert torch.equal(model.temporal(features, logits), logits.mean(1))
    torch.nn.init.normal_(model.temporal.out.weight)
    assert not torch.allclose(model.temporal(features, logits), model.temporal(features.flip(1), logits), atol=1e-3)
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(load_detector(tmp_path / "m").temporal(features, logits), model.temporal(features, logits))
    plain.save_pretrained(tmp_path / "plain")
    text = (tmp_path / "plain" / "config.json").read_text().replace('"clip": 0', '"clip": 5')
    (tmp_path / "plain" / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"temporal\.\S+ is absent"):
        load_detector(tmp_path / "plain")
    for wrong in (1, -2, 1000, 2.5):
        with pytest.raises(UsageError, match=r"DTNConfig\.clip is .*; it must be 0 or 2 to 128"):
            dataclasses.replace(SMALL, clip=wrong)


def test_a_timm_model_has_the_features_of_its_classifier(data: CropDataset) -> None:
    model = TimmDetector(TimmConfig("test_vit", SIDE, clip=CLIP)).eval()
    scorer = TorchScorer(model)
    crops = data.get(np.arange(3))
    assert scorer.clips is not None
    judged = scorer.judge(crops)
    plain = TorchScorer(TimmDetector(TimmConfig("test_vit", SIDE)))
    assert plain.judge(crops).features is None
    assert judged.features is not None
    assert judged.features.shape == (3, model.net.num_features)
    last = model.classifiers()[0]
    assert torch.allclose(last(torch.from_numpy(judged.features).float()).double(), torch.from_numpy(judged.logits))


def test_a_stopped_head_is_resumed_to_the_same_bits(base: Path, data: CropDataset, tmp_path: Path) -> None:
    recipe = changed(HEAD, epochs=3)
    whole = trained_head(base, data, tmp_path / "whole", recipe)
    job = TemporalRun(base, data, tmp_path / "cut", recipe, "cpu")
    for state in job.features():
        if state.done > state.total / 3:
            break
    done = np.isfinite(np.load(tmp_path / "cut" / FEATURES["train"])).all(2).sum()
    job = TemporalRun(base, data, tmp_path / "cut", recipe, "cpu")
    first = next(iter(job.features()))
    assert first.done == done > 0
    job = TemporalRun(base, data, tmp_path / "cut", recipe, "cpu")
    assert list(job.features())[-1].done == first.total
    steps = iter([0] * 7 + [15])
    with pytest.raises(Stopped, match="epoch 2, step 3"):
        for _ in job.fit(lambda: next(steps)):
            pass
    trained_head(base, data, tmp_path / "cut", recipe)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    one, other = (load_state(tmp_path / name / STATE)["head"] for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [read_lines(tmp_path / name / METRICS) for name in ("whole", "cut")]
    assert [row["losses"] for row in rows[0]] == [row["losses"] for row in rows[1]]
    assert not list((tmp_path / "cut").glob("*.npy"))
    assert list(whole.fit()) == []
    with pytest.raises(UsageError, match=r"holds a temporal head with recipe\.lr 0\.001 \(now 0\.1\)"):
        TemporalRun(base, data, tmp_path / "cut", changed(recipe, lr=0.1), "cpu")


def test_a_head_that_is_never_better_stays_the_mean(base: Path, data: CropDataset, tmp_path: Path) -> None:
    """A rate at which nothing is learned: the kept head is the untrained one, and that is said."""
    job = TemporalRun(base, data, tmp_path / "h", changed(HEAD, epochs=1, lr=1e3, versions=1, augment="none"), "cpu")
    for _ in job.features():
        pass
    events = list(job.fit())
    assert isinstance(events[0], Step)
    assert isinstance(events[-1], Epoch)
    kept = load_model(tmp_path / "h").temporal
    assert kept is not None
    assert bool(kept.out.weight.any()) == (events[-1].val_auc >= events[-1].val_aucs["mean over frames"])
    assert ("no epoch was better" in job.lines()[0]) != bool(kept.out.weight.any())


def test_clips_are_balanced_ordered_and_the_same_for_a_seed(data: CropDataset) -> None:
    keep = np.array([v.label == 0 or int(v.path.rsplit("/", 1)[1]) < 10 for v in data.videos])
    few = part(data, keep)
    rows = few.select("train")[::-1]
    loader = lambda seed=0, **where: ClipLoader(few, rows, CLIP, 4, (seed,), 3, 0, **where)
    first = list(loader().epoch(0))
    for batch in first:
        videos, frames = few.video[batch.rows], few.frame[batch.rows]
        assert (videos == videos[:, :1]).all()
        assert (np.diff(frames) == 5).all()
        assert np.array_equal(few.labels[batch.rows[:, 0]], batch.labels)
    labels = np.concatenate([batch.labels for batch in first])
    assert len(loader().tracks) == 50
    assert 0.15 < labels.mean() < 0.25, "each of 40 reals once, each of 10 fakes once"
    repeated = ClipLoader(few, rows, CLIP, 4, (0,), 3, 0)
    assert len(repeated) == 12
    same = lambda one, other: all(
        np.array_equal(x, y) for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True)
    )
    assert same(first, loader().epoch(0))
    assert same(first[3:], loader().epoch(0, 3))
    assert not same(first, loader().epoch(1))
    assert not same(first, loader(1).epoch(0))
    halves = [list(ClipLoader(few, rows, CLIP, 2, (0,), 3, 0, rank, 2).epoch(0)) for rank in (0, 1)]
    for whole, one, other in zip(first, *halves, strict=True):
        assert np.array_equal(whole.rows[0::2], one.rows)
        assert np.array_equal(whole.rows[1::2], other.rows)


def test_the_frames_of_a_clip_are_augmented_alike(data: CropDataset) -> None:
    track = tracks_of(data, data.select("train"))[0]
    frozen = dataclasses.replace(data, crops=ShardFiles([np.repeat(data.get(track[:1]), len(data.video), 0)], SIDE))
    loader = ClipLoader(frozen, data.select("train"), CLIP, 4, (0,), 4, 0)
    change = Augment(AUGMENTATIONS["forensic"])
    seen = [loader.crops(track, number, view, change) for number, view in ((0, 0), (0, 1), (0, 2), (1, 1))]
    for crops in seen:
        assert (crops == crops[0]).all()
    assert np.array_equal(seen[0], frozen.get(track))
    assert all(not np.array_equal(seen[a], seen[b]) for a in range(4) for b in range(a))


def test_what_cannot_have_a_head_is_refused(base: Path, head: Path, data: CropDataset, tmp_path: Path) -> None:
    none = part(data, np.array([v.split != "val" for v in data.videos]))
    with pytest.raises(UsageError, match="the val split needs reals and fakes"):
        TemporalRun(base, none, tmp_path / "a", HEAD, "cpu")
    with pytest.raises(UsageError, match="holds other files; choose another --out"):
        TemporalRun(base, data, base, HEAD, "cpu")
    with pytest.raises(UsageError, match="the model has a temporal head"):
        next(iter(fit(load_model(head), data, RECIPE, tmp_path / "b")))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "temporal.json").write_text("{")
    with pytest.raises(UsageError, match=r"temporal\.json: damaged"):
        TemporalRun(base, data, tmp_path / "c", HEAD, "cpu")
