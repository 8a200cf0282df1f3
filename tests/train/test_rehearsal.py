"""The rehearsal of timm models: what cannot train is refused before the first step, what can is not changed by it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import RECIPE, changed

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.errors import UsageError
from dtn_fast.model.build import TimmDetector, build_detector, load_detector
from dtn_fast.model.config import TimmConfig
from dtn_fast.train.config import Execution
from dtn_fast.train.loop import Epoch, fit
from dtn_fast.train.rehearsal import rehearse
from dtn_fast.train.step import TrainStep

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "accumulate", "cause"),
    [
        (
            "skresnet18",
            8,
            r"64 pixels, 1 at once \(Expected more than 1 value .*raise --batch-size or lower --accumulate",
        ),
        ("fastvit_t8", 1, r"64 pixels, 2 at once \(on a CPU, torch's .*give --no-channels-last"),
        ("efficientformer_l1", 1, r"64 pixels, 2 at once \(.*prepare the crops with --size 224"),
    ],
)
def test_what_cannot_train_is_refused_with_the_remedy(
    name: str, accumulate: int, cause: str, dataset: CropDataset, tmp_path: Path
) -> None:
    model = build_detector(TimmConfig(name, image_size=64, crop=dataset.crop))
    for teacher in (None, copy.deepcopy(model)):
        with pytest.raises(UsageError, match=f"{name}: cannot train on crops of {cause}"):
            next(fit(model, dataset, changed(RECIPE, accumulate=accumulate), tmp_path / "run", teacher))
    assert not (tmp_path / "run").exists()
    if accumulate > 1:
        next(fit(model, dataset, changed(RECIPE, accumulate=4), tmp_path / "run"))  # as the remedy says


class Strided(TimmDetector):
    """A detector that takes no channels_last maps."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images.view(-1)
        return super().forward(images)


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda logits: [logits], r"it gives a list, not logits \[2, 2\]"),
        (lambda logits: logits[:, :, None], r"it gives a tensor \[2, 2, 1\]"),
        (lambda logits: logits * torch.nan, "its logits are not finite"),
        (lambda logits: logits.detach(), "does not require grad"),
        (lambda logits: logits if logits.requires_grad else logits[0], r"it gives a tensor \[2\], not logits \[1, 2\]"),
    ],
)
def test_other_outputs_are_refused(
    spoil: Callable[..., Any], cause: str, dataset: CropDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TimmDetector, "forward", lambda self, images: spoil(self.net(images)))
    model = build_detector(TimmConfig("test_resnet", image_size=64, crop=dataset.crop))
    with pytest.raises(UsageError, match=rf"test_resnet: .*{cause}.*; choose another model"):
        next(fit(model, dataset, RECIPE, tmp_path))


def test_channels_last_is_named_where_it_is_the_cause(dataset: CropDataset, tmp_path: Path) -> None:
    model = Strided(TimmConfig("test_resnet", image_size=64, crop=dataset.crop))
    with pytest.raises(UsageError, match=r"give --no-channels-last"):
        next(fit(model, dataset, RECIPE, tmp_path))
    next(fit(model, dataset, RECIPE, tmp_path, execution=Execution(channels_last=False)))


def test_a_rehearsal_changes_nothing(dataset: CropDataset) -> None:
    model = build_detector(TimmConfig("test_resnet", image_size=64)).train()
    model.net.global_pool = torch.nn.Sequential(model.net.global_pool, torch.nn.Dropout(0.5))  # draws random numbers
    step = TrainStep(model, RECIPE, Execution(), CPU)
    before, random = copy.deepcopy(step.state()), torch.get_rng_state()
    rehearse(step, dataset.get(dataset.select("train")[:2]))
    torch.testing.assert_close(step.state(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert step.model.training
    assert all(p.grad is None for p in step.model.parameters())


def test_tied_weights_are_saved_from_the_first_epoch_on(dataset: CropDataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_detector(TimmConfig("coat_lite_tiny", image_size=64, crop=dataset.crop))
    epochs = [e for e in fit(model, dataset, changed(RECIPE, epochs=1), tmp_path) if isinstance(e, Epoch)]
    assert len(epochs) == 1
    again = load_detector(tmp_path)
    places = [len({t.data_ptr() for t in m.state_dict().values()}) for m in (model, again)]
    assert places[0] == places[1] < len(model.state_dict()), "tied as before"
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
