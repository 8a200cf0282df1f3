"""The training losses as pure functions (paper Eq. 2-7).  Logits are [B, 2], labels int64 [B]: 0 real, 1 fake."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dtn_fast.data.masks import UNKNOWN


def cross_entropy(logits: Tensor, labels: Tensor, samples: Tensor | None = None) -> Tensor:
    """Cross-entropy with the labels (Eq. 2), a scalar; samples: weight of each sample [B], of mean 1 over the data."""
    if samples is None:
        return F.cross_entropy(logits, labels)
    return (F.cross_entropy(logits, labels, reduction="none") * samples).mean()


def contrastive_center(
    logits: Tensor, labels: Tensor, centers: Tensor, delta: float, samples: Tensor | None = None
) -> Tensor:
    """Low-dimensional contrastive-center loss on the logits (Eq. 3; Qi and Su, 2017), a scalar.

    1/2 * mean_i ||z_i - c_yi||^2 / (sum_{j != yi} ||z_i - c_j||^2 + delta).  logits: [B, D], the logits (D = classes)
    or other points; centers: [classes, D], learnable.
    The mean over the batch in place of the sum keeps the balance with the other losses at any batch size (*choice*).
    samples as in :func:`cross_entropy`.
    """
    distance = (logits[:, None] - centers[None]).square().sum(2)  # [B, classes]
    own = distance.gather(1, labels[:, None]).squeeze(1)
    each = own / (distance.sum(1) - own + delta)
    return 0.5 * (each if samples is None else each * samples).mean()


def distillation(student: Tensor, teacher: Tensor, temperature: float, samples: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of temperature-softened probabilities times T^2, mean over the batch (Eq. 6).

    samples as in :func:`cross_entropy`.
    """
    log_student = (student / temperature).log_softmax(1)
    log_teacher = (teacher / temperature).log_softmax(1)
    if samples is None:
        return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2
    each = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
    return (each * samples).mean() * temperature**2


def known_share(masks: Tensor) -> Tensor:
    """The share of ``masks`` [B, h, w] uint8 that are not UNKNOWN, float32 [1]."""
    return (masks[:, :1, 0] != UNKNOWN).float().mean(0)


def mask_loss(logits: Tensor, masks: Tensor, share: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice (Milletari et al., 2016) of a mask head, as nnU-Net adds them (Isensee et
    al., 2021), a scalar.

    logits: [B, h, w]; masks: [B, h, w] uint8, the forged percentage of each pixel's area; masks that are UNKNOWN count
    in neither term nor mean.  share: :func:`known_share` of the whole batch [1], of which these may be a part.
    """
    known = (masks[:, 0, 0] != UNKNOWN).to(logits.dtype)
    wanted = masks.to(logits.dtype) / 100
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean((1, 2))
    found = logits.sigmoid()
    both, total = (found * wanted).sum((1, 2)), found.sum((1, 2)) + wanted.sum((1, 2))
    dice = 1 - (2 * both + 1) / (total + 1)  # 1: so that a blank mask that is found blank has none
    return ((entropy + dice) * known).mean() / share.squeeze().clamp_min(torch.finfo(share.dtype).tiny)


def initial_loss(
    logits: Tensor,
    labels: Tensor,
    centers: Tensor,
    delta: float,
    weights: tuple[float, float],
    points: Tensor | None = None,
) -> dict[str, Tensor]:
    """Initial training: w0 * CE + w1 * Ct-c (section 3.1).  Returns each term and their sum under ``loss``.

    points [B, D]: input of Ct-c instead of the logits, with centers [classes, D].
    """
    ce = cross_entropy(logits, labels)
    center = contrastive_center(logits if points is None else points, labels, centers, delta)
    return {"loss": weights[0] * ce + weights[1] * center, "ce": ce, "center": center}


def dsd_loss(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    centers: Tensor,
    weights: tuple[float, float, float],
    temperature: float,
    delta: float,
    points: Tensor | None = None,
    samples: Tensor | None = None,
    only_right: bool = False,
) -> dict[str, Tensor]:
    """Deepfake self-distillation (Eq. 7): w0 * CE + w1 * KD + w2 * Ct-c.  Returns each term and the ``loss``.

    The paper gives the weights 4, 0.4, 0.6; assigning them to CE, KD, Ct-c in this order is a *choice*.
    points as in :func:`initial_loss`.  samples: weight of each sample [B] in CE and Ct-c, the terms of its label; KD
    does not get them, as it would repeat the teacher's error (*choice*).  only_right: KD of the samples alone whose
    class the teacher gets right.
    """
    right = (teacher_logits.argmax(1) == labels).float() if only_right else None
    ce = cross_entropy(logits, labels, samples)
    kd = distillation(logits, teacher_logits.detach(), temperature, right)
    center = contrastive_center(logits if points is None else points, labels, centers, delta, samples)
    return {
        "loss": weights[0] * ce + weights[1] * kd + weights[2] * center,
        "ce": ce,
        "kd": kd,
        "center": center,
    }


def initial_centers(classes: int, width: int, kind: str, seed: int) -> Tensor:
    """Starting centres [classes, width] by Recipe.center_init: one-hot, or random, the same for a seed."""
    if kind == "one-hot":
        return torch.eye(classes, width)
    return torch.randn(classes, width, generator=torch.Generator().manual_seed(seed))
