"""One training step: forward pass, losses, backward pass and update, and the frozen teacher's forward pass.

The device itself decides whether a step was finite and is kept, so the host never waits for a step.  On a GPU the whole
step is one CUDA graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dtn_fast.cuda_graph import WARM_UP, capture, warm_up
from dtn_fast.device import choose_precision
from dtn_fast.errors import UsageError, tell
from dtn_fast.model.adapt import effort_penalty
from dtn_fast.model.backbone import Backbone
from dtn_fast.model.detector import Detector
from dtn_fast.model.dtn import DTN
from dtn_fast.model.fold import frozen
from dtn_fast.model.levt import LEVTBlock
from dtn_fast.model.mask_head import WithMask
from dtn_fast.model.preprocess import normalise
from dtn_fast.train.config import Execution, Recipe
from dtn_fast.train.distributed import mean, ranks, synchronise_bn
from dtn_fast.train.losses import dsd_loss, initial_centers, initial_loss, known_share, mask_loss


class Outcome(NamedTuple):
    values: Tensor
    """Loss terms and the gradient's norm over all processes, float32 vector; ``TrainStep.names`` names its elements."""
    soft: Tensor | None
    """The teacher's logits [B, classes]; None without a teacher."""


class TrainStep:
    """Trains ``model`` one batch at a time; with a ``teacher`` by DSD (Eq. 7), else by CE + Ct-c.

    A step whose loss or gradient is not finite changes nothing: neither weights, nor their average, nor Adam's moments,
    nor BN statistics.  (In fp16 a gradient that overflows its loss scale leaves only weights and moments unchanged.)
    centers: Ct-c centres [classes, D] to start with; None: new ones.  Raises UsageError when ``execution`` requests
    something that this machine or ``recipe`` does not allow, or the centres are of another width.
    """

    def __init__(
        self,
        model: Detector,
        recipe: Recipe,
        execution: Execution,
        device: torch.device,
        teacher: Detector | None = None,
        centers: Tensor | None = None,
    ) -> None:
        set_backends(execution)
        here, cuda = ranks(), device.type == "cuda"
        self.recipe, self.device, self.config = recipe, device, model.config
        self.channels_last, self.fused = execution.channels_last, execution.fused_adam
        self.dtype = choose_precision(recipe.precision, device)
        for module in model.modules():
            if isinstance(module, Backbone | LEVTBlock):
                module.norm_kernels = execution.norm_kernels
            if isinstance(module, Backbone):
                module.pad_input = execution.pad_input
        if execution.grad_checkpointing:
            model.set_grad_checkpointing()
        self.model = self._place(model)
        if here.world > 1 and recipe.sync_bn:
            self.model = synchronise_bn(self.model, device)  # type: ignore[assignment]
        if centers is None:
            centers = initial_centers(*center_shape(model, recipe), recipe.center_init, recipe.seed)
        check_centers(centers, model, recipe)
        masked = trains_masks(model, recipe)
        self.centers = nn.Parameter(centers.to(device, copy=True))
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False) if recipe.ema else None
        self.teacher = self._freeze(teacher, execution.fold_teacher) if teacher is not None else None
        names = ("loss", "ce", "kd", "center") if teacher is not None else ("loss", "ce", "center")
        names = (*names, "mask") if masked else names
        if effort_penalty(self.model) is not None:
            names = (*names, "penalty")
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.names: tuple[str, ...] = names if self.scaler.is_enabled() else (*names, "grad_norm")
        self._terms = names

        self.captured = execution.captured(device, here.world)
        self._how: dict[str, Any] = {
            "fused": self.fused or None, "foreach": None if self.fused else True, "capturable": self.captured,
        }  # fmt: skip
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._parameters = [*trained, self.centers]
        self._rates = recipe.lr, recipe.center_lr or recipe.lr
        groups = (trained, recipe.weight_decay), ([self.centers], recipe.center_weight_decay)
        self.optimizer = torch.optim.Adam([
            {"params": chosen, "weight_decay": decay, "lr": torch.tensor(lr, device=device) if self.captured else lr}
            for (chosen, decay), lr in zip(groups, self._rates, strict=True)
        ], **self._how)  # fmt: skip
        self._scale = 1.0
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self._statistics = _Kept([b for m in norms for b in m.buffers(recurse=False)])

        self._stream = torch.cuda.Stream(device) if cuda and self.teacher and execution.teacher_stream else None
        self._graphs: dict[bool, _Graph] = {}
        self._run: nn.Module | Callable[..., Tensor] = (
            WithFeatures(self.model) if recipe.center_on == "features" else self.model
        )
        if masked:
            self._run = WithMask(self._run, self.model)
        self._losses: Callable[..., Tensor] = self._stacked_losses
        self._ask: nn.Module | Callable[..., Tensor] | None = self.teacher
        if here.world > 1:
            self._run = nn.parallel.DistributedDataParallel(self._run, device_ids=[device] if cuda else None)
        if execution.compiled(device):
            self._run, self._losses = torch.compile(self._run), torch.compile(self._losses)
            self._ask = torch.compile(self.teacher) if self.teacher is not None else None

    def __call__(
        self, crops: Tensor, labels: Tensor, soft: Tensor | None = None, samples: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> Outcome:  # fmt: skip
        """Trains on one batch, without waiting for the device.

        crops: [B, S, S, 3] uint8, labels: [B] int64, both on the device.  soft: the teacher's logits [B, classes] if
        they are cached; None: compute them.  samples: weights [B] float32 of the samples in DSD, in every call or none.
        masks: [B, m, m] uint8 as in Batch, of a model whose mask head is trained.
        """
        if not self.captured:
            return self._compute(crops, labels, soft, samples, masks)
        if (kind := soft is None) not in self._graphs:
            self._graphs[kind] = _Graph(self._compute)
        return self._graphs[kind](crops, labels, soft, samples, masks)

    def set_time(self, epoch: int, step: int = 0, steps: int = 1) -> float:
        """Sets the learning rates of step ``step`` of the ``steps`` of an epoch; returns the model's.

        They are divided by ten after every ``lr_step`` epochs; a student's are ``student_lr`` of that, and rise over
        ``student_warmup`` epochs.
        """
        scale = 0.1 ** (epoch // self.recipe.lr_step)
        if self.teacher is not None:
            scale *= self.recipe.student_lr
            if self.recipe.student_warmup:
                scale *= min((epoch + (step + 1) / steps) / self.recipe.student_warmup, 1.0)
        if scale != self._scale:
            self._scale = scale
            self._set_rates()
        return self._rates[0] * scale

    def _set_rates(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * self._scale)  # in place: a captured step reads this tensor
            else:
                group["lr"] = lr * self._scale

    def eval_model(self) -> Detector:
        """The eval model, to validate and save: the moving average of the weights if there is one, else the model."""
        if self.ema is None:
            return self.model
        for mine, theirs in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            mine.copy_(theirs)
        return self.ema

    def state(self) -> dict[str, Any]:
        """Training state: everything that later steps depend on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "centers": self.centers.detach(),
            "ema": self.ema.state_dict() if self.ema is not None else {},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restores a training state made by :meth:`state`; call ``set_time`` afterwards."""
        self.model.load_state_dict(state["model"])
        own = [(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(_with_groups(state["optimizer"]))
        for group, (lr, decay) in zip(self.optimizer.param_groups, own, strict=True):
            # this run's choice of Adam implementation, and its learning rates, which a captured step may read
            group.update(self._how, lr=lr, weight_decay=decay)
        for moments in self.optimizer.state.values():
            moments["step"] = moments["step"].to(self.device if self.fused or self.captured else "cpu")
        self.scaler.load_state_dict(state["scaler"])
        self.centers.data.copy_(state["centers"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def _place(self, model: Detector) -> Detector:
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model  # type: ignore[call-overload]

    def _freeze(self, teacher: Detector, folded: bool) -> Detector:
        """A frozen copy of ``teacher``; if ``folded``, a DTN's weights are cast once, not by autocast in every step."""
        copied = self._place(copy.deepcopy(teacher)).eval().requires_grad_(False)
        if not folded:
            return copied
        copied = self._place(frozen(copied))
        return copied.to(self.dtype) if isinstance(copied, DTN) else copied

    def _compute(
        self, crops: Tensor, labels: Tensor, soft: Tensor | None, samples: Tensor | None, masks: Tensor | None
    ) -> Outcome:
        self.optimizer.zero_grad(set_to_none=True)
        images = normalise(crops, self.config, self.device)
        if not self.channels_last:
            images = images.contiguous()
        teaching = self.teacher is not None and soft is None
        if teaching:
            soft = self._teach(images)
        self._statistics.keep()
        parts = self.recipe.accumulate
        split = [[None] * parts if t is None else t.chunk(parts) for t in (images, labels, soft, samples, masks)]
        share = None if masks is None else mean(known_share(masks))
        total = torch.zeros(len(self._terms), device=self.device)
        for number, (x, y, s, w, m) in enumerate(zip(*split, strict=True)):
            alone = ranks().world > 1 and number < parts - 1  # gradients are summed over processes once, at the end
            with self._run.no_sync() if alone else nullcontext():  # type: ignore[union-attr, operator]
                with self._autocast():
                    logits, mask = (self._run(x), None) if m is None else self._run(x)
                if teaching and self._stream is not None:
                    torch.cuda.current_stream(self.device).wait_stream(self._stream)
                terms = self._losses(logits.float(), y, s, w, effort_penalty(self.model), mask, m, share)
                self.scaler.scale(terms[0] / parts).backward()
            total += terms.detach() / parts
        assert self.centers.grad is not None
        mean(self.centers.grad)
        values = mean(total)
        if self.scaler.is_enabled():
            healthy = values[0].isfinite()
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
            values = torch.cat((values, norm[None]))
            healthy = (values[0] + norm).isfinite()
        self._update(healthy)
        self._statistics.restore_unless(healthy)
        if self.ema is not None:
            self._average(self.ema, healthy)
        return Outcome(values, soft)

    @torch.no_grad()
    def _average(self, ema: Detector, healthy: Tensor) -> None:
        """Moves the average of the trained weights towards the weights."""
        pairs = zip(self.model.parameters(), ema.parameters(), strict=True)
        weights, averages = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        moves = list(torch._foreach_sub(weights, averages))
        torch._foreach_mul_(moves, healthy * (1 - self.recipe.ema))
        torch._foreach_add_(averages, moves)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _teach(self, images: Tensor) -> Tensor:
        assert self.teacher is not None
        if self._stream is None:
            return self._answers(images)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            soft = self._answers(images)
        soft.record_stream(torch.cuda.current_stream(self.device))
        images.record_stream(self._stream)
        return soft

    def _answers(self, images: Tensor) -> Tensor:
        assert self.teacher is not None
        assert self._ask is not None
        cast = next(self.teacher.parameters()).dtype
        with torch.no_grad(), self._autocast() if cast == torch.float32 else nullcontext():
            return self._ask(images.to(cast)).float()

    def _stacked_losses(
        self, given: Tensor, labels: Tensor, soft: Tensor | None, samples: Tensor | None,
        penalty: Tensor | None = None, mask: Tensor | None = None, masks: Tensor | None = None,
        share: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss terms, stacked; mask: the mask head's logits [B, m, m], if it is trained on ``masks`` [B, m, m], of
        which the ``share`` [1] is known in the whole batch."""
        r, classes = self.recipe, self.config.num_classes
        logits, points = given[:, :classes], given[:, classes:] if given.shape[1] > classes else None
        if r.center_on == "probabilities":
            points = logits.softmax(1)
        if soft is None:
            losses = initial_loss(logits, labels, self.centers, r.delta, r.initial_weights, points)
        else:
            only_right = r.kd_on == "right"
            losses = dsd_loss(
                logits, labels, soft, self.centers, r.weights, r.temperature, r.delta, points, samples, only_right
            )
        if mask is not None and masks is not None and share is not None:
            losses["mask"] = mask_loss(mask.float(), masks, share)
            losses["loss"] = losses["loss"] + r.mask_weight * losses["mask"]
        if penalty is not None:
            losses |= {"loss": losses["loss"] + r.penalty * penalty, "penalty": penalty}
        return torch.stack([losses[name] for name in self._terms])

    def _update(self, healthy: Tensor) -> None:
        if self.scaler.is_enabled():  # the scaler itself skips gradients that are not finite, and lowers its scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.fused:
            self.optimizer.found_inf = (~healthy).float()  # type: ignore[attr-defined]  # as GradScaler sets it
            self.optimizer.step()
        elif bool(healthy):
            self.optimizer.step()


def trains_masks(model: Detector, recipe: Recipe) -> bool:
    """Whether ``recipe`` trains the mask head of ``model``; without a weight, a head that is there stays as it is.

    Raises UsageError when it wants a head that the model lacks.
    """
    if recipe.mask_weight and model.mask_head is None:
        raise UsageError(f"--mask-weight {recipe.mask_weight:g}: the model has no mask head; dtn-fast train and "
                         "finetune add one with this option, or leave it out")  # fmt: skip
    if not recipe.mask_weight and model.mask_head is not None:
        tell("the mask head stays as it is, while the model below it changes; train both with --mask-weight 1")
        model.mask_head.requires_grad_(False)
    return recipe.mask_weight > 0


def center_shape(model: Detector, recipe: Recipe) -> tuple[int, int]:
    """Shape [classes, D] of the Ct-c centres.  Raises UsageError when the model has no features for them."""
    classes = model.config.num_classes
    if recipe.center_on != "features":
        return classes, classes
    if not isinstance(model, DTN):
        raise UsageError(f"--center-on features: needs a DTN, not {type(model).__name__}; use --center-on logits")
    return classes, model.num_features


def check_centers(centers: Tensor, model: Detector, recipe: Recipe) -> None:
    """Raises UsageError when a teacher's Ct-c centres are not those that ``recipe`` takes."""
    if (wanted := center_shape(model, recipe)) != centers.shape:
        raise UsageError(
            f"--center-on {recipe.center_on}: takes centres {list(wanted)}, the teacher's are {list(centers.shape)}; "
            "use the teacher's --center-on, or --student-centers new"
        )


def _with_groups(saved: dict[str, Any]) -> dict[str, Any]:
    """Adam's state with a group for the centres; earlier versions had one group for all, the centres last."""
    if len(saved["param_groups"]) > 1:
        return saved
    (group,) = saved["param_groups"]
    *weights, centers = group["params"]
    return {**saved, "param_groups": [{**group, "params": weights}, {**group, "params": [centers]}]}


class WithFeatures(nn.Module):
    """A DTN that returns its logits together with its pooled features: images -> [B, classes + C]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.model.forward_head(self.model.forward_features(images), pre_logits=True)  # type: ignore[operator]
        return torch.cat((self.model.head(pooled), pooled), 1)  # type: ignore[operator]


class _Kept:
    """Buffers that get back their values from before a step if it fails; many small tensors are copied at once."""

    def __init__(self, buffers: list[Tensor]) -> None:
        kinds = {b.dtype for b in buffers}
        self._groups = [_Group([b for b in buffers if b.dtype == kind]) for kind in sorted(kinds, key=str)]

    def keep(self) -> None:
        for group in self._groups:
            torch._foreach_copy_(group.before, group.buffers)

    def restore_unless(self, healthy: Tensor) -> None:
        for group in self._groups:
            torch._foreach_copy_(group.after, group.buffers)
            torch.where(healthy, group.flat[1], group.flat[0], out=group.flat[1])
            torch._foreach_copy_(group.buffers, group.after)


class _Group:
    """Buffers of one dtype, and memory for their values before and after a step."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self.buffers = buffers
        sizes = [b.numel() for b in buffers]
        self.flat = buffers[0].new_empty(2, sum(sizes))
        self.before, self.after = (
            [part.view(b.shape) for part, b in zip(row.split(sizes), buffers, strict=True)] for row in self.flat
        )


class _Graph:
    """A step that is captured as a CUDA graph after ``WARM_UP`` calls, and replayed from then on."""

    def __init__(self, compute: Callable[..., Outcome]) -> None:
        self._compute, self._calls, self._side = compute, 0, torch.cuda.Stream()
        self._replay: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor | None) -> Outcome:
        self._calls += 1
        if self._calls <= WARM_UP:
            return warm_up(lambda: self._compute(*inputs), 1, self._side)
        if self._replay is None:
            self._inputs = [None if x is None else x.clone() for x in inputs]
            self._replay, self._outcome = capture(lambda: self._compute(*self._inputs))
        for own, new in zip(self._inputs, inputs, strict=True):
            if own is not None and new is not None:
                if own.shape != new.shape:
                    raise ValueError(f"a captured step takes shape {tuple(own.shape)}, got {tuple(new.shape)}")
                own.copy_(new)
        self._replay()
        return Outcome(*(None if x is None else x.clone() for x in self._outcome))  # type: ignore[arg-type]


def set_backends(execution: Execution) -> None:
    """Sets TF32 and cuDNN's algorithm search for the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = execution.tf32
    torch.backends.cudnn.allow_tf32 = execution.tf32
    torch.backends.cudnn.benchmark = execution.cudnn_benchmark


def batch_of_rank(recipe: Recipe, world: int) -> int:
    """Images per step of one process.  Raises UsageError when ``batch_size`` cannot be divided evenly."""
    share = world * recipe.accumulate
    if recipe.batch_size % share:
        raise UsageError(
            f"--batch-size {recipe.batch_size} cannot be shared by {world} processes times --accumulate "
            f"{recipe.accumulate}; make it a multiple of {share}"
        )
    return recipe.batch_size // world
