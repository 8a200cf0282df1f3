"""From the synthetic tree to shards: layout, splits, honesty controls, damaged files."""

from __future__ import annotations

import shutil
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from small import SET

from dtn_fast.data.config import PrepareConfig, SyntheticConfig, WorkConfig
from dtn_fast.data.crop_dataset import CropDataset, open_crop_dataset
from dtn_fast.data.datasets.ffpp import read_ffpp
from dtn_fast.data.forged_face import masks_of
from dtn_fast.data.masks import FORGED
from dtn_fast.data.prepare import prepare
from dtn_fast.data.synthetic_faces import film, film_and_masks, make_synthetic
from dtn_fast.data.synthetic_marker import METHODS
from dtn_fast.data.video import read_frames
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.metrics import evaluate_scores


def test_the_tree_is_that_of_ffpp(video_set: Path) -> None:
    table = read_ffpp(video_set)
    assert table.synthetic
    count = SET.train + SET.val + SET.test
    assert len(table.videos) == count * (1 + len(METHODS))
    assert sum(v.label == 0 for v in table.videos) == count
    fake = next(v for v in table.videos if v.label)
    assert fake.path == f"manipulated_sequences/{fake.method}/c23/videos/{'_'.join(fake.identities)}.mp4"
    by_identity: dict[str, set[str]] = {}
    for video in table.videos:
        for identity in video.identities:
            by_identity.setdefault(identity, set()).add(video.split)
    assert all(len(splits) == 1 for splits in by_identity.values()), "identities are disjoint between splits"
    with av.open(str(video_set / fake.path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"


def test_the_masks_show_what_was_forged(video_set: Path) -> None:
    """As FF++'s: a video of each forgery's masks, outside which the frames are those of the unforged render."""
    table = read_ffpp(video_set)
    for video in table.videos[: 1 + len(METHODS)]:
        if not video.label:
            assert video.mask == ""
            continue
        assert video.mask == video.path.replace("/c23/", "/masks/")
        mask_of = masks_of(table, video, SET.frames)
        assert mask_of is not None
        people = map(int, video.identities)
        true = film_and_masks(*people, video.method, SET.frames, SET.size, SET.seed)[1]
        frames = list(read_frames(video_set / video.path, None))
        assert len(frames) == len(true) == SET.frames
        for frame, drawn in zip(frames, true, strict=True):
            stored = mask_of(frame)
            assert stored is not None
            assert ((stored >= FORGED) != (drawn > 0)).mean() < 0.01, "but for the codec"
    for method in METHODS:
        plain, (forged, masks) = film(3, None, None, 2, 128, 0), film_and_masks(3, 4, method, 2, 128, 0)
        for before, after, mask in zip(plain, forged, masks, strict=True):
            change = np.abs(before.astype(int) - after).max(2)
            around = cv2.dilate(mask, np.ones((25, 25), np.uint8))  # the blend's soft edge
            assert set(np.unique(mask)) == {0, 255}
            assert change[around == 0].max() <= 1
            assert change[mask > 0].mean() > 1, method


def test_rendering_repeats_and_every_method_changes_the_face_only() -> None:
    real = np.stack(film(3, None, None, 2, 128, 0)).astype(int)
    assert np.array_equal(real, np.stack(film(3, None, None, 2, 128, 0)))
    assert not np.array_equal(real, np.stack(film(4, None, None, 2, 128, 0)))
    for method in METHODS:
        fake = np.stack(film(3, 4, method, 2, 128, 0)).astype(int)
        changed = np.abs(fake - real).max(3)
        assert changed[:, 40:90, 45:80].mean() > 0.5, method
        assert changed[:, :8].max() <= 1, method
        assert changed[:, -8:].max() <= 1, method


def test_generation_resumes_and_refuses_other_folders(video_set: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(video_set, copy)
    victims = [next(copy.glob(f"manipulated_sequences/{where}/videos/*.mp4")) for where in ("SynthSwap/c23", "*/masks")]
    before = [victim.read_bytes() for victim in victims]
    for victim in victims:
        victim.unlink()
    beside = Path(str(victims[1]).replace("/masks/", "/c23/"))
    beside.write_bytes(b"kept")  # an earlier version's set has videos and no masks
    steps = list(make_synthetic(copy, SET, 2))
    assert steps[0] == (steps[-1][1] - 2, steps[-1][1])
    assert [victim.read_bytes() for victim in victims] == before
    assert beside.read_bytes() == b"kept"
    with pytest.raises(UsageError, match="another configuration"):
        next(make_synthetic(copy, SyntheticConfig(seed=1), 2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        next(make_synthetic(tmp_path / "other", SET, 2))
    with pytest.raises(UsageError, match="even number"):
        SyntheticConfig(train=3)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CropDataset]:
    """A set of short videos with enough identities for statistics."""
    root = tmp_path_factory.mktemp("larger")
    for _ in make_synthetic(root / "set", SyntheticConfig(train=24, val=2, test=24, frames=1), 2):
        pass
    for _ in prepare(read_ffpp(root / "set"), root / "crops", 128, PrepareConfig(frames=1), WorkConfig()):
        pass
    return root / "set", open_crop_dataset(root / "crops")


def _auc(features: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    model.fit(features[train], labels[train])
    auc = evaluate_scores(labels[test], model.predict_proba(features[test])[:, 1], 0.5).auc
    assert auc is not None
    return auc


def _traces(dataset: CropDataset) -> np.ndarray:
    """High-frequency energy of a crop, inside and outside the face: what most forgeries disturb."""
    x = dataset.get(np.arange(len(dataset.video))).astype(np.float32).mean(3)
    detail = np.abs(4 * x[:, 1:-1, 1:-1] - x[:, :-2, 1:-1] - x[:, 2:, 1:-1] - x[:, 1:-1, :-2] - x[:, 1:-1, 2:])
    inside, outside = detail[:, 32:96, 40:88].mean((1, 2)), detail[:, :8].mean((1, 2))
    return np.log(np.stack([inside, outside, inside / outside], 1))


def test_controls_score_chance(larger: tuple[Path, CropDataset]) -> None:
    """Neither the files' metadata nor shuffled labels predict anything; the pixels do."""
    root, dataset = larger
    split = np.array([v.split for v in dataset.videos])
    labels = np.array([v.label for v in dataset.videos])
    train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    metadata = []
    for video in dataset.videos:
        path = root / video.path
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            metadata.append([path.stat().st_size, stream.frames, float(stream.average_rate), stream.width,
                             stream.height, stream.bit_rate or 0, float(stream.duration or 0)])  # fmt: skip
    deviation = ((24 + 96 + 1) / (12 * 24 * 96)) ** 0.5  # of the AUC of 24 reals and 96 fakes under chance
    assert _auc(np.array(metadata), labels, train, test) == pytest.approx(0.5, abs=3 * deviation)

    traces, rows = _traces(dataset), {s: np.flatnonzero(split[dataset.video] == s) for s in ("train", "test")}
    assert _auc(traces, dataset.labels, rows["train"], rows["test"]) > 0.5 + 3 * deviation
    shuffled = dataset.labels.copy()
    rng = np.random.default_rng(0)
    shuffled[rows["train"]] = rng.permutation(shuffled[rows["train"]])
    scores = [_auc(traces, np.where(np.isin(np.arange(len(shuffled)), rows["train"]), rng.permutation(shuffled),
                                    dataset.labels), rows["train"], rows["test"]) for _ in range(8)]  # fmt: skip
    assert np.mean(scores) == pytest.approx(0.5, abs=0.15)
