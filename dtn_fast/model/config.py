"""The detector's configuration: a frozen dataclass with a field for every choice that the paper leaves open."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from dtn_fast.dataclass_json import from_fields
from dtn_fast.errors import UsageError
from dtn_fast.model.card import Card
from dtn_fast.ranges import Range, check_ranges

NOISES = ("gaussian", "blur", "contrast", "compression", "none")
ACTIVATIONS = ("relu", "gelu", "none")
MAX_MARGIN = 10.0
STRIDE = 32  # the backbone halves the resolution five times
MASK_STRIDE = 8
"""Pixels of a crop along the side of a mask head's pixel."""
CLIPS = range(2, 129)
"""Numbers of frames that a clip may have."""


FinderName = Literal["dlib", "yunet", "dlib-cnn"]
Alignment = Literal["none", "landmarks"]


@dataclass(frozen=True)
class CropPolicy:
    """How faces are cut out of frames: stored with crops, checkpoints and exported files, so that detection cuts as
    training did.  The side of the crops in pixels stands beside it, as the model's ``image_size``."""

    finder: FinderName = "dlib"
    """Face finder whose boxes were cut: dlib (the paper's HOG), yunet (OpenCV's FaceDetectorYN) or dlib-cnn."""
    margin: float = 1.3
    """Side of a crop divided by the side of the face's box (*choice*: customary for FaceForensics++)."""
    align: Alignment = "none"
    """landmarks: crops are turned so that the eyes are level; none: upright in the frame."""

    def __post_init__(self) -> None:
        for value, name, known in ((self.finder, "finder", FinderName), (self.align, "align", Alignment)):
            if value not in get_args(known):
                raise UsageError(f"CropPolicy.{name} is {value!r}; it must be {' or '.join(get_args(known))}")
        if not (isinstance(self.margin, int | float) and 0 < self.margin <= MAX_MARGIN):
            raise UsageError(f"CropPolicy.margin is {self.margin!r}; it must be above 0 and at most {MAX_MARGIN}")

    def __str__(self) -> str:
        return f"{self.finder} at margin {self.margin:g}" + (", eyes level" if self.align == "landmarks" else "")


@dataclass(frozen=True)
class TrainedOn:
    """Facts of a model's training that its measurements must state: stored with checkpoints and exported files."""

    forgeries: tuple[str, ...]
    """Forgeries that the model was trained on; empty: unknown."""
    corruptions: tuple[str, ...]
    """Kinds of corruption (:mod:`dtn_fast.data.corrupt`) in the training augmentation or the training videos."""
    recipe: str = ""
    """Losses, initial weights and augmentation in words; empty: unknown."""

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, str):
            raise UsageError(f"TrainedOn.recipe is {self.recipe!r}; it must be a text")
        for name, values in (("forgeries", self.forgeries), ("corruptions", self.corruptions)):
            if not isinstance(values, tuple | list) or not all(isinstance(value, str) for value in values):
                raise UsageError(f"TrainedOn.{name} is {values!r}; it must be a list of names")


@dataclass(frozen=True)
class Adaptation:
    """Changes to a pretrained transformer of timm, and the parameters of it that are trained."""

    adapt: Literal["none", "lora", "effort"] = "none"
    """Parameters of a timm transformer that are trained.  none: all of them; lora: the classifier and products of low
    rank that are added to the attention's weights (Hu et al., 2022); effort: the classifier and the directions of the
    smallest singular values of the attention's weights, kept orthogonal to the others (Yan et al., 2025)."""
    rank: Annotated[int, Range(0, 4096)] = 0
    """Rank of what is trained of each projection of queries, keys, values and heads; 0: 8 for lora, 1 for effort (as
    published)."""
    mas: bool = False
    """Scale each attention head of a timm transformer by a learnable sigmoid (Eq. 20), trained in any case; the answers
    are the same at first."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.adapt not in ("none", "lora", "effort"):
            raise UsageError(f"Adaptation.adapt is {self.adapt!r}; it must be none, lora or effort")
        if not isinstance(self.mas, bool):
            raise UsageError(f"Adaptation.mas is {self.mas!r}; it must be true or false")
        if self.rank and self.adapt == "none":
            raise UsageError("--rank: only with --adapt lora or effort")

    def __str__(self) -> str:
        """The adaptation in words, empty for none."""
        words = {"none": "", "lora": "LoRA", "effort": "Effort"}[self.adapt]
        words += f" of rank {self.rank}" if self.rank else ""
        return " and ".join(filter(None, (words, "MAS" if self.mas else "")))

    def rank_of(self, width: int) -> int:
        """The rank for projections of ``width`` inputs.  Raises ValueError when it is none of such."""
        rank = self.rank or {"lora": 8, "effort": 1}[self.adapt]
        if rank > width:
            raise ValueError(f"rank {rank} is over its width {width}")
        return rank


def _check(config: Any) -> None:
    """Replaces decoded JSON objects by their dataclasses.

    Raises UsageError on a single class, a clip of one frame or of too many, or a mean or standard deviation that is
    none."""
    for name in ("mean", "std"):
        values = getattr(config, name)
        if len(values) != 3 or not all(math.isfinite(v) for v in values) or (name == "std" and min(values) <= 0):
            wanted = "three numbers" + (" above 0" if name == "std" else "")
            raise UsageError(f"{type(config).__name__}.{name} is {values!r}; it must be {wanted}")
    if not isinstance(config.clip, int) or config.clip not in (0, *CLIPS):
        allowed = f"0 or {CLIPS[0]} to {CLIPS[-1]}"
        raise UsageError(f"{type(config).__name__}.clip is {config.clip!r}; it must be {allowed}")
    if config.num_classes < 2:
        raise UsageError(f"{type(config).__name__}.num_classes is {config.num_classes}; it must be >= 2")
    if not isinstance(config.mask_head, bool):
        raise UsageError(f"{type(config).__name__}.mask_head is {config.mask_head!r}; it must be true or false")
    parts = {"crop": CropPolicy, "trained_on": TrainedOn, "card": Card, "adaptation": Adaptation}
    for name in parts.keys() & {field.name for field in dataclasses.fields(config)}:
        kind, value = parts[name], getattr(config, name)
        if isinstance(value, Mapping):
            object.__setattr__(config, name, from_fields(kind, value, name))
        elif not isinstance(value, kind | None) or (kind is Adaptation and value is None):
            null = "" if kind is Adaptation else " or null"
            raise UsageError(f"{type(config).__name__}.{name} is {value!r}; it must be an object{null}")


@dataclass(frozen=True)
class DTNConfig:
    """Architecture of a DTN.  Defaults are the paper's model; *choice* marks values that the paper leaves open."""

    image_size: int = 256
    """Side of the training crops in pixels, a multiple of 32.  Other multiples work too, with the position embedding
    interpolated."""
    backbone: str = "vgg"
    """vgg (the paper's convolutions), or a model of timm whose last map is 1/32 of the input, such as resnet34 or
    efficientnet_b0, projected to C channels by a 1x1 convolution (Figure 6c)."""
    channels: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Width of the five convolution groups; the last is the transformer's width C (*choice*: "we take VGG"; CViT's,
    which reproduces Table 9)."""
    convs: tuple[int, ...] = (3, 3, 3, 4, 4)
    """Convolutions per group, each 3x3 + BN + ReLU; a 2x2 max-pool closes the group (*choice*, as ``channels``)."""
    num_experts: int = 2
    """Number of experts in the MoE gate (Eq. 10); 0: no gate."""
    expert_hidden: int = 128
    """Hidden width M of an expert, "two convolutional layers and a sigmoid function" (Eq. 10): conv C->M, activation,
    conv M->1, sigmoid (*choice*: 128 reproduces Table 9)."""
    expert_activation: str = "relu"
    """Activation between an expert's convolutions: relu, gelu or none (*choice*; relu alone is in the kernels)."""
    expert_kernel: int = 1
    """Kernel size of the experts' convolutions, 1 or 3 (*choice*: 1 reproduces the parameter table)."""
    expert_scales: bool = True
    """Scale each expert by a learnable sigmoid (Eq. 11); False: experts are not scaled."""
    gate: str = "max"
    """max (the paper's gate): the strongest expert at each position (Eq. 11); vanilla: experts weighted by a softmax
    gating network on the pooled map (Jacobs et al., 1991; Table 7; *choice*: the paper does not define its vanilla
    gate)."""
    noise: str = "gaussian"
    """Disturbance of the map before each expert, in training only: gaussian (Eq. 10), blur, contrast, compression or
    none (Figure 6a; *choice*: the paper defines gaussian alone)."""
    noise_std: float = 1.0
    """Standard deviation of the Gaussian noise, in units of the map (*choice*: the map's own, after BN and ReLU, is
    about 0.74; 0.1 left the gate as it was, see ``dtn-fast ablate noise``)."""
    noise_strength: float = 0.1
    """Strength of a disturbance other than Gaussian noise (*choice*)."""
    depth: int = 6
    """Number of transformer blocks L."""
    num_heads: int = 8
    """Number of attention heads per block."""
    partition: str = "after"
    """Place of Eq. 16's partition into heads: after the projections, which are C x C, as in any transformer; or before
    them, so that each head projects its own C / heads channels by Eq. 17-19's "three learnable weight matrices"
    (*choice*: Table 9 adds 3.161 M parameters per block, which ``after`` gives to the digit; ``before`` gives 2.473 M,
    or 2.387 M if the heads shared the matrices)."""
    mlp_ratio: int = 4
    """Hidden width of the block's MLP divided by C (*choice*: 4 reproduces Table 9)."""
    mas: bool = True
    """Scale each head by a learnable sigmoid (Eq. 20); False is plain multi-head attention."""
    mas_init: float = 0.0
    """Initial head and expert scales, before the sigmoid (*choice*)."""
    reattention: bool = False
    """Mix attention maps across heads by a 1x1 convolution and BN (DeepViT; Table 8) in place of MAS."""
    mixer: Literal["attention", "mamba"] = "attention"
    """Mixture of tokens in a block: attention (the paper's), or a state space as in Mamba-2, in both directions (the
    paper's outlook), with MAS on its heads."""
    state_size: int = 64
    """Size of the state of the mixer mamba (*choice*: Mamba-2's)."""
    local_connection: bool = True
    """Depthwise 3x3 + BN after attention (Eq. 23)."""
    drop_rate: float = 0.0
    """Dropout of the pooled features before the classifier, in training (*choice*: the paper has none)."""
    drop_path_rate: float = 0.0
    """Rate at which the last block is left out for a sample in training; it rises linearly from 0 at the first
    (stochastic depth, Huang et al., 2016; *choice*: the paper has none)."""
    num_classes: int = 2
    """Number of logits; logit 0 is real, logit 1 fake."""
    clip: int = 0
    """Number of frames of the clips that the temporal head scores (``dtn-fast temporal`` trains it); 0: no such head, a
    video's score is the mean of its frames'."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """RGB mean subtracted from pixels in [0, 1] (*choice*: ImageNet's)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """RGB standard deviation that divides the result (*choice*: ImageNet's)."""
    mask_head: bool = False
    """Add a head that maps the forged pixels, at 1/8 of the crop's side, beside the logits, which stay the same;
    ``dtn-fast train --mask-weight`` adds and trains it."""
    crop: CropPolicy | None = None
    """How the training crops were cut; None: unknown, because another program cut them."""
    trained_on: TrainedOn | None = None
    """Facts of the training, written by it; None: unknown, or not trained yet."""
    card: Card | None = None
    """Model card; in a checkpoint's folder a file of its own, card.json.  None: trained by an earlier version, or not
    yet."""

    def __post_init__(self) -> None:
        _check(self)
        width = self.channels[-1] if self.channels else 0
        checks = [
            (
                STRIDE <= self.image_size <= 4096 and self.image_size % STRIDE == 0,
                "image_size",
                f"a multiple of {STRIDE} up to 4096",
            ),
            (len(self.channels) == 5 and min(self.channels) > 0, "channels", "five positive widths"),
            (
                len(self.convs) == 5 and 0 < min(self.convs) <= max(self.convs) <= 100,
                "convs",
                "five counts of 1 to 100",
            ),
            (
                self.num_heads > 0 and width % max(self.num_heads, 1) == 0,
                "num_heads",
                f"a divisor of the last width {width}",
            ),
            (0 <= self.num_experts <= 8, "num_experts", "0 to 8"),
            (
                self.expert_hidden > 0 and self.expert_hidden % 16 == 0,
                "expert_hidden",
                "a positive multiple of 16",
            ),
            (self.expert_kernel in (1, 3), "expert_kernel", "1 or 3"),
            (self.noise_std >= 0, "noise_std", ">= 0"),
            (self.noise_strength >= 0, "noise_strength", ">= 0"),
            (0 <= self.drop_rate < 1, "drop_rate", "0 to below 1"),
            (0 <= self.drop_path_rate < 1, "drop_path_rate", "0 to below 1"),
            (self.gate in ("max", "vanilla"), "gate", "max or vanilla"),
            (self.noise in NOISES, "noise", " or ".join(NOISES)),
            (isinstance(self.backbone, str) and bool(self.backbone), "backbone", "vgg or a model of timm"),
            (self.expert_activation in ACTIVATIONS, "expert_activation", " or ".join(ACTIVATIONS)),
            (self.partition in ("after", "before"), "partition", "after or before"),
            (self.gate == "max" or self.expert_kernel == 1, "expert_kernel", "1 with the vanilla gate"),
            (self.expert_activation == "relu" or self.expert_kernel == 1, "expert_kernel", "1 with this activation"),
            (self.noise in ("gaussian", "none") or self.expert_kernel == 1, "expert_kernel", "1 with this noise"),
            (self.mixer in ("attention", "mamba"), "mixer", "attention or mamba"),
            (0 < self.state_size <= 4096, "state_size", "1 to 4096"),
            (self.mixer == "attention" or self.partition == "after", "partition", "after with the mixer mamba"),
            (self.mixer == "attention" or not self.reattention, "reattention", "False with the mixer mamba"),
            (not (self.mas and self.reattention), "reattention", "False with MAS, which it replaces"),
            (0 <= self.depth <= 1000, "depth", "0 to 1000"),
            (self.mlp_ratio > 0, "mlp_ratio", ">= 1"),
        ]
        for good, name, allowed in checks:
            if not good:
                raise UsageError(f"DTNConfig.{name} is {getattr(self, name)!r}; it must be {allowed}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DTNConfig:
        """``paper`` (256x256, 29.9 M parameters) or ``tiny`` (for demos), with fields replaced by ``changes``."""
        if name not in PRESETS:
            raise UsageError(f"unknown preset {name!r}; presets are {', '.join(PRESETS)}")
        return dataclasses.replace(PRESETS[name], **changes)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str, where: str = "config") -> DTNConfig:
        """Inverse of :meth:`to_json`.  Raises UsageError naming ``where`` on bad JSON, unknown or wrong fields."""
        return _parsed(cls, text, where)


PRESETS = {
    "paper": DTNConfig(),
    "tiny": DTNConfig(
        image_size=128,
        channels=(16, 32, 48, 96, 128),
        convs=(1, 2, 2, 2, 2),
        expert_hidden=32,
        depth=2,
        num_heads=4,
        mlp_ratio=2,
    ),
}


@dataclass(frozen=True)
class TimmConfig:
    """Configuration of a detector from timm's registry."""

    timm: str
    """Name in timm's registry, such as legacy_xception or efficientnet_b0."""
    image_size: int = DTNConfig.image_size
    """Side of the crops in pixels."""
    num_classes: int = DTNConfig.num_classes
    """Number of logits; logit 0 is real, logit 1 fake."""
    clip: int = DTNConfig.clip
    """Number of frames of the clips that the temporal head scores; 0: no such head."""
    mean: tuple[float, float, float] = DTNConfig.mean
    """RGB mean subtracted from pixels in [0, 1]; ``dtn-fast train`` takes that of timm's weights of the model."""
    std: tuple[float, float, float] = DTNConfig.std
    """RGB standard deviation that divides the result; ``dtn-fast train`` takes that of timm's weights."""
    adaptation: Adaptation = Adaptation()
    """Changes to the model, and the parameters of it that are trained."""
    mask_head: bool = False
    """Add a head that maps the forged pixels, at 1/8 of the crop's side, beside the logits, which stay the same;
    ``dtn-fast train --mask-weight`` adds and trains it."""
    crop: CropPolicy | None = None
    """How the training crops were cut; None: unknown, because another program cut them."""
    trained_on: TrainedOn | None = None
    """Facts of the training, written by it; None: unknown, or not trained yet."""
    card: Card | None = None
    """Model card; in a checkpoint's folder a file of its own, card.json.  None: trained by an earlier version, or not
    yet."""

    def __post_init__(self) -> None:
        _check(self)
        if not isinstance(self.timm, str):
            raise UsageError(f"TimmConfig.timm is {self.timm!r}; it must be a name in timm's registry")
        if not isinstance(self.image_size, int) or not 16 <= self.image_size <= 4096:
            raise UsageError(f"TimmConfig.image_size is {self.image_size!r}; it must be 16 to 4096")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str, where: str = "config") -> TimmConfig:
        """Inverse of :meth:`to_json`.  Raises UsageError naming ``where``."""
        return _parsed(cls, text, where)


ModelConfig = DTNConfig | TimmConfig


def mask_side(config: ModelConfig) -> int:
    """Side of the masks that a model's mask head gives; 0: it has none."""
    return config.image_size // MASK_STRIDE if config.mask_head else 0


def crop_policy(config: ModelConfig) -> CropPolicy:
    """How faces are cut for a model: as its training crops were, or by the defaults when that is unknown."""
    return config.crop or CropPolicy()


def _parsed(kind: Any, text: str, where: str) -> Any:
    """A configuration from JSON.  Earlier versions stored a margin, for dlib's boxes, in place of the crop policy; the
    usual margin counts as none, because it was also stored when another program had cut the crops.  ``noise_std`` was
    the strength of every disturbance."""
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where}: not a valid {kind.__name__} ({error})") from error
    if isinstance(fields, dict) and "margin" in fields and "crop" not in fields:
        margin = fields.pop("margin")
        fields["crop"] = None if margin == CropPolicy.margin else {"margin": margin}
    if isinstance(fields, dict) and "noise_std" in fields:
        fields.setdefault("noise_strength", fields["noise_std"])
    return from_fields(kind, fields, where)


def parse_config(text: str, where: str) -> ModelConfig:
    """Reads a DTNConfig or TimmConfig from JSON ``text``.  Raises UsageError naming ``where``."""
    try:
        timm = "timm" in json.loads(text)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where}: not a model's configuration ({error})") from error
    return TimmConfig.from_json(text, where) if timm else DTNConfig.from_json(text, where)


def read_config(path: Path) -> ModelConfig:
    """Reads a DTNConfig or TimmConfig from a JSON file.  Raises UsageError naming the file."""
    try:
        return parse_config(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a model's configuration ({error})") from error
