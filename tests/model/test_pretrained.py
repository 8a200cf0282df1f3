"""Published weights from local files: read without executing anything, complete, of the right model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small import RECIPE, changed

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.errors import UsageError
from dtn_fast.model.build import build_detector, publishes_weights
from dtn_fast.model.config import TimmConfig
from dtn_fast.model.pretrained import files_of, weights_of
from dtn_fast.model.timm_compat import import_timm
from dtn_fast.train.distill import train_initial
from dtn_fast.train.run_folder import STATE, start_run

RESNET = TimmConfig("resnet10t", 64)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of classifiers of 1000 classes, of seeds of their own, as timm's hub has them."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("resnet10t", "efficientnet_b0"):
        torch.manual_seed(7)
        state = import_timm().create_model(name).state_dict()
        save_file(state, folder / f"{name}.safetensors")
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, folder / f"{name}.pth")
    return {name: folder / f"{name}.safetensors" for name in ("resnet10t", "efficientnet_b0")}


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_weights_are_those_of_the_file(files: dict[str, Path], ending: str) -> None:
    torch.manual_seed(0)
    path = files["resnet10t"].with_suffix(ending)
    model = build_detector(RESNET, True, {"resnet10t": path}).net
    torch.manual_seed(7)
    theirs = import_timm().create_model("resnet10t").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, theirs[name]) != name.startswith("fc."), name
    assert model.fc.weight.shape[0] == 2


def test_an_efficientvit_begins_with_the_weights_of_its_efficientnet(files: dict[str, Path]) -> None:
    assert weights_of("cross_efficient_vit_mas") == weights_of("efficient_vit_reattention") == "efficientnet_b0"
    assert weights_of("legacy_xception") == "legacy_xception"
    torch.manual_seed(0)
    net = build_detector(TimmConfig("efficient_vit", 64), True, files).net
    theirs = torch.load(files["efficientnet_b0"].with_suffix(".pth"), weights_only=True)["state_dict"]
    for name, value in net.backbone.state_dict().items():
        assert torch.equal(value, theirs[f"module.{name}"])
    told = [publishes_weights(n) for n in ("legacy_xception", "efficient_vit_mas", "cvit", "vit_b16", "no_such_model")]
    assert told == [True, True, False, False, False]
    with pytest.raises(UsageError, match="cvit: no published weights; leave --pretrained out"):
        build_detector(TimmConfig("cvit", 64), True)


class Runs:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def test_other_files_are_refused(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.load(files["resnet10t"].with_suffix(".pth"), weights_only=True)["state_dict"]
    save_file({k: v for k, v in state.items() if "layer4" not in k}, tmp_path / "half.safetensors")
    save_file({**state, "module.conv1.0.weight": torch.ones(3)}, tmp_path / "shape.safetensors")
    save_file({**state, "module.conv1.0.weight": torch.full_like(state["module.conv1.0.weight"], torch.nan)},
              tmp_path / "nan.safetensors")  # fmt: skip
    torch.save(Runs(), tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name, said in (
        ("half.safetensors", r"not weights of resnet10t: it lacks layer4\.0\.conv1\.weight and \d+ more"),
        ("shape.safetensors", "not weights of resnet10t"),
        ("nan.safetensors", r"conv1\.0\.weight is not finite; fetch the file again"),
        ("code.pth", "cannot be read as weights"),
        ("text.pth", "cannot be read as weights"),
        ("none.pth", "no such file"),
        (str(files["efficientnet_b0"]), "not weights of resnet10t"),
    ):
        with pytest.raises(UsageError, match=said) as error:
            build_detector(RESNET, True, {"resnet10t": Path(name)})
        assert f"--pretrained-from resnet10t={name}: " in str(error.value)
    assert not (tmp_path / "executed").exists()
    assert files_of(("a=b", "c=d=e")) == {"a": Path("b"), "c": Path("d=e")}
    for pairs in (("a",), ("=b",), ("a=",), ("a=b", "a=c")):
        with pytest.raises(UsageError, match="NAME=FILE was expected"):
            files_of(pairs)
    with pytest.raises(UsageError, match="--pretrained-from: only with --pretrained"):
        changed(RECIPE, pretrained_from=("a=b",))


def test_a_run_reads_its_file_once(files: dict[str, Path], dataset: CropDataset, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    shutil.copy(files["resnet10t"], own)
    recipe = changed(
        RECIPE, epochs=1, pretrained=True, pretrained_from=(f"resnet10t={own}",), methods=dataset.methods[:1]
    )
    start_run(tmp_path / "run", recipe, RESNET)
    events = train_initial(tmp_path / "run", dataset)
    for _ in events:
        pass
    assert (tmp_path / "run" / "generation-0" / STATE).is_file()
    own.unlink()
    list(train_initial(tmp_path / "run", dataset))
    shutil.rmtree(tmp_path / "run" / "generation-0")
    with pytest.raises(UsageError, match="no such file"):
        list(train_initial(tmp_path / "run", dataset))
