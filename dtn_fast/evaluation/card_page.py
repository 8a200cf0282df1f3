"""The model card as a self-contained HTML page: what a model knows, how far its scores and limits can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtn_fast.evaluation.plotting import drawing, svg_text
from dtn_fast.files import write_whole
from dtn_fast.html_page import data_uri, render
from dtn_fast.model.card import CARD_PAGE, Calibration, Card, Level, remarks

STYLE = {"svg.fonttype": "path", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False}  # fmt: skip


def write_card_page(folder: Path, card: Card, notice: str) -> Path:
    """Writes card.html beside card.json; returns its path.  Raises UsageError without jinja2 or matplotlib."""
    levels = []
    if card.calibration is not None:
        named = {"single frames and pictures": card.calibration.frame, "videos": card.calibration.video,
                 "videos, by the temporal head": card.calibration.clip}  # fmt: skip
        levels = [(name, level, *_pictures(level)) for name, level in named.items() if level is not None]
    page = render(
        Path(__file__).with_name("card.html"), {"rate": rate, "interval": interval}, name=str(folder), card=card,
        notice=notice, remarks=remarks(card), levels=levels,
    )  # fmt: skip
    write_whole(folder / CARD_PAGE, page)
    return folder / CARD_PAGE


def calibration_table(made: Calibration) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the limits and of what they promise, as text."""
    header = ["input", "reals + fakes", "fake from", "false alarms", "real up to", "misses", "temperature",
              "calibration error", "fakes found at 1 %", "at 0.1 %"]  # fmt: skip
    rows = []
    for name, level in (("frame, picture", made.frame), ("video", made.video), ("video by clips", made.clip)):
        if level is not None:
            temperature = made.clip_temperature if level is made.clip else made.temperature
            found = ["too few reals to say" if p.threshold is None else interval((p.detected, p.low, p.high))  # type: ignore[arg-type]
                     for p in level.points]  # fmt: skip
            rows.append([
                name, f"{level.reals} + {level.fakes}", f"{level.fake_from:.3f}", rate(level.false_alarms),
                f"{level.real_up_to:.3f}", rate(level.misses), f"{temperature:.3f}",
                f"{level.ece_before:.3f} -> {level.ece:.3f}", *found,
            ])  # fmt: skip
    return header, rows


def measured_table(made: Calibration) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the verdicts on the test split, as text."""
    header = ["input", "reals + fakes", "reals called fake", "fakes called real", "uncertain", "not wrong", "unlike"]
    return header, [
        [row.level, f"{row.reals} + {row.fakes}", interval(row.false_alarms), interval(row.misses),
         interval(row.uncertain), interval(row.covered), rate(row.novel)] for row in made.measured
    ]  # fmt: skip


def rate(share: float | None) -> str:
    """A share in percent, with one digit after the first one that counts."""
    if share is None:
        return ""
    return f"{share:.2%}" if 0 < share < 0.01 else f"{share:.1%}"


def interval(values: tuple[float, float, float] | None) -> str:
    """A share with its interval."""
    return "" if values is None else f"{rate(values[0])} ({rate(values[1])} to {rate(values[2])})"


def _pictures(level: Level) -> tuple[str, str]:
    """Reliability diagram and curve of false alarms against fakes found, as data: URIs."""
    return _drawn(_draw_reliability, level), _drawn(_draw_curve, level)


def _drawn(draw: Any, level: Level) -> str:
    with drawing(STYLE) as Figure:
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        draw(figure.subplots(), level)
        return data_uri("image/svg+xml", svg_text(figure).encode())


def _draw_reliability(axis: Any, level: Level) -> None:
    axis.plot((0, 1), (0, 1), color="0.6", linewidth=1, label="as it should be")
    for bins, style, name in ((level.bins_before, "o--", "before"), (level.bins, "s-", "calibrated")):
        error = level.ece_before if name == "before" else level.ece
        axis.plot(*zip(*((mean, fakes) for mean, fakes, _ in bins), strict=True), style, markersize=4,
                  label=f"{name}: error {error:.3f}")  # fmt: skip
    axis.axvspan(level.real_up_to, level.fake_from, color="#e69f00", alpha=0.15, label="uncertain")
    axis.set(xlabel="P(fake)", ylabel="share of fakes", xlim=(0, 1), ylim=(0, 1))
    axis.legend(fontsize=8)


def _draw_curve(axis: Any, level: Level) -> None:
    lowest = 0.5 / max(level.reals, 1)
    points = sorted({(max(real, lowest), fake) for _, real, fake in level.curve} | {(1.0, 1.0)})
    axis.step(*zip(*points, strict=True), where="post")
    for point in level.points:
        if point.threshold is not None:
            axis.plot(point.false_alarms, point.detected, "o", color="#d55e00")
    axis.axvline(level.false_alarms, color="0.6", linestyle=":", label="in force")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda share, _: f"{share:.12g}")  # without an exponent, which needs math text
    axis.set(xlabel=f"false alarms (of {level.reals} reals)", ylabel="fakes found", ylim=(0, 1.02))
    axis.legend(fontsize=8)
