"""Calibration as pure functions: temperature, reliability, limits that keep a rate, intervals of rates.

Scores are P(fake), labels 0 real, 1 fake.  Frames of a video are not independent: a video's frames share a weight of
one, so that every rate is a mean over videos and every interval is one of as many cases as there are videos.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dtn_fast.model.card import Level, OperatingPoint

BINS = 15
"""Number of bins of the reliability diagram and the calibration error, as Guo et al. (2017) have it."""
BOUNDS = (-5.0, 5.0)
"""Range of the temperature's logarithm."""
EPSILON = 1e-9
"""Rounding of sums of weights."""
RATES = (0.01, 0.001)
"""False-alarm rates of the operating points."""
CURVE = 48
"""Number of thresholds of each class that a stored curve holds, and as many more of the highest reals."""


def video_weights(videos: Sequence[str]) -> NDArray[np.float64]:
    """Weight [n] of each frame, those of a video summing to 1."""
    _, index, counts = np.unique(np.asarray(videos), return_inverse=True, return_counts=True)
    return 1 / counts[index]


def even_odds(labels: NDArray[np.int64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """``weights`` scaled so that the reals and the fakes sum to one half each."""
    totals = np.bincount(labels, weights, minlength=2)
    return weights / (2 * totals[labels])


def fit_temperature(labels: NDArray[np.int64], logits: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """The temperature that minimises the negative log likelihood of logits [n, classes] (Guo et al., 2017), reals and
    fakes weighing the same.

    The targets of a class of N videos are (N + 1) / (N + 2) and its complement (Platt, 1999), so that the temperature
    of classes that are told apart without an error is not zero.
    """
    from scipy.optimize import minimize_scalar

    certain = (np.bincount(labels, weights, minlength=2) + 1) / (np.bincount(labels, weights, minlength=2) + 2)
    target = np.where(labels == 1, certain[1], 1 - certain[0])
    weights = even_odds(labels, weights)

    def loss(log_temperature: float) -> float:
        z = logits / np.exp(log_temperature)
        rest = np.delete(z, 1, axis=1)
        top = rest.max(1)
        odds = z[:, 1] - top - np.log(np.exp(rest - top[:, None]).sum(1))  # log of P(fake) / P(real)
        return float((weights * (target * np.logaddexp(0, -odds) + (1 - target) * np.logaddexp(0, odds))).sum())

    return float(np.exp(minimize_scalar(loss, bounds=BOUNDS, method="bounded", options={"xatol": 1e-6}).x))


def reliability(
    labels: NDArray[np.int64], scores: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[tuple[float, float, float], ...]:
    """Mean P(fake), share of fakes and share of the weight in each of BINS equal bins that is not empty."""
    weights = even_odds(labels, weights)
    place = np.minimum((scores * BINS).astype(int), BINS - 1)
    total, mean, fakes = (np.bincount(place, w, minlength=BINS) for w in (weights, weights * scores, weights * labels))
    full = total > 0
    values = np.stack([mean[full] / total[full], fakes[full] / total[full], total[full]], 1)
    return tuple((float(m), float(f), float(w)) for m, f, w in values)


def calibration_error(bins: Sequence[tuple[float, float, float]]) -> float:
    """Expected calibration error: mean distance of P(fake) from the share of fakes in a bin (Guo et al., 2017)."""
    return sum(share * abs(mean - fakes) for mean, fakes, share in bins)


def brier_score(labels: NDArray[np.int64], scores: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Mean squared distance of P(fake) from the label (Brier, 1950), reals and fakes weighing the same."""
    return float((even_odds(labels, weights) * (scores - labels) ** 2).sum())


def upper_limit(scores: NDArray[np.float64], weights: NDArray[np.float64], rate: float) -> tuple[float, float]:
    """The lowest limit that a new input of the same kind reaches with a probability of at most ``rate``, and the bound
    on that probability: split conformal prediction, by videos (Lee, Barber and Willett, 2023).

    With K videos no limit holds a rate under 1 / (K + 1); the bound is then that, and the limit over all scores.
    """
    cases = weights.sum()
    values, index = np.unique(-scores, return_inverse=True)  # highest score first
    mass = np.cumsum(np.bincount(index, weights))
    kept = int(np.searchsorted(mass, rate * (cases + 1) - 1 + EPSILON, side="right"))  # values at or over the limit
    values = -values
    mass = np.append(0, mass)
    limit = np.nextafter(values[kept], np.inf) if kept < len(values) else values[-1]
    return float(limit), float((mass[kept] + 1) / (cases + 1))


def rate_interval(rate: float, cases: float, confidence: float) -> tuple[float, float]:
    """Interval of a rate seen in ``cases`` independent ones (Clopper and Pearson, 1934)."""
    from scipy.stats import beta

    hits, tail = rate * cases, (1 - confidence) / 2
    low = float(beta.ppf(tail, hits, cases - hits + 1)) if hits > 0 else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, cases - hits)) if hits < cases else 1.0
    return low, high


def limit_high(bound: float, cases: float, confidence: float) -> float:
    """Upper end of the interval of the rate that a limit by :func:`upper_limit` has, given these cases: its rate over
    all sets of cases follows a beta distribution (Vovk, 2012)."""
    from scipy.stats import beta

    hits = bound * (cases + 1) - 1
    return float(beta.ppf((1 + confidence) / 2, hits + 1, cases - hits))


def curve_of(
    labels: NDArray[np.int64], scores: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[tuple[float, float, float], ...]:
    """Rising thresholds with the shares of reals and of fakes at or over each: a ROC curve, thinned out."""
    real, fake = scores[labels == 0], scores[labels == 1]
    spread = np.linspace(0, 1, CURVE)
    quantiles = [np.quantile(own, spread, method="nearest") for own in (real, fake)]
    thresholds = np.unique(np.concatenate([*quantiles, np.sort(real)[-CURVE:], [np.nextafter(real.max(), 2)]]))
    shares = []
    for kind in (0, 1):
        own = labels == kind
        order = np.argsort(scores[own])
        rest = np.append(np.cumsum(weights[own][order][::-1])[::-1], 0) / weights[own].sum()
        shares.append(rest[np.searchsorted(scores[own][order], thresholds)])
    return tuple((float(t), float(a), float(b)) for t, a, b in zip(thresholds, *shares, strict=True))


def operating_point(
    labels: NDArray[np.int64], scores: NDArray[np.float64], weights: NDArray[np.float64], rate: float, confidence: float
) -> OperatingPoint:
    """Threshold of a false-alarm rate, and the share of fakes that it finds."""
    real, fake = labels == 0, labels == 1
    if rate * (weights[real].sum() + 1) < 1 - EPSILON:
        return OperatingPoint(rate, None)
    threshold, _ = upper_limit(scores[real], weights[real], rate)
    found = float(weights[fake][scores[fake] >= threshold].sum() / weights[fake].sum())
    return OperatingPoint(rate, threshold, found, *rate_interval(found, weights[fake].sum(), confidence))


def level_of(
    labels: NDArray[np.int64],
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    weights: NDArray[np.float64],
    novelty: NDArray[np.float64] | None,
    rates: tuple[float, float, float],
    confidence: float,
    frames: int,
) -> Level:
    """Calibration of scores [n] with and without the temperature; both classes must be there.

    frames: median number of frames that a score is the mean of.  rates: wanted share of false alarms, of misses, and of
    inputs like the training data found unlike it.
    """
    real, fake = labels == 0, labels == 1
    fake_from, false_alarms = upper_limit(after[real], weights[real], rates[0])
    mirrored, misses = upper_limit(-after[fake], weights[fake], rates[1])
    real_up_to = -mirrored
    if real_up_to > fake_from:  # they cross, and change places: between them neither class is likely
        fake_from, real_up_to = real_up_to, fake_from
        over, under = after[real] >= fake_from, after[fake] <= real_up_to
        false_alarms = float((weights[real][over].sum() + 1) / (weights[real].sum() + 1))
        misses = float((weights[fake][under].sum() + 1) / (weights[fake].sum() + 1))
    novel: tuple[float | None, float | None] = (None, None)
    if novelty is not None:  # that of the class which needs the higher one
        each = [upper_limit(novelty[own], weights[own], rates[2]) for own in (real, fake)]
        novel = max(limit for limit, _ in each), max(bound for _, bound in each)
    bins = [reliability(labels, scores, weights) for scores in (before, after)]
    errors = [calibration_error(found) for found in bins]
    briers = [brier_score(labels, scores, weights) for scores in (before, after)]
    cases = float(weights[real].sum())
    return Level(
        frames=frames, reals=round(cases), fakes=round(float(weights[fake].sum())),
        fake_from=fake_from, real_up_to=real_up_to, false_alarms=false_alarms,
        false_alarms_high=limit_high(false_alarms, cases, confidence), misses=misses,
        ece=errors[1], ece_before=errors[0], brier=briers[1], brier_before=briers[0], bins=bins[1], bins_before=bins[0],
        points=tuple(operating_point(labels, after, weights, rate, confidence) for rate in RATES),
        curve=curve_of(labels, after, weights),
        novel_from=novel[0], novel_rate=novel[1],
    )  # fmt: skip
