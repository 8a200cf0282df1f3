"""Frame- and video-level metrics as pure functions: ACC, AUC, EER, AP.  Scores are P(fake), labels 0 real, 1 fake.

Equal to scikit-learn to 1e-13 (tested).  Kept because training must run without scikit-learn, whose import takes over a
second, and because the bootstrap is twenty times faster on ranks computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

UNDEFINED = "undefined (one class)"


class Metrics(NamedTuple):
    """ACC, AUC, EER and AP, and the number of reals and fakes.

    ``auc``, ``eer`` and ``ap`` are None unless both classes are present; ``acc`` is None only without input.
    """

    acc: float | None
    auc: float | None
    eer: float | None
    ap: float | None
    reals: int
    fakes: int

    def text(self, name: str) -> str:
        """A metric as text: four decimals, or the reason why it is undefined."""
        value = getattr(self, name)
        return UNDEFINED if value is None else f"{value:.4f}"


def roc(labels: NDArray, scores: NDArray) -> tuple[NDArray, NDArray]:
    """False and true positive rates at every distinct threshold, from (0, 0) to (1, 1).  Needs both classes."""
    order = np.argsort(-scores, kind="stable")
    labels, scores = labels[order], scores[order]
    last = np.append(np.diff(scores) != 0, True)  # the last of each run of equal scores
    true = np.cumsum(labels)[last]
    false = np.cumsum(1 - labels)[last]
    return np.append(0, false / false[-1]), np.append(0, true / true[-1])


def evaluate_scores(labels: ArrayLike, scores: ArrayLike, threshold: float) -> Metrics:
    """Metrics of P(fake) ``scores`` against 0/1 ``labels``, both [n].

    AUC is the trapezoid area under the ROC (ties count half), AP the step sum of precision over recall, EER the rate
    where the linearly interpolated ROC crosses false positives = misses.  Raises ValueError on unequal lengths, labels
    other than 0/1 or non-finite scores.
    """
    y, s = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if y.ndim != 1 or y.shape != s.shape:
        raise ValueError(f"labels and scores must be equally long lists, got {y.shape} and {s.shape}")
    if not np.isin(y, (0, 1)).all():
        raise ValueError("labels must be 0 (real) or 1 (fake)")
    if not np.isfinite(s).all():
        raise ValueError(f"scores: {int((~np.isfinite(s)).sum())} of {len(s)} are not finite")
    y = y.astype(np.int64)
    fakes = int(y.sum())
    reals = len(y) - fakes
    acc = float(((s >= threshold) == y).mean()) if len(y) else None
    if not fakes or not reals:
        return Metrics(acc, None, None, None, reals, fakes)
    fpr, tpr = roc(y, s)
    auc = float(np.trapezoid(tpr, fpr))
    gap = fpr - (1 - tpr)  # rises from -1 to 1
    i = int(np.argmax(gap >= 0))
    eer = float(np.interp(0.0, gap[i - 1 : i + 1], fpr[i - 1 : i + 1]))
    precision = tpr * fakes / np.maximum(tpr * fakes + fpr * reals, 1e-12)
    ap = float(np.sum(np.diff(tpr) * precision[1:]))
    return Metrics(acc, auc, eer, ap, reals, fakes)


def auc_interval(
    labels: ArrayLike, scores: ArrayLike, videos: Sequence[str], draws: int, confidence: float
) -> tuple[float, float] | None:
    """Confidence interval of the AUC by the percentile bootstrap over videos; None with a single class.

    A drawn video brings all its frames, since they are not independent; reals and fakes are drawn separately, so that
    both are in every draw.  Where ``videos`` names people, those who have both kinds are drawn apart as well.  labels
    and scores as in :func:`evaluate_scores`, videos as in :func:`by_video`; draws: number of bootstrap draws;
    confidence: level of the interval, such as 0.95.
    """
    values = _drawn_aucs(labels, scores, videos, draws)
    return None if values is None else _interval(values, confidence)


def auc_gain_interval(
    labels: ArrayLike, before: ArrayLike, after: ArrayLike, videos: Sequence[str], draws: int, confidence: float,
    parts: Iterable[NDArray] = (),
) -> tuple[float, float] | None:  # fmt: skip
    """Confidence interval of the AUC of the scores ``after`` minus that of ``before``, both of the same frames.

    As :func:`auc_interval`, each draw of videos serving both, so that what is hard about a video cancels.  parts: masks
    [n]; with them, the interval of the mean of the parts' AUCs.
    """
    y, old, new, names = (np.asarray(given) for given in (labels, before, after, videos))
    gains = []
    for part in parts or [np.ones(len(y), bool)]:
        a, b = (_drawn_aucs(y[part], scores[part], names[part].tolist(), draws) for scores in (old, new))
        if a is None or b is None:
            return None
        gains.append(b - a)
    return _interval(np.mean(gains, 0), confidence)


def mean_interval(values: ArrayLike, videos: ArrayLike, draws: int, confidence: float) -> tuple[float, float]:
    """Confidence interval of the mean of ``values`` [n], at least one, by the percentile bootstrap over videos.

    A drawn video brings all its values.  videos: name or number of each value's video, [n]; draws and confidence as in
    :func:`auc_interval`.
    """
    names, video = np.unique(np.asarray(videos), return_inverse=True)
    sums = np.bincount(video, np.asarray(values, dtype=np.float64))
    counts = np.bincount(video)
    drawn = np.random.default_rng(0).integers(len(names), size=(draws, len(names)))
    return _interval(sums[drawn].sum(1) / counts[drawn].sum(1), confidence)


def _interval(values: NDArray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _drawn_aucs(labels: ArrayLike, scores: ArrayLike, videos: Sequence[str], draws: int) -> NDArray | None:
    """AUC in each bootstrap draw [draws], the same draws for all scores; None with a single class."""
    y, s = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    names, video = np.unique(np.asarray(videos), return_inverse=True)
    if len(set(y.tolist())) < 2:
        return None
    kinds = np.array([(np.bincount(video, y == kind) > 0) for kind in (0, 1)]).T @ (1, 2)  # 3: has both
    drawn_apart = [np.flatnonzero(kinds == kind) for kind in (1, 2, 3) if (kinds == kind).any()]
    _, rank = np.unique(s, return_inverse=True)
    rng, values = np.random.default_rng(0), np.empty(draws)
    for draw in range(draws):
        times = np.zeros(len(names))
        for own in drawn_apart:
            times += np.bincount(rng.choice(own, len(own)), minlength=len(names))
        weight = times[video]
        real, fake = (np.bincount(rank, weight * (y == kind)) for kind in (0, 1))
        below = np.cumsum(real) - real / 2  # reals under each score, ties by half
        values[draw] = (fake * below).sum() / (real.sum() * fake.sum())
    return values


def by_video(videos: Sequence[str], labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray, NDArray]:
    """Labels and mean frame scores per video, in order of first appearance.

    ``videos`` names each frame's video by its full relative path: a bare name such as 953_974 stands for four
    different FF++ videos.  Raises ValueError when one video carries two labels.
    """
    names, index = np.unique(np.asarray(videos), return_inverse=True)
    y, s = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    counts = np.bincount(index, minlength=len(names))
    means = np.bincount(index, weights=s, minlength=len(names)) / np.maximum(counts, 1)
    positives = np.bincount(index, weights=y, minlength=len(names))
    mixed = (positives != 0) & (positives != counts)
    if mixed.any():
        raise ValueError(f"video {names[mixed][0]} has frames of both labels; name videos by their full path")
    first = np.full(len(names), len(index))
    np.minimum.at(first, index, np.arange(len(index)))
    order = np.argsort(first)
    return (positives > 0).astype(np.int64)[order], means[order]
