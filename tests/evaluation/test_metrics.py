"""Metrics against scikit-learn, on ties and one class, and grouped by video."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from dtn_fast.errors import UsageError
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.metrics import UNDEFINED, auc_gain_interval, auc_interval, by_video, evaluate_scores

ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=1, max_size=60)


@given(ROWS)
def test_against_scikit_learn(rows: list[tuple[int, int]]) -> None:
    y, s = np.array([r[0] for r in rows]), np.array([r[1] / 8 for r in rows])  # few values: many ties
    m = evaluate_scores(y, s, 0.5)
    assert m.acc == pytest.approx(sk.accuracy_score(y, s >= 0.5))
    if len(set(y.tolist())) == 1:
        assert (m.auc, m.eer, m.ap) == (None, None, None)
        assert m.text("auc") == UNDEFINED
        return
    assert m.auc == pytest.approx(sk.roc_auc_score(y, s), abs=1e-12)
    assert m.ap == pytest.approx(sk.average_precision_score(y, s), abs=1e-12)
    fpr, tpr, _ = sk.roc_curve(y, s, drop_intermediate=False)
    grid = np.linspace(0, 1, 200_001)  # where the ROC, drawn with straight lines, meets the diagonal of equal errors
    points = np.interp(grid, np.linspace(0, 1, len(fpr)), fpr), np.interp(grid, np.linspace(0, 1, len(tpr)), tpr)
    nearest = np.argmin(np.abs(points[0] - (1 - points[1])))
    assert m.eer == pytest.approx(points[0][nearest], abs=1e-3)


def test_known_eer() -> None:
    assert evaluate_scores([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], 0.5).eer == 0
    assert evaluate_scores([0, 0, 1, 1], [0.8, 0.9, 0.1, 0.2], 0.5).eer == 1
    assert evaluate_scores([0, 1, 0, 1], [0.1, 0.4, 0.6, 0.9], 0.5).eer == pytest.approx(0.5)


def test_empty_and_bad_input() -> None:
    assert evaluate_scores([], [], 0.5).acc is None
    for labels, scores, word in (
        ([0, 1], [0.5], "equally long"),
        ([0, 2], [0.1, 0.2], "0 .real."),
        ([0, 1], [0.1, np.nan], "not finite"),
    ):
        with pytest.raises(ValueError, match=word):
            evaluate_scores(labels, scores, 0.5)


def test_videos_are_grouped_by_full_path() -> None:
    names = ["a/953_974", "b/953_974", "a/953_974", "c/000"]
    labels, scores = by_video(names, [1, 1, 1, 0], [0.2, 1.0, 0.6, 0.3])
    assert labels.tolist() == [1, 1, 0]
    assert scores.tolist() == pytest.approx([0.4, 1.0, 0.3])
    with pytest.raises(ValueError, match="x has frames of both labels"):
        by_video(["x", "x"], [0, 1], [0.1, 0.2])


def test_interval_of_auc() -> None:
    """Against a plain resampling of whole videos; wider than by frames; ties count half."""
    rng = np.random.default_rng(3)
    videos = np.repeat(np.arange(24), 10)
    labels = (videos % 2).astype(int)
    scores = np.round(labels * 0.5 + rng.normal(size=24)[videos] + 0.1 * rng.normal(size=240), 1)
    names = [f"v{n}" for n in videos]
    low, high = auc_interval(labels, scores, names, 2000, 0.95)
    plain = []
    for _ in range(2000):
        drawn = np.concatenate([rng.choice(np.arange(kind, 24, 2), 12) for kind in (0, 1)])
        rows = np.concatenate([np.flatnonzero(videos == v) for v in drawn])
        plain.append(evaluate_scores(labels[rows], scores[rows], 0.5).auc)
    assert np.allclose((low, high), np.quantile(plain, [0.025, 0.975]), atol=0.03)
    auc = evaluate_scores(labels, scores, 0.5).auc
    assert low < auc < high
    frames = auc_interval(labels, scores, [str(n) for n in range(240)], 1000, 0.95)
    assert frames[1] - frames[0] < 0.6 * (high - low)
    assert auc_interval(labels, scores, names, 1000, 0.95) == auc_interval(labels, scores, names, 1000, 0.95)
    assert auc_interval(np.ones(3, int), np.zeros(3), list("abc"), 1000, 0.95) is None
    assert auc_interval([0, 1, 0, 1], [0.5] * 4, list("abcd"), 1000, 0.95) == (0.5, 0.5)
    assert auc_interval([0, 1], [0.1, 0.9], list("ab"), 1000, 0.95) == (1.0, 1.0)


def test_the_interval_of_a_gain_is_paired() -> None:
    """What is hard about a video is in both models' scores and cancels; the draws are those of the AUC's interval."""
    rng = np.random.default_rng(1)
    videos = np.repeat(np.arange(30), 8)
    labels = (videos % 2).astype(int)
    before = labels + 2 * rng.normal(size=30)[videos]
    after = before + 0.3 * labels
    names = [f"v{n}" for n in videos]
    low, high = auc_gain_interval(labels, before, after, names, 500, 0.95)
    gained = evaluate_scores(labels, after, 0.5).auc - evaluate_scores(labels, before, 0.5).auc
    assert 0 < low < gained < high
    alone = auc_interval(labels, before, names, 500, 0.95)
    assert alone[0] < evaluate_scores(labels, after, 0.5).auc < alone[1], "unpaired, the gain would not show"
    assert auc_gain_interval(labels, after, before, names, 500, 0.95) == pytest.approx((-high, -low))
    assert auc_gain_interval(labels, before, before, names, 500, 0.95) == (0, 0)
    assert auc_gain_interval(np.ones(3, int), np.zeros(3), np.zeros(3), list("abc"), 10, 0.95) is None


@pytest.mark.parametrize(
    "wrong", [{"threshold": 1.5}, {"bootstrap_draws": 0}, {"confidence": 1.0}, {"confidence": float("nan")}]
)
def test_settings_out_of_range_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        EvaluateConfig(**wrong)
