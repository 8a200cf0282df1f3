"""The training recipe: one frozen dataclass whose defaults are the paper's."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch

from dtn_fast.data.config import AugmentName
from dtn_fast.data.synthetic_marker import HELD_OUT, METHODS
from dtn_fast.errors import UsageError
from dtn_fast.model.build import timm_config
from dtn_fast.model.config import CLIPS, Adaptation, DTNConfig, ModelConfig, TimmConfig, read_config
from dtn_fast.model.pretrained import files_of
from dtn_fast.ranges import Count, Natural, NotNegative, Positive, Range, Seed, check_ranges

GainRule = Literal["interval", "any"]


@dataclass(frozen=True)
class Recipe:
    """The training recipe.  Defaults are the paper's; *choice* marks values that the paper leaves open."""

    epochs: Count = 30
    """Epochs of the initial training and of each generation (*choice*)."""
    batch_size: Annotated[int, Range(1, 65536)] = 32
    """Images per update, over all processes and accumulated parts, so a run is the same on any number of GPUs."""
    accumulate: Count = 1
    """Number of parts that a batch is computed in, one after another, to save memory; BN sees one part at a time."""
    sync_bn: bool = True
    """Compute BN statistics over the images of all processes, not of each process alone."""
    lr: Positive = 1e-4
    """Adam's learning rate."""
    weight_decay: NotNegative = 1e-4
    """Adam's weight decay."""
    lr_step: Count = 15
    """Epochs between divisions of the learning rate by ten."""
    weights: Annotated[tuple[float, float, float], Range(0)] = (4.0, 0.4, 0.6)
    """Weights of CE, KD and Ct-c in the DSD loss (Eq. 7; this order is a *choice*)."""
    initial_weights: Annotated[tuple[float, float], Range(0)] = (1.0, 1.0)
    """Weights of CE and Ct-c in the initial training, "supervised by" both (section 3.1; *choice*: equal)."""
    center_on: Literal["logits", "probabilities", "features"] = "logits"
    """Input of the Ct-c loss.  "We compute the loss using the low-dimensional logits, i.e., the predicted
    probabilities": logits or their softmax (*choice*: the paper names both); features: a DTN's pooled features, as in
    the vanilla Ct-c (Figure 6b)."""
    center_init: Literal["one-hot", "random"] = "one-hot"
    """Ct-c centres at the start: each class's own logit at 1 and the rest 0, or normal random numbers (*choice*)."""
    center_lr: Positive | None = None
    """Adam's learning rate of the Ct-c centres, divided when ``lr`` is (*choice*).  Default: ``lr``."""
    center_weight_decay: NotNegative = 0.0
    """Adam's weight decay of the Ct-c centres (*choice*: decay would draw them together, to the origin)."""
    penalty: NotNegative = 1.0
    """Weight of Effort's losses, which keep what is trained orthogonal to the pretrained weights (--adapt effort)."""
    temperature: Positive = 2.0
    """Temperature of the softened probabilities (soft labels) in the KD loss (*choice*)."""
    kd_on: Literal["all", "right"] = "all"
    """Crops that the KD loss is on.  all: the paper's; right: those whose class the teacher gets right, because "the
    soft label may contain wrong information" (*choice*)."""
    mask_weight: NotNegative = 0.0
    """Weight of the mask loss, binary cross-entropy plus Dice, of a head that maps the forged pixels; above 0, the
    model gets that head.  Needs crops with masks, of dtn-fast prepare, or --self-blend; fakes whose mask is not known
    are skipped.  0: no such head, the paper's model."""
    delta: Positive = 1.0
    """Constant added to the denominator of Ct-c, "a constant to avoid zero denominators" (Eq. 3; *choice*: Qi and Su's
    1)."""
    real_repeat: Natural = 0
    """Repeats of each real crop per epoch, with new augmentation.  The paper uses 4; 0 chooses the number that balances
    the classes."""
    methods: tuple[str, ...] = ()
    """Forgeries to train and validate on.  Default: all in the data."""
    generations: Natural = 5
    """Maximum number of students, trained one after another (*choice*: the paper tried four and chose the third)."""
    min_generations: Natural = 0
    """Minimum number of students, trained even when validation AUC does not improve."""
    generation_patience: Count = 1
    """Stop after this many students in a row without a gain in validation AUC over the best generation before them
    (*choice*: "until no improvements are observed" leaves the number open)."""
    gain: GainRule = "interval"
    """Gain that a student must have to continue the chain and to become the run's best generation.  any: a higher
    validation AUC, the paper's "improvement"; interval: one whose 95 % interval, by bootstrap over the validation
    videos, lies above 0 (*choice*: smaller gains did not show on test data)."""
    student_centers: Literal["teacher", "new"] = "teacher"
    """Ct-c centres that a student starts with: its teacher's, as its weights are, or new ones (*choice*)."""
    student_lr: Annotated[float, Range(above=0, high=1)] = 1.0
    """Learning rate at which each student starts ``lr``'s schedule anew, as a share of ``lr`` (*choice*)."""
    student_warmup: NotNegative = 1.0
    """Epochs, or a part of one, over which a student's learning rate rises linearly from 0 (*choice*: Adam's moments
    are new, so that its first step at the full rate moves every weight by ``lr``, whatever its gradient)."""
    epoch_patience: Natural = 0
    """Stop a generation after this many epochs in a row without a better validation AUC; 0: never (*choice*)."""
    augment: AugmentName = "forensic"
    """Augmentation (*choice*: the paper names only the library, Albumentations).  forensic: geometry, lighting, blur,
    noise and JPEG; light: for small, clean datasets; geometry: flips, shifts, scales and rotations alone, which leave
    every corruption of ``dtn-fast robustness`` unseen."""
    augment_on: Literal["auto", "device", "cpu"] = "auto"
    """Place of augmentation.  device: batched, on the model's device; cpu: albumentations, as in the paper; auto:
    device on a GPU, else cpu."""
    self_blend: bool = False
    """Train on self-blended copies of the real crops instead of the data's fakes (*choice*)."""
    blend_share: Annotated[float, Range(above=0, high=1)] = 1.0
    """Share of the training fakes that --self-blend makes; below 1 the others are the data's own, and validation is on
    the data's own alone."""
    error_weights: Literal["none", "focal", "boosted"] = "none"
    """Weights of a student's samples: "increase the weights of incorrectly predicted samples so that the model can
    iteratively learn more about them" (the paper's limitations).  focal: 1 + (factor - 1) * (the teacher's probability
    of the wrong class)^gamma; boosted: each teacher multiplies the weights of the crops that it gets wrong by the
    factor, over the generations; both with a mean of 1 over balanced classes (*choice*: the paper names no formula)."""
    error_factor: Annotated[float, Range(1, 1000)] = 3.0
    """Factor of ``error_weights`` (*choice*)."""
    focal_gamma: NotNegative = 2.0
    """Exponent gamma of focal weights (*choice*: Lin et al., 2017)."""
    ambiguous: Annotated[float, Range(0, 0.5)] = 0.0
    """Largest distance from 0.5 of the teacher's P(fake) that makes a crop ambiguous; 0: none is.  Ambiguous crops get
    more "rotation, flipping, scaling" in a student's training, "to generate more training instances" (the paper's
    limitations; *choice* of distance and amounts)."""
    ambiguous_draws: Annotated[int, Range(1, 100)] = 2
    """Number of times that an ambiguous crop is drawn where another is drawn once (*choice*)."""
    replay_share: Annotated[float, Range(0, below=1)] = 0.5
    """Share of old crops in each batch of ``dtn-fast finetune --replay``; 0: they are measured alone."""
    cache_teacher: Natural = 0
    """Fixed number of augmented views per crop.  The teacher labels each view once and its logits are kept.  0: new
    augmentation in every epoch, nothing kept."""
    ema: Annotated[float, Range(0, below=1)] = 0.0
    """Decay of a moving average of the weights, such as 0.999; the average is validated and saved.  0: no average."""
    max_nonfinite: Natural = 10
    """Maximum number of steps per generation that are skipped because the loss or gradient is not finite; one more ends
    the run with an error."""
    pretrained: bool = False
    """Start a timm model from its published weights, of timm's hub (downloads them) or of --pretrained-from; in a table
    the models that have such, EfficientViTs with those of their EfficientNet, as they were published."""
    pretrained_from: tuple[str, ...] = ()
    """Local files of published weights in place of timm's hub, each NAME=FILE with a name in timm's registry, such as
    legacy_xception=xception.pth or, for the EfficientViTs, efficientnet_b0=model.safetensors."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format.  auto: bf16 if the hardware supports it, fp16 with a loss scaler on older GPUs, fp32 on other
    CPUs."""
    seed: Seed = 0
    """Random seed of the initial weights, the order of the crops and the augmentation."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.blend_share < 1 and not self.self_blend:
            raise UsageError("--blend-share: only with --self-blend")
        for option in ("--cache-teacher" * bool(self.cache_teacher), "--error-weights" * (self.error_weights != "none"),
                       "--ambiguous" * bool(self.ambiguous)):  # fmt: skip
            if option and self.self_blend:
                raise UsageError(f"{option} with --self-blend: blends are new in every epoch; drop one of the two")
        if self.pretrained_from and not self.pretrained:
            raise UsageError("--pretrained-from: only with --pretrained")
        files_of(self.pretrained_from)

    def described(self, student: Recipe | None = None) -> str:
        """Losses, initial weights and augmentation in words, for tables of models with different recipes.

        student: the recipe of a student of this initial training; None: it is not distilled.
        """
        losses = self._with_mask(_in_words(self.initial_weights, ("CE", self._center)))
        augmentation = self._augmentation
        if student is not None:
            losses += f", then {student._dsd}"
            augmentation = ", then ".join(dict.fromkeys((augmentation, student._augmentation)))
        begin = "published weights" if self.pretrained else "from scratch"
        return f"{losses}; {begin}; augmentation {augmentation}"

    def described_after(self, before: str, verb: str) -> str:
        """The same of a training by DSD, ``verb``, of a model that was trained as ``before`` says."""
        return f"{before or 'a recipe that is not recorded'}; {verb} by {self._dsd}, augmentation {self._augmentation}"

    @property
    def _dsd(self) -> str:
        return self._with_mask(_in_words(self.weights, ("CE", "KD", self._center)))

    def _with_mask(self, losses: str) -> str:
        return losses + " + mask" * (self.mask_weight > 0)

    @property
    def _center(self) -> str:
        return "Ct-c" if self.center_on == "logits" else f"Ct-c on {self.center_on}"

    @property
    def _augmentation(self) -> str:
        return self.augment + (", self-blended fakes" if self.self_blend else "")


def _in_words(weights: tuple[float, ...], names: tuple[str, ...]) -> str:
    return " + ".join(name for name, weight in zip(names, weights, strict=True) if weight)


def for_finetuning(recipe: Recipe) -> Recipe:
    """The recipe by which a model that was trained by ``recipe`` is fine-tuned, unless its options are changed: on all
    forgeries of the new data, for fewer epochs at a lower rate that does not fall, with KD where the teacher is right.
    """
    return replace(
        recipe, epochs=5, lr=recipe.lr / 5, lr_step=5, methods=(), kd_on="right",
        student_lr=1.0, student_warmup=1.0, epoch_patience=0, error_weights="none", ambiguous=0.0, cache_teacher=0,
        self_blend=False, blend_share=1.0, pretrained=False, pretrained_from=(),
    )  # fmt: skip


@dataclass(frozen=True)
class TemporalRecipe:
    """Training of a temporal head on the features of a model that stays as it is."""

    clip: Annotated[int, Range(CLIPS[0], CLIPS[-1])] = 16
    """Number of successive frames of a clip, as the crops were prepared."""
    epochs: Count = Recipe.epochs
    """Epochs; in each, one clip of every track is drawn, tracks of the rarer class several times."""
    batch_size: Count = Recipe.batch_size
    """Clips per update."""
    lr: Positive = 1e-3
    """Learning rate of AdamW at the start; it falls to 0 along a cosine."""
    weight_decay: NotNegative = Recipe.weight_decay
    """AdamW's weight decay."""
    versions: Annotated[int, Range(1, 1000)] = 4
    """Number of versions of each track whose features are computed, once: as it is, and augmented, all frames alike."""
    augment: AugmentName = Recipe.augment
    """Augmentation of all versions but the first."""
    real_repeat: Natural = Recipe.real_repeat
    """Repeats of each real track per epoch; 0 chooses the number that balances the classes."""
    seed: Seed = Recipe.seed
    """Random seed of the head's initial weights, the order of the clips and the augmentation."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class BaselineConfig:
    """Training of the detectors that a table compares the DTN with."""

    baseline_losses: Literal["published", "recipe"] = "published"
    """Initial training of the compared detectors.  published: cross-entropy alone, as their authors train them; recipe:
    by the recipe's losses, CE + Ct-c unless changed."""


CHAIN = ("generations", "min_generations", "generation_patience", "gain")
"""Fields of Recipe that say when the chain of students ends, and which generation is the best."""
STUDENTS = (
    *CHAIN, "weights", "temperature", "student_centers", "student_lr", "student_warmup", "error_weights",
    "error_factor", "focal_gamma", "ambiguous", "ambiguous_draws", "cache_teacher", "kd_on",
)  # fmt: skip
"""Fields of Recipe that the initial training does not depend on."""
INITIAL = ("initial_weights", "pretrained", "pretrained_from")
"""Fields of Recipe that the initial training alone depends on."""
Switch = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Execution:
    """Options of speed and safety that are not part of the recipe.  A resumed run may change them."""

    channels_last: bool = True
    """Store feature maps with channels innermost, the layout that tensor cores and the kernels read."""
    compile: Switch = "auto"
    """Compile the model and the losses with torch.compile; auto: on a GPU."""
    cuda_graph: Switch = "auto"
    """Run the whole step as one CUDA graph; auto: on a GPU, in a single process."""
    norm_kernels: bool = True
    """On a GPU, run BN with ReLU and pooling, and the local connection, in this package's kernels."""
    pad_input: bool = False
    """Pad images to eight channels with zeros for the first convolution, for tensor cores; not measured yet."""
    fused_adam: bool = True
    """Use torch's fused Adam, which updates the weights in one pass."""
    tf32: bool = True
    """Allow TensorFloat-32 in the float32 products that remain on a GPU."""
    cudnn_benchmark: bool = True
    """Let cuDNN time its convolution algorithms and keep the fastest."""
    fold_teacher: bool = True
    """Fold BN, head scales and adaptations of the frozen teacher into its weights."""
    grad_checkpointing: bool = False
    """Compute the layers' insides again in the backward in place of keeping them, for models or batches that do not fit
    into memory: a third more work, same gradients; without CUDA graphs, and compiled only if asked for."""
    teacher_stream: bool = True
    """Run the teacher on its own CUDA stream, in parallel with the student's forward pass."""
    resident: bool = False
    """Keep the training crops in the device's memory."""
    save_every: Natural = 1000
    """Steps between saved training states; 0: save only at the end of each epoch, as is always done."""
    log_every: Count = 50
    """Number of steps averaged into one line of steps.jsonl."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def compiled(self, device: torch.device) -> bool:
        auto = device.type == "cuda" and not self.grad_checkpointing
        return self.compile == "on" or (self.compile == "auto" and auto)

    def captured(self, device: torch.device, world: int) -> bool:
        """Whether to run steps as a CUDA graph.  Raises UsageError when ``cuda_graph`` is on but cannot be used."""
        obstacle = (
            "needs a GPU" if device.type != "cuda"
            else "needs a single process" if world > 1
            else "needs --fused-adam" if not self.fused_adam
            else "needs --no-grad-checkpointing" if self.grad_checkpointing
            else ""
        )  # fmt: skip
        if self.cuda_graph == "on" and obstacle:
            raise UsageError(f"--cuda-graph on: it {obstacle}; use auto")
        return self.cuda_graph != "off" and not obstacle


class Preset(NamedTuple):
    """A model, a preset of DTNConfig or of timm's registry, its training recipe and its adaptation."""

    model: str
    recipe: Recipe
    adaptation: Adaptation = Adaptation()


FFPP = Recipe(
    real_repeat=4,
    methods=("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures"),
    generations=3,
    min_generations=3,
    gain="any",
)
RunPreset = Literal["paper", "tiny", "ffpp-c23", "robustness", "cross-manipulation", "demo", "clip", "dinov2", "dinov3",
                    "eva02", "siglip2"]  # fmt: skip
FOUNDATION: dict[RunPreset, str] = {
    "clip": "vit_large_patch14_clip_224.openai",
    "dinov2": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov3": "vit_large_patch16_dinov3.lvd1689m",
    "eva02": "eva02_large_patch14_224.mim_m38m",
    "siglip2": "vit_large_patch16_siglip_256.v2_webli",
}
"""Pretrained transformers of timm's registry by preset."""
PRESETS: dict[RunPreset, Preset] = {
    "paper": Preset("paper", Recipe()),
    "tiny": Preset("tiny", Recipe()),
    "ffpp-c23": Preset("paper", FFPP),
    "robustness": Preset("paper", replace(FFPP, augment="geometry")),
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
    **{
        name: Preset(timm, Recipe(epochs=10, lr=2e-4, lr_step=5, pretrained=True), Adaptation("effort"))
        for name, timm in FOUNDATION.items()
    },
}
"""Presets by name.  paper, tiny: that model with the paper's recipe, on every forgery in the data.  ffpp-c23: the
paper's training on FaceForensics++, to its student 3 ("so we chose student 3 as our model").  robustness: the same for
Figure 5, which measures "various unseen corruptions", with an augmentation that holds none of them.
cross-manipulation: training on a single forgery (choose it by --methods), to be tested on each forgery.  demo: the
training of ``dtn-fast demo``.  clip, dinov2, dinov3, eva02, siglip2: a pretrained ViT-L, adapted by Effort with its
learning rate (*choice*: epochs), on crops of 256 pixels."""
DEFAULT_PRESET: RunPreset = "paper"


def choose_model(
    preset: RunPreset, config: Path | None, timm: str, adaptation: Adaptation = Adaptation()
) -> ModelConfig:
    """The model configuration in the JSON file ``config``, of the timm model ``timm``, or else of the preset, a timm
    model with ``adaptation``.

    A timm model has its own mean and standard deviation, unless the file states others.  Raises UsageError when both
    ``config`` and ``timm`` are given, the file holds no model configuration, or ``adaptation`` is given for a DTN or
    besides the file's.
    """
    if timm and config:
        raise UsageError("--timm and --config both name a model; give one")
    name = timm or (PRESETS[preset].model if preset in FOUNDATION and not config else "")
    if name:
        size = DTNConfig.image_size if preset in FOUNDATION else DTNConfig.preset(PRESETS[preset].model).image_size
        return replace(timm_config(name, size), adaptation=adaptation)
    made = read_config(config) if config else DTNConfig.preset(PRESETS[preset].model)
    if adaptation != PRESETS[preset].adaptation:
        raise UsageError("--adapt, --rank and --mas: only for a model of timm; name one with --timm, or write them "
                         "into --config's adaptation")  # fmt: skip
    if config and isinstance(made, TimmConfig):
        stated, own = json.loads(config.read_text(encoding="utf-8")), timm_config(made.timm, made.image_size)
        made = replace(made, **{name: getattr(own, name) for name in ("mean", "std") if name not in stated})
    return made
