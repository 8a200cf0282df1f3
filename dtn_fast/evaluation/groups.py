"""Metrics by groups of people, such as gender or age: AUC, false alarms, misses, and the gaps between the groups.

Every interval rests on people where the dataset knows them (a fake counts for its target), and else on videos.  Rates
are shares of videos, with Clopper and Pearson's interval for as many cases as there are people; AUCs have the
percentile bootstrap over people.

The gaps of all attributes, in false alarms and in AUC, are tested together by a max-statistic permutation test
(Westfall and Young, 1993): people are permuted among the groups, those with reals, with fakes and with both apart, and
a gap counts as found when its difference, in standard deviations over the permutations, is more than the largest of all
gaps is by chance.  The intervals of the gaps are those of this test: they are simultaneous, and exclude 0 exactly when
the gap is found.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.metrics import auc_interval, evaluate_scores
from dtn_fast.evaluation.plotting import drawing, svg_text
from dtn_fast.evaluation.reliability import rate_interval
from dtn_fast.evaluation.tables import latex_table, markdown_table

Metric = Literal["false alarms", "AUC"]
Estimate = tuple[float, float, float]
"""Value and interval."""
NAMED = 5
"""Maximum number of further gaps that a sentence names."""


class Group(NamedTuple):
    """Metrics of the videos whose people have one value of an attribute."""

    attribute: str
    value: str
    reals: int
    """Number of real videos."""
    fakes: int
    real_people: int
    """Number of people in the real videos; of videos where people are unknown."""
    fake_people: int
    auc: Estimate | None
    """None: too few people."""
    false_alarms: Estimate | None
    """Share of the reals at or over the threshold."""
    misses: Estimate | None
    """Share of the fakes under the threshold."""


class Gap(NamedTuple):
    """Difference between two groups of an attribute."""

    metric: Metric
    attribute: str
    high: str
    """The group with the higher value."""
    low: str
    values: tuple[float, float]
    """Values of the groups ``high`` and ``low``."""
    interval: tuple[float, float]
    """Interval of the difference, corrected for the number of gaps."""
    p: float
    """Chance of a gap as large as this one, in standard deviations, among all gaps when no group differs."""

    @property
    def difference(self) -> float:
        """At least 0."""
        return self.values[0] - self.values[1]

    @property
    def found(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval[0] > 0

    def __str__(self) -> str:
        form = "{:.1%}" if self.metric == "false alarms" else "{:.3f}"
        high, low, gap, least, most = map(form.format, (*self.values, self.difference, *self.interval))
        verdict = "excludes 0" if self.found else "does not exclude 0"
        return (f"{self.attribute}, {self.high} {high} against {self.low} {low}, a difference of {gap}, whose interval "
                f"{least} to {most} {verdict} (p {self.p:.3f})")  # fmt: skip


class GroupTable(NamedTuple):
    """Metrics of every group, and the gaps between them."""

    rows: list[Group]
    gaps: list[Gap]
    """Of each metric the widest first."""
    threshold: float
    notes: list[str]

    def text(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, rates in percent."""
        header = ["attribute", "group", "real", "fake", "AUC", "interval", "false alarms", "interval", "misses",
                  "interval"]  # fmt: skip
        cells = [[row.attribute, row.value, _count(row.reals, row.real_people), _count(row.fakes, row.fake_people),
                  *_estimate(row.auc, 1, 3), *_estimate(row.false_alarms, 100, 1), *_estimate(row.misses, 100, 1)]
                 for row in self.rows]  # fmt: skip
        return header, cells

    def sentences(self) -> list[str]:
        """The widest gap of each metric, the other gaps that were found, and notes."""
        said = []
        for metric in ("false alarms", "AUC"):
            own = [gap for gap in self.gaps if gap.metric == metric]
            if not own:
                said.append(f"No gap in {metric} can be measured: no attribute has two groups that are large enough.")
                continue
            if not own[0].difference:
                said.append(f"No gap in {metric}: no two groups that are large enough differ.")
                continue
            said.append(f"Widest gap in {metric}: {own[0]}.")
            if others := [gap for gap in own[1:] if gap.found]:
                names = "; ".join(f"{gap.attribute}, {gap.high} over {gap.low}" for gap in others[:NAMED])
                rest = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
                said.append(f"Other gaps in {metric} whose interval excludes 0: {names}{rest}.")
        return [*said, *(f"{note[0].upper()}{note[1:]}." for note in self.notes)]

    def to_json(self) -> dict[str, Any]:
        gaps = [{**gap._asdict(), "difference": gap.difference, "found": gap.found} for gap in self.gaps]
        return {"rows": [row._asdict() for row in self.rows], "gaps": gaps, "threshold": self.threshold,
                "notes": self.notes}  # fmt: skip

    def markdown(self) -> str:
        return "\n".join(["**By group; rates in percent**", "", *markdown_table(*self.text()), "",
                          *(f"- {text}" for text in self.sentences()), ""])  # fmt: skip

    def latex(self) -> str:
        """LaTeX tabular (booktabs); the sentences are comments."""
        return latex_table(*self.text(), self.sentences())

    def chart(self, notice: str = "") -> str:
        """SVG chart with a panel for each metric: every group's value with its interval.

        Raises UsageError without matplotlib.
        """
        panels = (("AUC", "auc", 1), ("false alarms, percent", "false_alarms", 100), ("misses, percent", "misses", 100))
        with drawing() as Figure:
            figure = Figure(figsize=(10, 1.5 + 0.3 * len(self.rows)), layout="constrained")
            for panel, (title, name, scale) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
                for place, row in enumerate(self.rows):
                    estimate = getattr(row, name)
                    if estimate is None:
                        panel.annotate("too few", (0.5, place), xycoords=("axes fraction", "data"), fontsize=7,
                                       color="0.5", ha="center", va="center")  # fmt: skip
                        continue
                    value, low, high = (scale * part for part in estimate)
                    panel.plot([low, high], [place] * 2, color="#0072b2", linewidth=1.5)
                    panel.plot(value, place, "o", color="#0072b2", markersize=5)
                for place in range(1, len(self.rows)):
                    if self.rows[place].attribute != self.rows[place - 1].attribute:
                        panel.axhline(place - 0.5, color="0.7", linewidth=0.8)
                panel.set_title(title, fontsize=10)
                panel.grid(alpha=0.3)
                panel.set_yticks(range(len(self.rows)), [f"{r.attribute}: {r.value}" for r in self.rows], fontsize=8)
                panel.set_ylim(len(self.rows) - 0.5, -0.5)
            words = [f"P(fake) from {self.threshold:.3f} counts as fake; bar: interval of the group", notice]
            figure.supxlabel("\n".join(filter(None, words)), fontsize=9)
            return svg_text(figure)


def measure_groups(
    labels: NDArray[np.int64],
    scores: NDArray[np.float64],
    people: Sequence[str],
    attributes: Mapping[str, Sequence[str]],
    threshold: float,
    config: EvaluateConfig = EvaluateConfig(),
) -> GroupTable:
    """Metrics by group of videos (or pictures) with 0/1 ``labels`` and P(fake) ``scores``, [V] each.

    people: name of each video's person, or of the video.  attributes: name -> value of each video, empty: unknown.
    A metric needs ``config.group_size`` people of its kind in the group.
    """
    alarms = scores >= threshold
    values = {name: np.array(own) for name, own in attributes.items()}
    rows = []
    for name, own in values.items():
        for value in sorted(set(own.tolist()) - {""}, key=_natural):
            member = own == value
            those = [person for person, kept in zip(people, member, strict=True) if kept]
            rows.append(_group(name, value, labels[member], scores[member], alarms[member], those, config))
    gaps = _gaps(rows, labels, scores, alarms, people, values, config)
    notes = [f"P(fake) from {threshold:.3f} counts as fake",
             f"a group needs {config.group_size} people (videos, where people are unknown) of a kind for a metric",
             f"{100 * config.confidence:g} % intervals; those of the {len(gaps)} gaps are simultaneous, by a "
             f"max-statistic permutation test of {config.bootstrap_draws:,} permutations"]  # fmt: skip
    return GroupTable(rows, gaps, threshold, notes)


def _natural(text: str) -> str:
    """Sorting key: numbers by size."""
    return re.sub(r"\d+", lambda number: number[0].zfill(9), text)


def _group(
    attribute: str,
    value: str,
    labels: NDArray[np.int64],
    scores: NDArray[np.float64],
    alarms: NDArray[np.bool_],
    people: list[str],
    config: EvaluateConfig,
) -> Group:
    real = labels == 0
    count = lambda kind: len({person for person, kept in zip(people, kind, strict=True) if kept})
    real_people, fake_people = count(real), count(~real)

    def rate(wrong: NDArray[np.bool_], of: int) -> Estimate | None:
        """Share of the videos that are wrong, and its interval for as many cases as there are people."""
        if of < config.group_size:
            return None
        share = float(wrong.mean())
        return (share, *rate_interval(share, of, config.confidence))

    auc = None
    if min(real_people, fake_people) >= config.group_size:
        between = auc_interval(labels, scores, people, config.bootstrap_draws, config.confidence)
        found = evaluate_scores(labels, scores, 0.5).auc
        assert between is not None
        assert found is not None, "both classes are there"
        auc = (found, *between)
    return Group(attribute, value, int(real.sum()), int((~real).sum()), real_people, fake_people, auc,
                 rate(alarms[real], real_people), rate(~alarms[~real], fake_people))  # fmt: skip


def _gaps(
    rows: list[Group],
    labels: NDArray[np.int64],
    scores: NDArray[np.float64],
    alarms: NDArray[np.bool_],
    people: Sequence[str],
    values: Mapping[str, NDArray],
    config: EvaluateConfig,
) -> list[Gap]:
    """The gaps between all pairs of large enough groups, of each metric the widest first."""
    large = {metric: [place for place, row in enumerate(rows) if getattr(row, part)] for metric, part in _PARTS.items()}
    pairs = [(metric, a, b) for metric, places in large.items() for a, b in itertools.combinations(places, 2)
             if rows[a].attribute == rows[b].attribute]  # fmt: skip
    if not pairs:
        return []
    # who changes groups: a person, or the part of a person's videos whose attributes are alike
    numbers: dict[tuple[str, ...], int] = {}
    unit = np.array([numbers.setdefault(key, len(numbers))
                     for key in zip(people, *(own.tolist() for own in values.values()), strict=True)])  # fmt: skip
    alike = _strata(unit, labels, values)
    first = np.unique(unit, return_index=True)[1]
    member = np.array([values[row.attribute][first] == row.value for row in rows])  # [rows, units]
    _, rank = np.unique(scores, return_inverse=True)
    real = labels == 0

    def differences(order: NDArray[np.int64]) -> NDArray[np.float64]:
        """The differences of all pairs when unit u has the groups of unit ``order[u]``."""
        found = {metric: np.full(len(rows), np.nan) for metric in _PARTS}
        for place, row in enumerate(rows):
            own = member[place][order][unit]
            if row.false_alarms:
                found["false alarms"][place] = alarms[own & real].mean()
            if row.auc:
                found["AUC"][place] = _auc(labels[own], rank[own])
        return np.array([found[metric][a] - found[metric][b] for metric, a, b in pairs])

    rng, drawn = np.random.default_rng(0), []
    for _ in range(config.bootstrap_draws):
        order = np.arange(len(numbers))
        for own in alike:
            order[own] = rng.permutation(own)
        drawn.append(differences(order))
    seen, deviation = differences(np.arange(len(numbers))), np.std(drawn, 0)
    scaled = lambda difference: np.abs(difference) / np.where(deviation > 0, deviation, np.inf)
    largest = np.sort(scaled(np.array(drawn)).max(1))[::-1]
    allowed = int((1 - config.confidence) * (len(drawn) + 1) + 1e-9)  # permutations that a found gap may be under
    reach = largest[allowed - 1] if allowed else np.inf
    gaps = []
    for (metric, a, b), difference, size, spread in zip(pairs, seen, scaled(seen), deviation, strict=True):
        high, low = (rows[a], rows[b]) if difference >= 0 else (rows[b], rows[a])
        middle, above = float(abs(difference)), int((largest >= size).sum())
        width = float(reach * spread) if spread > 0 else np.inf if middle else 0.0  # no permutation changes it
        least = middle - width if above < allowed else min(middle - width, 0.0)  # not above 0 by rounding
        both = getattr(high, _PARTS[metric])[0], getattr(low, _PARTS[metric])[0]
        interval = max(least, -1.0), min(middle + width, 1.0)
        gaps.append(Gap(metric, high.attribute, high.value, low.value, both, interval, (1 + above) / (1 + len(drawn))))
    return sorted(gaps, key=lambda gap: (gap.metric != "false alarms", -gap.difference))


_PARTS: dict[Metric, str] = {"false alarms": "false_alarms", "AUC": "auc"}
"""Metrics that are compared, and their fields of a Group."""


def _strata(
    unit: NDArray[np.int64], labels: NDArray[np.int64], values: Mapping[str, NDArray]
) -> list[NDArray[np.int64]]:
    """The units that may change groups with each other: they have the same kinds of videos and known attributes."""
    kinds = [np.bincount(unit, labels == kind) > 0 for kind in (0, 1)]
    known = [np.bincount(unit, own != "") > 0 for own in values.values()]
    _, stratum = np.unique(np.array([*kinds, *known]), axis=1, return_inverse=True)
    return [np.flatnonzero(stratum.ravel() == number) for number in range(stratum.max() + 1)]


def _auc(labels: NDArray[np.int64], rank: NDArray[np.int64]) -> float:
    """AUC of scores by their ranks, ties counting half."""
    real, fake = (np.bincount(rank, labels == kind) for kind in (0, 1))
    return float((fake * (np.cumsum(real) - real / 2)).sum() / (real.sum() * fake.sum()))


def _count(videos: int, people: int) -> str:
    return f"{videos}" if videos == people else f"{videos} of {people} people"


def _estimate(estimate: Estimate | None, scale: float, digits: int) -> list[str]:
    if estimate is None:
        return ["too few", ""]
    value, low, high = (f"{scale * part:.{digits}f}" for part in estimate)
    return [value, f"{low}-{high}"]
