"""Cost of a model beside its accuracy: parameters, those that are trained, multiply-accumulates, images per second."""

from __future__ import annotations

import copy
import dataclasses
import platform
import statistics
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from dtn_fast.evaluation.mac_count import count
from dtn_fast.model.adapt import merged
from dtn_fast.model.config import DTNConfig
from dtn_fast.model.detector import Detector
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.timing import in_turns

BATCH = 16
ROUNDS = 5


@dataclass(frozen=True)
class Cost:
    trained: int
    """Number of parameters that training changes."""
    parameters: int
    """Number of all parameters, an adaptation merged into the weights."""
    gmacs: float
    """Billions of multiply-accumulates per image, products of attention included."""
    images_per_second: float
    """Median rate of scoring batches of 16 crops."""
    where: str
    """Device and number format of the rate."""

    def columns(self) -> dict[str, str]:
        """Titles and texts of a table's columns."""
        return {
            "M trained": f"{self.trained / 1e6:.3f}",
            "M params": f"{self.parameters / 1e6:.3f}",
            "GMAC": f"{self.gmacs:.3f}",
            "images/s": f"{self.images_per_second:.1f}",
        }


def cost_of(model: Detector) -> Cost:
    """Measures ``model`` on its device, as :class:`TorchScorer` runs it there."""
    scorer = TorchScorer(model, BATCH)
    side = model.config.image_size
    crops = np.random.default_rng(0).integers(0, 256, (BATCH, side, side, 3), np.uint8)
    seconds = statistics.median(in_turns({"": lambda: scorer.logits(crops)}, ROUNDS, 2)[""])
    device = scorer.device
    processor = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
    return Cost(
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        sum(p.numel() for p in merged(model).parameters()),
        gmacs_of(model, scorer.folded),
        BATCH / seconds,
        f"{name}, {next(scorer.folded.parameters()).dtype}".replace("torch.", ""),
    )


def gmacs_of(model: Detector, folded: Detector) -> float:
    """Billions of multiply-accumulates of one image: a DTN's as :func:`count` has them, with attention; another's as
    torch counts its products and convolutions."""
    if isinstance(model.config, DTNConfig):
        known = count(dataclasses.replace(model.config, crop=None, trained_on=None, card=None))
        return (known.macs + known.attention_macs) / 1e9
    side, counter = model.config.image_size, FlopCounterMode(display=False)
    shapes = copy.deepcopy(folded).to("meta").float()
    with counter, torch.no_grad():
        shapes(torch.zeros(1, 3, side, side, device="meta"))
    return counter.get_total_flops() / 2e9
