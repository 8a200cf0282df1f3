"""From the synthetic tree to shards: layout, splits, honesty controls, damaged files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from small import SET

from dtn_fast.data.augment import Augment
from dtn_fast.data.manifest import read_ffpp
from dtn_fast.data.shards import Shards, open_shards, prepare
from dtn_fast.data.synthetic import METHODS, SyntheticConfig, film, is_synthetic, make_synthetic
from dtn_fast.data.video import write_video
from dtn_fast.errors import UsageError
from dtn_fast.metrics import evaluate_scores


def test_the_tree_is_that_of_ffpp(dataset: Path) -> None:
    manifest = read_ffpp(dataset)
    assert manifest.synthetic
    count = SET.train + SET.val + SET.test
    assert len(manifest.videos) == count * (1 + len(METHODS))
    assert sum(v.label == 0 for v in manifest.videos) == count
    fake = next(v for v in manifest.videos if v.label)
    assert fake.path == f"manipulated_sequences/{fake.method}/c23/videos/{'_'.join(fake.identities)}.mp4"
    by_identity: dict[str, set[str]] = {}
    for video in manifest.videos:
        for identity in video.identities:
            by_identity.setdefault(identity, set()).add(video.split)
    assert all(len(splits) == 1 for splits in by_identity.values()), "identities are disjoint between splits"
    with av.open(str(dataset / fake.path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"


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


def test_generation_resumes_and_refuses_other_folders(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    victim = next(copy.glob("manipulated_sequences/*/c23/videos/*.mp4"))
    before = victim.read_bytes()
    victim.unlink()
    steps = list(make_synthetic(copy, SET))
    assert steps[0] == (steps[-1][1] - 1, steps[-1][1])
    assert victim.read_bytes() == before
    with pytest.raises(UsageError, match="another configuration"):
        next(make_synthetic(copy, SyntheticConfig(seed=1)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        next(make_synthetic(tmp_path / "other", SET))
    with pytest.raises(UsageError, match="even number"):
        SyntheticConfig(train=3)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shards]:
    """A set of short videos with enough identities for statistics."""
    root = tmp_path_factory.mktemp("larger")
    for _ in make_synthetic(root / "set", SyntheticConfig(train=24, val=2, test=24, frames=1)):
        pass
    for _ in prepare(read_ffpp(root / "set"), root / "crops", 128, frames=1):
        pass
    return root / "set", open_shards(root / "crops")


def _auc(features: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    model.fit(features[train], labels[train])
    auc = evaluate_scores(labels[test], model.predict_proba(features[test])[:, 1]).auc
    assert auc is not None
    return auc


def _traces(shards: Shards) -> np.ndarray:
    """High-frequency energy of a crop, inside and outside the face: what most forgeries disturb."""
    x = shards.crops.astype(np.float32).mean(3)
    detail = np.abs(4 * x[:, 1:-1, 1:-1] - x[:, :-2, 1:-1] - x[:, 2:, 1:-1] - x[:, 1:-1, :-2] - x[:, 1:-1, 2:])
    inside, outside = detail[:, 32:96, 40:88].mean((1, 2)), detail[:, :8].mean((1, 2))
    return np.log(np.stack([inside, outside, inside / outside], 1))


def test_controls_score_chance(larger: tuple[Path, Shards]) -> None:
    """Neither the files' metadata nor shuffled labels predict anything; the pixels do."""
    root, shards = larger
    split = np.array([v.split for v in shards.videos])
    labels = np.array([v.label for v in shards.videos])
    train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    metadata = []
    for video in shards.videos:
        path = root / video.path
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            metadata.append([path.stat().st_size, stream.frames, float(stream.average_rate), stream.width,
                             stream.height, stream.bit_rate or 0, float(stream.duration or 0)])  # fmt: skip
    deviation = ((24 + 96 + 1) / (12 * 24 * 96)) ** 0.5  # of the AUC of 24 reals and 96 fakes under chance
    assert _auc(np.array(metadata), labels, train, test) == pytest.approx(0.5, abs=3 * deviation)

    traces, rows = _traces(shards), {s: np.flatnonzero(split[shards.video] == s) for s in ("train", "test")}
    assert _auc(traces, shards.labels, rows["train"], rows["test"]) > 0.5 + 3 * deviation
    shuffled = shards.labels.copy()
    rng = np.random.default_rng(0)
    shuffled[rows["train"]] = rng.permutation(shuffled[rows["train"]])
    scores = [_auc(traces, np.where(np.isin(np.arange(len(shuffled)), rows["train"]), rng.permutation(shuffled),
                                    shards.labels), rows["train"], rows["test"]) for _ in range(8)]  # fmt: skip
    assert np.mean(scores) == pytest.approx(0.5, abs=0.15)


def test_shards_hold_the_crops_of_the_index(dataset: Path, crops: Path, shards: Shards) -> None:
    assert shards.crops.dtype == np.uint8
    assert isinstance(shards.crops, np.memmap)
    assert len(shards.crops) == len(shards.labels) == sum(s["faces"] for s in shards.status)
    assert all(s["frames"] == SET.frames and s["error"] is None for s in shards.status)
    for split in ("train", "val", "test"):
        rows = shards.select(split)
        assert {shards.videos[v].split for v in shards.video[rows]} == {split}
    one = shards.select("train", ("SynthSwap",))
    assert {shards.videos[v].method for v in shards.video[one]} == {"real", "SynthSwap"}
    assert sorted(p.name for p in crops.iterdir()) == ["crops.npy", "index.json"]


def test_prepare_counts_what_it_cannot_use(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    manifest = read_ffpp(copy)
    (copy / manifest.videos[0].path).write_text("not a video")
    write_video(copy / manifest.videos[1].path, [np.zeros((64, 64, 3), np.uint8)] * 3)
    for _ in prepare(manifest, tmp_path / "crops", 64, frames=2):
        pass
    shards = open_shards(tmp_path / "crops")
    assert "cannot read this video" in shards.status[0]["error"]
    assert shards.status[1] == {"frames": 2, "faces": 0, "error": None}
    assert not np.isin([0, 1], shards.video).any()


def test_no_face_anywhere_is_an_error(dataset: Path, tmp_path: Path) -> None:
    manifest = read_ffpp(dataset)
    write_video(tmp_path / manifest.videos[0].path, [np.zeros((64, 64, 3), np.uint8)] * 3)
    with pytest.raises(UsageError, match="no face was found"):
        list(prepare(manifest._replace(root=tmp_path, videos=manifest.videos[:1]), tmp_path / "crops", 64))


def test_manifest_errors(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is it the FF"):
        read_ffpp(tmp_path)
    splits = tmp_path / "splits"
    shutil.copytree(dataset / "splits", splits)
    train = json.loads((splits / "train.json").read_text())
    for text, word in (("[[1]]", "id pairs"), ("{", "id pairs"), ('[["../x", "y"]]', "plain name"), ("[]", "empty")):
        (splits / "train.json").write_text(text)
        with pytest.raises(UsageError, match=word):
            read_ffpp(dataset, splits=splits)
    (splits / "train.json").write_text(json.dumps([["000", "999"]]))
    with pytest.raises(UsageError, match=r"videos are missing, the first is .*999"):
        read_ffpp(dataset, splits=splits)
    (splits / "train.json").write_text(json.dumps(train))
    shutil.copy(splits / "train.json", splits / "val.json")
    with pytest.raises(UsageError, match=r"identity .* is in both train and val"):
        read_ffpp(dataset, splits=splits)
    (splits / "val.json").unlink()
    with pytest.raises(UsageError, match=r"val\.json"):
        read_ffpp(dataset, splits=splits)


def test_damaged_shards_are_refused(crops: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dtn-fast prepare"):
        open_shards(tmp_path)
    shutil.copytree(crops, tmp_path / "c")
    data = (crops / "crops.npy").read_bytes()
    (tmp_path / "c" / "crops.npy").write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match="dtn-fast prepare"):
        open_shards(tmp_path / "c")


def test_augmentation_repeats_with_its_seed_and_keeps_the_shape(shards: Shards) -> None:
    batch = np.asarray(shards.crops[:16])
    one, two, other = Augment(1)(batch), Augment(1)(batch), Augment(2)(batch)
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    assert one.shape == batch.shape
    assert one.dtype == np.uint8
    assert is_synthetic(Path("/nowhere")) is False
