"""One training step: every switch the same step, nothing changed by a step that is not finite."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable

import pytest
import torch
from small import RECIPE, SMALL, changed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dtn_fast import DTN
from dtn_fast.device import PRECISIONS
from dtn_fast.errors import UsageError
from dtn_fast.model.build import TimmDetector
from dtn_fast.model.config import TimmConfig
from dtn_fast.model.detector import Detector
from dtn_fast.model.fold import frozen
from dtn_fast.model.preprocess import normalise
from dtn_fast.model.timm_compat import import_timm
from dtn_fast.train import step as step_module
from dtn_fast.train.config import Execution, Recipe
from dtn_fast.train.losses import dsd_loss, initial_loss
from dtn_fast.train.step import TrainStep, set_backends

CPU = torch.device("cpu")
CONFIG = SMALL.__class__(**{**SMALL.__dict__, "noise_std": 0.0})
"""Without the gate's noise, so that two computations of one step agree."""


def detector(seed: int = 0) -> DTN:
    torch.manual_seed(seed)
    return DTN(CONFIG)


def batch(seed: int = 1, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    crops = torch.randint(0, 256, (size, 64, 64, 3), dtype=torch.uint8, generator=generator)
    return crops, torch.arange(size) % 2


def make(recipe: Recipe = RECIPE, teacher: Detector | None = None, device=CPU, **execution) -> TrainStep:
    step = TrainStep(detector(), recipe, Execution(**execution), device, teacher)
    step.model.train()
    return step


def losses(step: TrainStep, steps: int = 4) -> Tensor:
    device = step.device
    return torch.stack([step(*(t.to(device) for t in batch(n))).values.cpu() for n in range(steps)])


def by_hand(recipe: Recipe, teacher: Detector | None, steps: int = 4) -> tuple[Tensor, DTN, Tensor]:
    """The same steps in the plainest torch."""
    model, centers = detector().train(), nn.Parameter(torch.eye(2))
    optimizer = torch.optim.Adam([
        {"params": model.parameters(), "weight_decay": recipe.weight_decay},
        {"params": [centers], "lr": recipe.center_lr or recipe.lr, "weight_decay": recipe.center_weight_decay},
    ], lr=recipe.lr)  # fmt: skip
    values = []
    for n in range(steps):
        crops, labels = batch(n)
        images = normalise(crops, CONFIG)
        optimizer.zero_grad()
        parts = []
        for x, y in zip(images.chunk(recipe.accumulate), labels.chunk(recipe.accumulate), strict=True):
            logits = model(x)
            points = logits.softmax(1) if recipe.center_on == "probabilities" else logits
            if teacher is None:
                terms = initial_loss(logits, y, centers, recipe.delta, recipe.initial_weights, points)
            else:
                how = (recipe.weights, recipe.temperature, recipe.delta)
                terms = dsd_loss(logits, y, teacher.eval()(x), centers, *how, points)
            (terms["loss"] / recipe.accumulate).backward()
            parts.append(terms["loss"].detach())
        optimizer.step()
        values.append(torch.stack(parts).mean())
    return torch.stack(values), model, centers


@pytest.mark.parametrize("dsd", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_is_what_its_formula_says(dsd: bool, accumulate: int) -> None:
    own = {"weights": (1.0, 2.0, 0.5), "temperature": 3.0, "delta": 0.5, "weight_decay": 0.1}
    own |= {"center_lr": 0.05, "center_weight_decay": 0.02, "center_on": "probabilities" if dsd else "logits"}
    recipe, teacher = changed(RECIPE, accumulate=accumulate, **own), detector(9) if dsd else None
    step = make(recipe, teacher)
    got = losses(step)
    expected, model, centers = by_hand(recipe, copy.deepcopy(teacher) if teacher else None)
    torch.testing.assert_close(step.centers, centers, rtol=1e-3, atol=1e-3)
    assert (step.centers - torch.eye(2)).abs().max() > 0.1, "their own learning rate moves them far"
    torch.testing.assert_close(got[:, 0], expected, rtol=1e-4, atol=1e-4)
    for name, parameter in step.model.named_parameters():
        if parameter.dim() > 1:  # biases before BN have no gradient but rounding, which Adam makes a whole step
            assert (parameter - model.get_parameter(name)).abs().mean() < 0.1 * recipe.lr, name


@pytest.mark.parametrize(
    "off",
    [
        {"channels_last": False},
        {"fused_adam": False},
        {"fold_teacher": False},
        {"compile": "on"},
        {"tf32": False, "cudnn_benchmark": False, "teacher_stream": False},
    ],
    ids=lambda off: next(iter(off)),
)
def test_every_switch_computes_the_same(off: dict) -> None:
    teacher = detector(9).eval()
    expected = losses(make(teacher=copy.deepcopy(teacher)), 3)
    torch.testing.assert_close(losses(make(teacher=copy.deepcopy(teacher), **off), 3), expected, rtol=2e-3, atol=2e-3)


def test_switches_reach_what_they_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda target, **_: compiled.append(target) or target)
    monkeypatch.setattr(step_module, "frozen", lambda model: compiled.append("folded") or frozen(model))
    step = make(teacher=detector(9), fused_adam=False, tf32=False, channels_last=False, fold_teacher=False)
    assert not compiled
    assert not step.optimizer.defaults["fused"]
    assert not torch.backends.cuda.matmul.allow_tf32
    assert step.model.backbone[0].weight.is_contiguous()
    assert step.model.backbone.norm_kernels
    assert step.model.blocks[0].norm_kernels
    step = make(norm_kernels=False)
    assert not step.model.backbone.norm_kernels
    assert not step.model.blocks[0].norm_kernels
    step = make(teacher=detector(9), compile="on")
    assert len(compiled) == 4
    assert step.optimizer.defaults["fused"]
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.benchmark
    assert step.model.backbone[4].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in step.teacher.modules())
    for wrong in ({"cuda_graph": "on"}, {"save_every": -1}, {"log_every": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", ".")):
            make(**wrong)


def test_the_trained_model_and_the_losses_are_one_graph() -> None:
    step = make(teacher=detector(9))
    crops, labels = batch()
    images = normalise(crops, CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch._dynamo.explain(step.model)(images).graph_break_count == 0
    for samples in (None, torch.rand(8)):
        counted = torch._dynamo.explain(step._losses)(torch.randn(8, 2), labels, torch.randn(8, 2), samples)
        assert counted.graph_break_count == 0
        assert counted.graph_count == 1


def plain_batch_norm(x, mean, var, weight, bias, training, momentum, eps) -> Tensor:
    """In place of torch's, which asks for CUDA even where nothing is computed."""
    shape = (1, -1, 1, 1)
    var, mean = torch.var_mean(x.float(), (0, 2, 3)) if training else (var, mean)
    y = (x - mean.view(shape)) * (var.view(shape) + eps).rsqrt() * weight.view(shape) + bias.view(shape)
    return y.to(x.dtype)


@pytest.mark.parametrize(("precision", "training"), [("bf16", True), ("fp16", True), ("fp32", True), ("fp32", False)])
def test_the_model_is_one_graph_on_a_gpu_too(precision: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced with tensors that only claim to be on a GPU, where the model takes the way of its kernels."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: types.SimpleNamespace(major=9, minor=0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.nn.functional.batch_norm", plain_batch_norm)
    set_backends(Execution())
    model, dtype = detector().to(memory_format=torch.channels_last).train(training), PRECISIONS[precision]
    with FakeTensorMode():
        for module in model.modules():
            for kind in (module._parameters, module._buffers):
                for name, t in kind.items():
                    if t is not None:  # without gradients, whose bookkeeping needs a build of torch for CUDA
                        kind[name] = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
        images = torch.empty(4, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)
        with torch.autocast("cuda", dtype, enabled=precision != "fp32"):
            traced = torch._dynamo.explain(model)(images)
    assert (traced.graph_count, traced.graph_break_count) == (1, 0), traced.break_reasons
    operators = [node for node in traced.graphs[0].graph.nodes if "dtn_fast" in str(node.target)]
    assert {"dtn_fast.mas_packed_forward", "dtn_fast.moe_forward"} <= {str(node.target) for node in operators}
    attention = next(node for node in operators if "mas" in str(node.target))
    assert attention.args[0].meta["example_value"].dtype == dtype, "traced in the precision that it names"


def test_images_reach_the_convolutions_without_a_change_of_layout() -> None:
    """Every map of the forward pass is channels_last: a permute would show as another layout."""
    step, seen = make(), []
    for module in step.model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.MaxPool2d):
            module.register_forward_hook(lambda m, i, o: seen.extend([i[0], o]))
    step(*batch())
    assert len(seen) > 20
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(monkeypatch: pytest.MonkeyPatch, fused: bool, where: str) -> None:
    step = make(changed(RECIPE, ema=0.9), fused_adam=fused)
    losses(step, 2)
    before = copy.deepcopy(step.state())
    if where == "loss":
        real = step_module.initial_loss
        monkeypatch.setattr(step_module, "initial_loss", lambda *a: {k: v * torch.inf for k, v in real(*a).items()})
        step._losses = step._stacked_losses
    else:
        step.model.head.weight.register_hook(lambda grad: grad * torch.nan)
    values = step(*batch()).values
    assert not values.isfinite().all()
    assert values[0].isfinite() == (where == "gradient")
    after = step.state()
    for part in ("model", "centers", "ema"):
        torch.testing.assert_close(after[part], before[part], rtol=0, atol=0)
    torch.testing.assert_close(after["optimizer"], before["optimizer"], rtol=0, atol=0)
    monkeypatch.undo()
    if where == "loss":
        assert step(*batch(5)).values.isfinite().all()
        assert not torch.equal(step.state()["model"]["head.weight"], before["model"]["head.weight"])


def test_moving_average() -> None:
    step = make(changed(RECIPE, ema=0.75))
    average = copy.deepcopy(step.model)
    for n in range(3):
        step(*batch(n))
        with torch.no_grad():
            for mean, now in zip(average.parameters(), step.model.parameters(), strict=True):
                mean.mul_(0.75).add_(now, alpha=0.25)
    eval_model = step.eval_model()
    assert eval_model is not step.model
    assert not any(parameter.requires_grad for parameter in eval_model.parameters())  # no graph grows step by step
    for name, parameter in average.named_parameters():
        torch.testing.assert_close(eval_model.get_parameter(name), parameter)
    for name, buffer in step.model.named_buffers():
        assert torch.equal(eval_model.get_buffer(name), buffer), name
    plain = make()
    assert plain.eval_model() is plain.model


def test_half_precision_lowers_its_scale_and_goes_on() -> None:
    step = make(changed(RECIPE, precision="fp16"))
    assert step.names == ("loss", "ce", "center")
    before = step.scaler.get_scale()
    step.model.head.weight.register_hook(lambda grad: grad * torch.inf)
    kept = step.model.head.weight.detach().clone()
    assert step(*batch()).values.isfinite().all()
    assert step.scaler.get_scale() == before / 2
    assert torch.equal(step.model.head.weight, kept)


@pytest.mark.parametrize("fused", [True, False])
def test_the_learning_rate_reaches_the_update(fused: bool) -> None:
    step = make(fused_adam=fused)
    assert step.set_time(0) == RECIPE.lr
    before = step.model.head.weight.detach().clone()
    step(*batch())
    assert (step.model.head.weight - before).abs().max() > 0.5 * RECIPE.lr
    before = step.model.head.weight.detach().clone()
    assert step.set_time(RECIPE.lr_step * 30) == pytest.approx(RECIPE.lr * 1e-30)
    step(*batch())
    assert torch.equal(step.model.head.weight, before)


def test_a_student_warms_up_to_its_share_of_the_learning_rate() -> None:
    recipe = changed(RECIPE, lr_step=2, student_lr=0.5, student_warmup=1.5, center_lr=0.02)
    step = make(recipe, detector(9))
    rates = lambda: [group["lr"] for group in step.optimizer.param_groups]
    expected = {(0, 0): 1 / 6, (0, 3): 4 / 6, (1, 1): 1, (1, 3): 1, (2, 0): 0.1, (40, 0): 1e-20}
    for (epoch, number), share in expected.items():
        assert step.set_time(epoch, number, 4) == pytest.approx(0.5 * share * recipe.lr)
        assert rates() == pytest.approx([0.5 * share * recipe.lr, 0.5 * share * 0.02])
    for group in step.optimizer.param_groups:  # as a captured step holds them
        group["lr"] = torch.tensor(group["lr"])
    held = rates()
    step.set_time(0, 3, 4)
    assert all(a is b for a, b in zip(rates(), held, strict=True))
    assert [float(lr) for lr in held] == pytest.approx([0.5 * 4 / 6 * recipe.lr, 0.5 * 4 / 6 * 0.02])
    first = make(recipe)
    assert first.set_time(0, 0, 4) == recipe.lr, "the teacher's training is the paper's"


def test_centres_start_as_asked() -> None:
    random = [make(changed(RECIPE, center_init="random", seed=seed)).centers for seed in (3, 3, 4)]
    assert torch.equal(random[0], random[1])
    assert not torch.equal(random[0], random[2])
    assert torch.equal(make().centers, torch.eye(2))


def test_centres_are_handed_over_if_they_fit() -> None:
    given = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
    step = TrainStep(detector(), RECIPE, Execution(), CPU, detector(9), given)
    assert torch.equal(step.centers, given)
    step.model.train()
    step(*batch())
    assert not torch.equal(step.centers, given)
    assert given[0, 0] == 3, "the teacher's stay"
    with pytest.raises(UsageError, match=r"features: takes centres \[2, 64\], the teacher's are \[2, 2\].*new"):
        TrainStep(detector(), changed(RECIPE, center_on="features"), Execution(), CPU, detector(9), given)


def test_a_state_of_one_group_is_read() -> None:
    """Earlier versions kept the centres in the group of the weights."""
    step = make(changed(RECIPE, center_weight_decay=RECIPE.weight_decay))
    losses(step, 2)
    state = copy.deepcopy(step.state())
    first, second = state["optimizer"]["param_groups"]
    state["optimizer"]["param_groups"] = [{**first, "params": first["params"] + second["params"]}]
    other = make(step.recipe)
    other.load(state)
    assert torch.equal(losses(other, 2), losses(step, 2))
    assert torch.equal(other.centers, step.centers)


def test_a_state_goes_on_however_it_is_computed() -> None:
    for first, second in ((True, False), (False, True)):
        step = make(fused_adam=first)
        losses(step, 2)
        other = make(fused_adam=second)
        other.load(copy.deepcopy(step.state()))
        group = other.optimizer.param_groups[0]
        assert (group["fused"], group["foreach"]) == ((True, None) if second else (None, True))
        torch.testing.assert_close(losses(other, 2), losses(step, 2), rtol=1e-3, atol=1e-4)


def test_the_loss_scale_is_part_of_the_state() -> None:
    step = make(changed(RECIPE, precision="fp16"))
    handle = step.model.head.weight.register_hook(lambda grad: grad * torch.inf)
    step(*batch())
    handle.remove()
    other = make(changed(RECIPE, precision="fp16"))
    assert other.scaler.get_scale() != step.scaler.get_scale()
    other.load(step.state())
    assert other.scaler.get_scale() == step.scaler.get_scale()


def test_known_soft_labels_replace_the_teacher() -> None:
    teacher = detector(9)
    plain, given = make(teacher=copy.deepcopy(teacher)), make(teacher=copy.deepcopy(teacher))
    outcome = plain(*batch())
    assert outcome.soft is not None
    given.teacher = None  # nobody to ask
    again = given(*batch(), outcome.soft)
    torch.testing.assert_close(again.values, outcome.values)


@pytest.mark.parametrize("name", ["resnet10t", "legacy_xception"])
def test_any_detector_trains(name: str) -> None:
    import_timm()
    torch.manual_seed(0)
    model = TimmDetector(TimmConfig(name, image_size=64))
    step = TrainStep(model, RECIPE, Execution(), CPU, copy.deepcopy(model))
    step.model.train()
    outcome = step(*batch())
    assert outcome.values.isfinite().all()
    assert outcome.soft is not None
    assert outcome.soft.shape == (8, 2)


def test_the_host_waits_for_no_step() -> None:
    """Weights of samples and the warm-up's rates are values on the device: none is read back."""

    class NoWait(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(func)
            return func(*args, **(kwargs or {}))

    step = make(changed(RECIPE, student_warmup=2.0, ema=0.9), detector(9))
    with NoWait():
        with pytest.raises(AssertionError):
            torch.ones(1).item()
        step.set_time(0, 0, 4)
        step(*batch(), None, torch.rand(8))


@pytest.mark.gpu
@pytest.mark.parametrize("dsd", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_captured_step_is_the_eager_step(dsd: bool, precision: str) -> None:
    recipe, device = changed(RECIPE, precision=precision, student_warmup=2.0), torch.device("cuda")
    teacher: Callable[[], DTN | None] = lambda: detector(9) if dsd else None
    eager = make(recipe, teacher(), device, compile="off", cuda_graph="off")
    graph = make(recipe, teacher(), device, compile="off", cuda_graph="on")
    both = make(recipe, teacher(), device, compile="on", cuda_graph="on")

    def warming(step: TrainStep, steps: int = 5, drops: int = 0) -> Tensor:
        """Loss terms of steps whose rate rises, their samples weighted if there is a teacher: five steps, the last two
        replayed, and no norm of the gradient, because rounding of 16 bits grows from step to step, and how fast depends
        on the GPU."""
        values = []
        for n in range(steps):
            step.set_time(recipe.lr_step * drops, n, 8)
            samples = (torch.arange(8) % 3).float().to(device) if dsd else None
            values.append(step(*(t.to(device) for t in batch(n)), None, samples).values.cpu())
        return torch.stack(values)[:, : len(step._terms)]

    expected = warming(eager)
    torch.testing.assert_close(warming(graph), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(warming(both), expected, rtol=5e-2, atol=5e-2)
    assert graph._graphs[True]._replay is not None
    before = graph.model.head.weight.detach().clone()
    # a learning rate of nothing reaches the captured update
    warming(graph, 1, 40)
    torch.testing.assert_close(graph.model.head.weight, before, rtol=0, atol=1e-9)
