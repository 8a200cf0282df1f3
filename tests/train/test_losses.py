"""Each loss against a computation by hand, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from small import RECIPE

from dtn_fast.train import losses

LOGITS = torch.tensor([[1.0, -0.5], [0.2, 0.9], [-1.5, 2.0]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, -1.0], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
CENTERS = torch.tensor([[0.9, 0.1], [-0.2, 1.2]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 0])


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    e = [math.exp(v / temperature) for v in row]
    return [v / sum(e) for v in e]


def by_hand(temperature: float, delta: float) -> tuple[float, float, float]:
    ce = kd = center = 0.0
    for z, t, y in zip(LOGITS.tolist(), TEACHER.tolist(), LABELS.tolist(), strict=True):
        ce -= math.log(softmax(z)[y]) / 3
        p, q = softmax(t, temperature), softmax(z, temperature)
        kd += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 3
        near, far = (sum((a - b) ** 2 for a, b in zip(z, CENTERS[k].tolist(), strict=True)) for k in (y, 1 - y))
        center += 0.5 * near / (far + delta) / 3
    return ce, kd, center


@pytest.mark.parametrize(("temperature", "delta"), [(1.0, 1.0), (2.0, 1.0), (4.0, 0.1)])
def test_terms_and_sums_by_hand(temperature: float, delta: float) -> None:
    ce, kd, center = by_hand(temperature, delta)
    first = losses.initial_loss(LOGITS, LABELS, CENTERS, delta, RECIPE.initial_weights)
    assert first["loss"].item() == pytest.approx(ce + center, rel=1e-12)
    dsd = losses.dsd_loss(LOGITS, LABELS, TEACHER, CENTERS, RECIPE.weights, temperature, delta)
    assert (dsd["ce"].item(), dsd["kd"].item(), dsd["center"].item()) == pytest.approx((ce, kd, center), rel=1e-12)
    assert dsd["loss"].item() == pytest.approx(4 * ce + 0.4 * kd + 0.6 * center, rel=1e-12)


def test_gradients() -> None:
    z, c = LOGITS.clone().requires_grad_(), CENTERS.clone().requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda z: losses.cross_entropy(z, LABELS), (z,))
    assert check(lambda z, c: losses.contrastive_center(z, LABELS, c, 1.0), (z, c))
    assert check(lambda z: losses.distillation(z, TEACHER, 3.0), (z,))
    assert check(lambda z, c: losses.dsd_loss(z, LABELS, TEACHER, c, RECIPE.weights, 2.0, 1.0)["loss"], (z, c))


def test_teacher_gets_no_gradient_and_equal_models_no_kd() -> None:
    t = TEACHER.clone().requires_grad_()
    z = LOGITS.clone().requires_grad_()
    losses.dsd_loss(z, LABELS, t, CENTERS, RECIPE.weights, 2.0, 1.0)["loss"].backward()
    assert t.grad is None
    assert z.grad is not None
    assert losses.distillation(TEACHER, TEACHER, 2.0).item() == pytest.approx(0, abs=1e-15)


def test_three_classes() -> None:
    """With more classes the denominator holds every other centre."""
    z, c = torch.randn(4, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 1])
    expected = sum(
        0.5 * (z[i] - c[y[i]]).square().sum() / (sum((z[i] - c[k]).square().sum() for k in range(3) if k != y[i]) + 1)
        for i in range(4)
    )
    assert losses.contrastive_center(z, y, c, 1.0).item() == pytest.approx(float(expected) / 4)
