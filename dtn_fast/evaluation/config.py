"""Settings of evaluation, robustness and figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from dtn_fast.data.config import Split
from dtn_fast.data.corrupt import PERTURBATIONS, check
from dtn_fast.data.forgery_families import named_families
from dtn_fast.errors import UsageError
from dtn_fast.model.detector import Depth
from dtn_fast.ranges import Count, Range, Rate, Seed, Share, Workers, check_ranges

FIGURES = (
    "grad-cam", "attention", "scales", "collapse", "collapse-maps", "feature-maps", "t-sne", "soft-labels"
)  # fmt: skip
"""The paper's figures."""
HEAT_SCORES = "heat-scores"
"""Figure of Grad-CAM's scores against the masks."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Split, threshold and confidence intervals of an evaluation."""

    split: Split = "test"
    """Split to measure."""
    threshold: Share = 0.5
    """P(fake) at and above which a face or a video counts as fake: in accuracy, verdicts and spans."""
    bootstrap_draws: Count = 1000
    """Number of bootstrap draws of videos for each confidence interval."""
    confidence: Annotated[float, Range(above=0, below=1)] = 0.95
    """Confidence level of the AUC's intervals."""
    mask_fakes: Count = 400
    """Number of fakes of each forgery on which the masks of a mask head are measured."""
    families: tuple[str, ...] = ()
    """Families of forgeries that the program does not know, such as MyGAN=whole-face,diffusion.  Families are swap,
    reenactment, whole-face, editing, diffusion and other; unknown forgeries are other."""
    groups: Path | None = None
    """CSV file that groups people: a column video (path or file name) or identity (of a fake the target), and a column
    for each attribute, such as gender.  Attributes by the dataset's own lists are used without it."""
    group_threshold: Share | None = None
    """P(fake) from which a group's real counts as a false alarm.  Default: the limit of the model's calibration for
    videos or pictures, or without calibration --threshold."""
    group_size: Count = 10
    """Number of people (or videos, where people are unknown) that a group needs for a metric."""

    def __post_init__(self) -> None:
        check_ranges(self)
        named_families(self.families)


@dataclass(frozen=True)
class CalibrateConfig:
    """Rates that the limits between the verdicts keep."""

    split: Literal["val", "test"] = "val"
    """Split to calibrate on.  With val, the limits are then tried on the test split."""
    false_alarms: Rate = 0.01
    """Share of real inputs that may be called fake, on average.  N real videos can promise 1 / (N + 1) at best."""
    misses: Rate = 0.1
    """Share of fakes, of the forgeries trained on, that may be called real.  What lies between is called uncertain."""
    unlike: Rate = 0.01
    """Share of inputs like the training data that may be called uncertain because they seem unlike it."""
    images: Count = 4096
    """Number of training crops whose features tell what the training data is like."""

    def __post_init__(self) -> None:
        check_ranges(self)


FIGURE5 = (*("uniform_noise" if kind == "gaussian_noise" else kind for kind in PERTURBATIONS), "jpeg")
"""The kinds of corruption in the paper's Figure 5."""


@dataclass(frozen=True)
class RobustnessConfig:
    """Corruptions and levels to measure."""

    kinds: tuple[str, ...] = ()
    """Kinds of corruption.  Default: the paper's (Figure 5), which are DeeperForensics' seven, with uniform instead of
    Gaussian noise (the gate is trained with Gaussian noise), and JPEG.  A kind that the crops of --videos hold is
    measured on these, another one on corrupted crops; of video compression the crops' form is h264_still."""
    levels: Annotated[tuple[int, ...], Range(0, 5)] = (0, 1, 2, 3, 4, 5)
    """Levels from 1 (mild) to 5 (strong); 0 is the untouched crops."""
    split: Split = EvaluateConfig.split
    """Split to measure."""
    seed: Seed = 0
    """Random seed of noise and blocks."""
    workers: Workers = 2
    """Number of threads that corrupt crops."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("kinds", "levels"):
            given = getattr(self, name)
            if (name == "levels" and not given) or len(set(given)) < len(given):
                raise UsageError(f"--{name} {' '.join(map(str, given))}: name at least one, and each once")
        for kind in self.kinds:
            for level in self.levels:
                check(kind, level)


@dataclass(frozen=True)
class FigureConfig:
    """Figures to draw, and the crops to draw them on."""

    kinds: tuple[str, ...] = FIGURES
    """Figures to draw.  heat-scores scores the Grad-CAM of fakes against their masks (pointing game, energy, IoU, AUC)
    and needs crops made with prepare --masks."""
    depths: tuple[Depth, ...] = get_args(Depth)
    """Places of Grad-CAM in a DTN (*choice*: the paper does not name its layer): the backbone's map, the gate's, what
    the last block's attention adds, the head's input.  The gate's shows what MoE changes, the last block's MAS, the
    head's all of it ("to visualize the heatmap produced by different settings", Figure 8b).  Of other models those that
    they have."""
    split: Split = EvaluateConfig.split
    """Split of the crops."""
    count: Count = 400
    """Number of crops of each dataset in the t-SNE figure, and of fakes in heat-scores."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for kind in self.kinds:
            if kind not in (known := (*FIGURES, HEAT_SCORES)):
                raise UsageError(f"unknown figure {kind!r}; there are {', '.join(known)}")
        for depth in self.depths:
            if depth not in get_args(Depth):
                raise UsageError(f"--depths {depth}: unknown; there are {', '.join(get_args(Depth))}")
        if not self.depths or len(set(self.depths)) < len(self.depths):
            raise UsageError(f"--depths {' '.join(self.depths)}: name at least one, and each once")
