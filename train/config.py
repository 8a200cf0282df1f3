"""The training recipe: one frozen dataclass whose defaults are the paper's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from dtn_fast.data.config import AugmentName
from dtn_fast.data.synthetic_marker import HELD_OUT, METHODS
from dtn_fast.errors import UsageError
from dtn_fast.model.config import DTNConfig, ModelConfig, TimmConfig, read_config


@dataclass(frozen=True)
class Recipe:
    """How to train.  Defaults are the paper's; *choice* marks what it leaves open."""

    epochs: int = 30
    """Epochs of the initial training and of each generation (*choice*)."""
    batch_size: int = 32
    """Images per update, over all processes and accumulated parts: the same run on any number of GPUs."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after another, where memory is short; BN sees one part at a time."""
    sync_bn: bool = True
    """With several processes, BN statistics over the images of all of them."""
    lr: float = 1e-4
    """Adam's learning rate."""
    weight_decay: float = 1e-4
    lr_step: int = 15
    """Epochs between drops of the learning rate by ten."""
    weights: tuple[float, float, float] = (4.0, 0.4, 0.6)
    """DSD weights of CE, KD and Ct-c (Eq. 7; that they come in this order is a *choice*)."""
    initial_weights: tuple[float, float] = (1.0, 1.0)
    """Weights of CE and Ct-c in the initial training (section 3.1)."""
    center_on: Literal["logits", "features"] = "logits"
    """What Ct-c draws to its centres: the two logits (low-dimensional, the paper's) or a DTN's pooled features."""
    temperature: float = 2.0
    """Temperature of the softened probabilities (soft labels) in the KD loss (*choice*)."""
    delta: float = 1.0
    """Added to the denominator of Ct-c (Eq. 3)."""
    real_repeat: int = 0
    """Repeats of each real crop per epoch, with new augmentation.  The paper uses 4; 0 chooses the number that balances
    the classes."""
    methods: tuple[str, ...] = ()
    """Forgeries to train and select on; none: every one in the data."""
    generations: int = 5
    """Most students to train, one after another."""
    min_generations: int = 0
    """Students to train even when validation AUC does not improve."""
    generation_patience: int = 1
    """Stop after this many students in a row without a better validation AUC than every generation before them."""
    epoch_patience: int = 0
    """Stop a generation after this many epochs in a row without a better validation AUC; 0: never."""
    augment: AugmentName = "forensic"
    """none; light: for small, clean sets; forensic: geometry, light, blur, noise and JPEG."""
    augment_on: Literal["auto", "device", "cpu"] = "auto"
    """device: one batched pipeline where the model is; cpu: albumentations, as the paper; auto: device on a GPU."""
    self_blend: bool = False
    """Leave the data's fakes out and train on self-blended copies of its reals instead (*choice*)."""
    cache_teacher: int = 0
    """Fixed number of augmented views per crop.  The teacher labels each view once and its logits are kept.  0: new
    augmentation in every epoch, nothing kept."""
    ema: float = 0.0
    """Validate and keep a moving average of the weights with this decay, such as 0.999; 0: the weights themselves."""
    max_nonfinite: int = 10
    """Steps with a loss or gradient that is not finite, skipped and recorded, after which a generation gives up."""
    pretrained: bool = False
    """Start a model of timm from its published weights (downloads them)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware computes in it, fp16 with a loss scaler on older GPUs, fp32 on other CPUs."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "batch_size",
            "accumulate",
            "lr_step",
            "temperature",
            "delta",
            "lr",
            "generation_patience",
        ):
            if not 0 < getattr(self, name) < math.inf:  # a NaN is not
                raise UsageError(f"Recipe.{name} is {getattr(self, name)}; it must be positive")
        for name in ("weight_decay", "real_repeat", "generations", "min_generations", "epoch_patience", "cache_teacher",
                     "max_nonfinite"):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"Recipe.{name} is {getattr(self, name)}; it must not be negative")
        for name in ("weights", "initial_weights"):
            if not all(0 <= weight < math.inf for weight in getattr(self, name)):
                raise UsageError(f"Recipe.{name} is {getattr(self, name)}; each must be a number from 0 up")
        if not 0 <= self.ema < 1:
            raise UsageError(f"Recipe.ema is {self.ema}; it must be from 0 to below 1")
        if self.cache_teacher and self.self_blend:
            raise UsageError("--cache-teacher with --self-blend: blends are new in every epoch, nothing can be kept")


Switch = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Execution:
    """How a run is computed: its speed and safety, not what it learns.  A resumed run may change it."""

    channels_last: bool = True
    """Maps with channels innermost, as tensor cores and the kernels read them."""
    compile: Switch = "auto"
    """torch.compile of the model and the losses; auto: on a GPU."""
    cuda_graph: Switch = "auto"
    """The whole step as one CUDA graph; auto: on a GPU, in a single process."""
    norm_kernels: bool = True
    """On a GPU, BN with its ReLU and pool, and the local connection, as this package's kernels."""
    fused_adam: bool = True
    """The update in one pass over the weights."""
    tf32: bool = True
    """TensorFloat-32 where float32 products remain on a GPU."""
    cudnn_benchmark: bool = True
    """Let cuDNN try its convolutions and keep the fastest."""
    fold_teacher: bool = True
    """The frozen teacher with BN and head scales folded into its weights."""
    teacher_stream: bool = True
    """The teacher on a CUDA stream of its own, beside the student's forward pass."""
    resident: bool = False
    """Keep the training crops in the device's memory."""
    save_every: int = 1000
    """Steps between saved states, besides one at each epoch's end; 0: only there."""
    log_every: int = 50
    """Steps whose mean is one line of steps.jsonl."""

    def __post_init__(self) -> None:
        for name, least in (("save_every", 0), ("log_every", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"Execution.{name} is {getattr(self, name)}; it must be at least {least}")

    def compiled(self, device: torch.device) -> bool:
        return self.compile == "on" or (self.compile == "auto" and device.type == "cuda")

    def captured(self, device: torch.device, world: int) -> bool:
        """Whether steps become a CUDA graph.  Raises UsageError when they are asked to and cannot."""
        obstacle = (
            "needs a GPU" if device.type != "cuda"
            else "captures one process's step alone" if world > 1
            else "needs --fused-adam" if not self.fused_adam
            else ""
        )  # fmt: skip
        if self.cuda_graph == "on" and obstacle:
            raise UsageError(f"--cuda-graph on: it {obstacle}; use auto")
        return self.cuda_graph != "off" and not obstacle


class Preset(NamedTuple):
    """A model and how to train it, by name."""

    model: str
    recipe: Recipe


RunPreset = Literal["paper", "tiny", "ffpp-c23", "cross-manipulation", "demo"]
PRESETS: dict[RunPreset, Preset] = {
    "paper": Preset("paper", Recipe()),
    "tiny": Preset("tiny", Recipe()),
    "ffpp-c23": Preset(
        "paper", Recipe(real_repeat=4, methods=("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures"))
    ),
    "cross-manipulation": Preset("paper", Recipe(methods=("Deepfakes",))),
    "demo": Preset(
        "tiny",
        Recipe(
            epochs=3,
            lr=1e-3,
            lr_step=2,
            augment="light",
            methods=tuple(m for m in METHODS if m != HELD_OUT),
            generations=3,
            min_generations=2,
        ),
    ),
}
"""paper, tiny: the model alone, the paper's recipe on every forgery in the data.  ffpp-c23: the paper's training on
FaceForensics++.  cross-manipulation: one forgery alone (choose it by --methods), for testing on each.  demo: what
``dtn-fast demo`` trains."""
DEFAULT_PRESET: RunPreset = "paper"


def choose_model(preset: RunPreset, config: Path | None, timm: str) -> ModelConfig:
    """The model of a JSON file ``config``, a model of timm's registry, or else the preset's.

    Raises UsageError when both are given, or the file is no configuration.
    """
    if timm and config:
        raise UsageError("--timm and --config both name a model; give one")
    base = DTNConfig.preset(PRESETS[preset].model)
    return read_config(config) if config else TimmConfig(timm, base.image_size) if timm else base
