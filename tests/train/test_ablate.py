"""Every ablation by name: its variants can be made, differ as the paper says, train and stand in its table."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import RECIPE, SMALL, changed

from dtn_fast import DTN, DTNConfig
from dtn_fast.data.crop_dataset import CropDataset, ShardFiles
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.mac_count import count
from dtn_fast.evaluation.paper_numbers import TABLE1, TABLE8, TABLE10
from dtn_fast.evaluation.protocols import in_columns
from dtn_fast.evaluation.tables import Cell, ResultTable, TableRow
from dtn_fast.model import backbone, build
from dtn_fast.model.build import build_detector
from dtn_fast.model.config import NOISES, Adaptation, TimmConfig
from dtn_fast.model.moe_gate import MoEGate, disturb
from dtn_fast.train import ablate as ablations
from dtn_fast.train.ablate import Working, ablate, folder_of
from dtn_fast.train.ablation_tables import ABLATIONS, configure, printed_rows, variants_of
from dtn_fast.train.config import FOUNDATION, PRESETS, BaselineConfig, Execution, Recipe
from dtn_fast.train.losses import contrastive_center, initial_loss
from dtn_fast.train.step import TrainStep

QUICK = changed(RECIPE, epochs=1, generations=1, min_generations=0, batch_size=32)


BACKBONES = ("vgg", "resnet34", "resnet50", "efficientnet_b0", "efficientnet_b4")
TINY = DTNConfig.preset("tiny", image_size=64)


def finish(steps: Iterator[Any]) -> ResultTable:
    *_, made = steps
    assert isinstance(made, ResultTable)
    return made


def test_no_two_ablations_share_a_run() -> None:
    folders = [folder_of(Path("x", name), v) for name in ABLATIONS for v in variants_of(name, ("Deepfakes", "y"))]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_variant_can_be_made(name: str) -> None:
    variants = variants_of(name, ("Deepfakes", "FaceSwap"))
    assert len({v.label for v in variants}) == len(variants)
    for variant in variants:
        config, recipe = configure(variant, SMALL, Recipe())
        if isinstance(config, TimmConfig):
            assert config.timm == variant.model["timm"]
        elif config.backbone == "vgg":
            assert DTN(config).eval()(torch.randn(1, 3, 64, 64)).shape == (1, 2)
        assert isinstance(recipe, Recipe)
        assert all(0 < value <= 100 for pair in variant.paper.values() for value in pair if value is not None)


PUBLISHED = {"pretrained": True, "lr": 2e-4}
CHANGES: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "losses": {
        "CE loss": ({}, {"initial_weights": (1.0, 0.0)}),
        "KD + CE loss": ({}, {"initial_weights": (1.0, 0.0), "weights": (4.0, 0.4, 0.0)}),
        "Ct-c + CE loss": ({}, {"initial_weights": (1.0, 1.0)}),
        "DSD loss": ({}, {"initial_weights": (1.0, 1.0), "weights": (4.0, 0.4, 0.6)}),
    },
    "moe": {
        "Vanilla MoE": ({"gate": "vanilla", "depth": 0, "noise": "none", "expert_scales": False}, {}),
        "Ours": ({"gate": "max", "depth": 0, "noise": "gaussian", "expert_scales": True}, {}),
    },
    "local-connection": {
        "DTN w/o LC": ({"local_connection": False}, {}), "DTN w/ LC": ({"local_connection": True}, {}),
    },
    "noise": {
        "Gaussian noise": ({"noise": "gaussian"}, {}), "Gaussian blur": ({"noise": "blur"}, {}),
        "compression": ({"noise": "compression"}, {}), "contrast": ({"noise": "contrast"}, {}),
        "none": ({"noise": "none"}, {}),
        **{f"Gaussian noise of std {std}": ({"noise": "gaussian", "noise_std": float(std)}, {})
           for std in ("0.1", "0.3", "3", "10")},
    },
    "center-dimension": {
        "vanilla Ct-c": ({}, {"center_on": "features"}), "low-dimensional Ct-c": ({}, {"center_on": "logits"}),
    },
    "mas": {
        "Ours": ({"mas": False, "reattention": False, "expert_scales": False}, {}),
        "Ours w/ Re-att": ({"mas": False, "reattention": True, "expert_scales": False}, {}),
        "Ours w/ MAS": ({"mas": True, "reattention": False, "expert_scales": True}, {}),
    },
    "experts": {
        f"n={n}{end}": ({"num_experts": n, "noise": noise}, {})
        for n in range(1, 8) for end, noise in (("", "gaussian"), (" without noise", "none"))
    },
    "depth": {f"L={depth}": ({"depth": depth}, {}) for depth in (4, 5, 6, 7)},
    "backbones": {
        **{f"{n}": ({"backbone": n, "depth": 0, "num_experts": 0, "mas": False}, {}) for n in BACKBONES},
        **{f"{n} + ours": ({"backbone": n, "depth": 6, "num_experts": 2, "mas": True}, {}) for n in BACKBONES},
        **{f"{n} LoRA": ({"timm": t, "adaptation": Adaptation("lora")}, PUBLISHED) for n, t in FOUNDATION.items()},
        **{f"{n} Effort": ({"timm": t, "adaptation": Adaptation("effort")}, PUBLISHED) for n, t in FOUNDATION.items()},
        **{f"{n} Effort + ours": ({"timm": t, "adaptation": Adaptation("effort", 0, True)}, PUBLISHED)
           for n, t in FOUNDATION.items()},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_variants_differ_as_the_paper_says(name: str) -> None:
    found = {v.name: configure(v, DTNConfig(), Recipe()) for v in ABLATIONS[name].variants}
    for variant, (model, recipe) in CHANGES[name].items():
        config, changed_recipe = found.pop(variant)
        assert {k: getattr(config, k) for k in model} == model, variant
        assert {k: getattr(changed_recipe, k) for k in recipe} == recipe, variant
    assert all(isinstance(config, TimmConfig) for config, _ in found.values())  # the transformers compared with


def test_the_control_of_distillation_lacks_the_teacher_alone() -> None:
    dtn, control, *_ = ABLATIONS["generations"].variants
    recipe = Recipe(weights=(3.0, 0.7, 0.2))
    (model, taught), (same, alone) = configure(dtn, SMALL, recipe), configure(control, SMALL, recipe)
    assert model == same
    assert alone == changed(taught, weights=(3.0, 0.0, 0.2))
    assert taught.weights == recipe.weights


def test_the_papers_tables_agree_where_they_repeat_themselves() -> None:
    """A figure typed wrongly would stand alone; the two places where the paper differs from itself are told."""
    printed = lambda name, row: next(v.paper for v in ABLATIONS[name].variants if v.name == row)
    four = lambda row: {c: row[c] for c in ("FF++", "Celeb-DF", "DFDC", "DF-1.0")}
    flat = lambda row: [v for pair in row.values() for v in pair]
    student = flat(TABLE10["DTN"][3])
    full = printed("losses", "DSD loss")
    assert flat(full) == student[:8]
    assert flat(printed("losses", "Ct-c + CE loss")) == flat(TABLE10["DTN"][0])[:8]
    for name, row in (("depth", "L=6"), ("local-connection", "DTN w/ LC"), ("soft-labels", "DTN w/ STG"),
                      ("mas", "Ours w/ MAS")):  # fmt: skip
        assert printed(name, row) == full
    whole = printed("components", "Baseline+LEVT+MoE+MAS")
    assert whole == {c: full[c] for c in whole}
    plain = printed("components", "Baseline+LEVT+MoE")
    assert plain == {c: printed("mas", "Ours")[c] for c in plain}
    assert printed("mas", "EViT") == four(TABLE1["EfficientViT"])
    assert flat(TABLE1["EfficientViT"]) == flat(TABLE10["EViT"][0])
    assert printed("mas", "CViT") == four(TABLE1["CViT"])
    assert {**full, "Celeb-DF": (70.68, 75.32)} == four(TABLE1["DTN"])  # 66.68 in all other tables
    assert {**printed("mas", "CEViT"), "DF-1.0": (62.16, 67.51)} == four(TABLE1["CrossEfficientViT"])  # there 62.61


def test_components_are_the_papers() -> None:
    parts = {v.name: configure(v, SMALL, Recipe())[0] for v in ABLATIONS["components"].variants}
    has = {
        name: (c.depth > 0, c.num_experts > 0, c.num_experts > 0 and c.expert_scales, c.depth > 0 and c.mas)
        for name, c in parts.items() if not isinstance(c, TimmConfig)
    }  # fmt: skip
    assert has == {
        "Baseline": (False, False, False, False),
        "Baseline+LEVT": (True, False, False, False),
        "Baseline+LEVT+MoE": (True, True, False, False),
        "Baseline+LEVT+MoE*": (True, True, True, False),
        "Baseline+LEVT*+MoE": (True, True, False, True),
        "Baseline+LEVT+MoE+MAS": (True, True, True, True),
    }
    paper = {v.name: configure(v, dataclasses.replace(DTN().config), Recipe())[0] for v in ABLATIONS["depth"].variants}
    millions = [round(count(c).layer_parameters / 1e6, 3) for c in paper.values() if not isinstance(c, TimmConfig)]
    assert millions == [23.590, 26.751, 29.912, 33.073]


@pytest.fixture(scope="session")
def few(dataset: CropDataset) -> CropDataset:
    """The first frame of each video."""
    keep = np.flatnonzero([frame == min(dataset.frame[dataset.video == video])
                           for video, frame in zip(dataset.video, dataset.frame, strict=True)])  # fmt: skip
    crops = ShardFiles([dataset.get(keep)], dataset.size)
    return dataclasses.replace(
        dataset, crops=crops, video=dataset.video[keep], frame=dataset.frame[keep], person=dataset.person[keep],
        landmarks=None,
    )  # fmt: skip


SMALL_BASELINES = {
    **{name: {"width": 32, "depth": 1, "heads": 2, "hidden": 32} for name in ("vit_b16", "cvit", "efficient_vit")},
    "cross_efficient_vit": {"small": 32, "large": 32, "depth": 1, "heads": 2, "hidden": 32},
}
SMALL_BACKBONES = {"resnet34": "resnet10t", "resnet50": "resnet14t", "efficientnet_b4": "efficientnet_b0"}


class SmallTimm:
    """timm whose models that the paper compares with are small: training them at full size takes minutes."""

    def __init__(self, timm: Any, full: bool) -> None:
        self._timm, self.full = timm, full

    def __getattr__(self, name: str) -> Any:
        return getattr(self._timm, name)

    def create_model(self, name: str, **how: Any) -> Any:
        if name in FOUNDATION.values():  # of 300 M parameters, whose weights are on timm's hub
            how |= {"pretrained": False, "embed_dim": 48, "depth": 1, "num_heads": 2}
            return self._timm.create_model("eva02_tiny_patch14_224" if "eva" in name else "vit_tiny_patch16_224", **how)
        if self.full:
            return self._timm.create_model(name, **how)
        family = name.removesuffix("_mas").removesuffix("_reattention")
        return self._timm.create_model(SMALL_BACKBONES.get(name, name), **how, **SMALL_BASELINES.get(family, {}))


@pytest.fixture(autouse=True)
def small_baselines(monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    real = build.import_timm
    for module in (build, backbone):
        monkeypatch.setattr(module, "import_timm", lambda: SmallTimm(real(), full))


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_trains_measures_and_resumes(
    name: str, few: CropDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """Every variant of every name, on the synthetic set in miniature; of generations one student each."""
    whole = ABLATIONS[name]
    short = [dataclasses.replace(v, recipe={"generations": 1, "min_generations": 1}) if v.every_generation else v
             for v in whole.variants]  # fmt: skip
    monkeypatch.setitem(ABLATIONS, name, whole._replace(variants=tuple(short)))
    how: dict[str, Any] = {"device": "cpu", "execution": Execution()}
    methods = few.methods[:2] if whole.by_forgery and not full else ()  # a variant is trained for each of them
    steps = lambda: ablate(name, few, {"FF++": few}, tmp_path, TINY, changed(QUICK, methods=methods), (), **how)
    made = finish(steps())
    variants = variants_of(name, methods or few.methods)
    if name == "generations":
        ends = lambda v: ("Teacher", "Round 1" if v.untaught else "Student 1")
        titles = [f"{v.label}-{end}" for v in variants for end in ends(v)]
        assert [(row.name, row.facts["generation"]) for row in made.rows] == list(zip(titles, [0, 1] * 4, strict=True))
        assert made.rows[1].paper["DFD"] == (85.48, 96.34)
    else:
        assert [row.facts["variant"] for row in made.rows] == [v.label for v in variants]
    for row in made.rows:
        assert row.cells["frame"].keys() == ({*few.methods} if ABLATIONS[name].by_forgery else {"FF++"})
        assert all(cell.auc is not None and 0 <= cell.auc <= 1 for cell in row.cells["video"].values())
    rows = [row.name for row in printed_rows(name) if "FF++" in row.cells]
    measured = [row.name for row in made.rows]
    assert [row.name for row in made.paper] == [row for row in rows if row not in measured]
    assert all(row.cells.keys() == {"FF++"} for row in made.paper)
    header, body = made.text("frame")
    printed = variants[0].paper.get("FF++")
    if printed:
        assert f"[{printed.auc:.2f}]" in body[0][2]
    assert ("M params" in header) == (variants[0].size is not None or whole.cost)
    assert (tmp_path / f"{name}-cost.svg").is_file() == whole.cost
    if whole.cost:
        costs = [row.facts["cost"] for row in made.rows]
        assert all(min(cost["trained"], cost["gmacs"], cost["images_per_second"]) > 0 for cost in costs)
        few_trained = [cost["trained"] < cost["parameters"] for cost in costs]
        assert few_trained == ["adapt" in v.model for v in variants]
        assert [row.after["GMAC"][0] for row in made.rows] == [f"{cost['gmacs']:.3f}" for cost in costs]
    assert "synthetic faces" in (tmp_path / f"{name}.md").read_text()
    stored = json.loads((tmp_path / f"{name}.json").read_text())
    assert [TableRow.from_json(row) for row in stored["rows"]] == made.rows
    for row in made.rows:
        distilled = next(v for v in variants if v.label == row.facts["variant"]).distil
        if name != "generations":
            assert row.after["generation"] == (str(row.facts["generation"]), "")
            assert (row.facts["generation"] > 0) == distilled, "a distilled row is a student's"
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    again = finish(steps())
    assert again == made
    assert weights == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}, "trained again"


def test_only_some_variants_and_what_the_table_keeps(few: CropDataset, tmp_path: Path, monkeypatch) -> None:
    measured: list[str] = []
    original = ablations.measure

    def counted(scorer: Any, tests: Any, by_forgery: bool, config: EvaluateConfig, trained: Any) -> Any:
        measured.append(" ".join(tests))
        return original(scorer, tests, by_forgery, config, trained)

    monkeypatch.setattr(ablations, "measure", counted)

    def run(only: tuple[str, ...], tests: tuple[str, ...] = ("FF++",), **fields: Any) -> ResultTable:
        recipe = changed(QUICK, **fields)
        return finish(ablate("soft-labels", few, dict.fromkeys(tests, few), tmp_path, SMALL, recipe, only))

    names = lambda table: [row.name for row in table.rows]
    first = run(("DTN w/ STG",))
    assert names(first) == ["DTN w/ STG"]
    assert [(row.name, row.cells["FF++"]) for row in first.paper] == [("DTN w/o STG", (95.20, 99.17))]
    assert names(run(("DTN w/o STG",))) == ["DTN w/o STG", "DTN w/ STG"]  # in the order of the paper
    assert measured == ["FF++"] * 2  # the first was not measured again
    table = tmp_path / "soft-labels.json"
    earlier = re.sub(r'(of 64, \w{16})-\w{8}"', r'\1"', table.read_text()).replace('"column_notes"', '"policies"')
    assert not re.search(r"\w{16}-\w{8}", earlier)
    table.write_text(earlier)
    run(())
    assert len(measured) == 2
    assert names(run(("DTN w/ STG",), ("FF++", "DFD"))) == ["DTN w/o STG", "DTN w/ STG"]
    assert measured[2:] == ["FF++ DFD"] * 2  # other tests: both again
    with pytest.raises(UsageError, match=r"holds a run with epochs 1 \(now 2\)"):
        run(("DTN w/ STG",), epochs=2)
    shutil.rmtree(tmp_path / "soft-labels" / "DTN_w_o_STG")
    assert names(run(("DTN w/ STG",))) == ["DTN w/ STG"]  # what is gone is not shown
    whole = json.loads((tmp_path / "soft-labels.json").read_text())
    whole["rows"][0]["facts"] = {}
    halved = json.loads((tmp_path / "soft-labels.json").read_text())
    halved["rows"][0]["cells"]["frame"] = {}
    for damage in ("{", '{"rows": [{}]}', json.dumps(whole), json.dumps(halved)):
        (tmp_path / "soft-labels.json").write_text(damage)
        with pytest.raises(UsageError, match=r"soft-labels\.json: damaged .*; delete it"):
            run(())


def test_rows_of_different_recipes_in_one_table_are_marked(few: CropDataset, tmp_path: Path) -> None:
    def run(only: tuple[str, ...], **fields: Any) -> ResultTable:
        recipe = changed(QUICK, **fields)
        return finish(ablate("soft-labels", few, {"FF++": few}, tmp_path, SMALL, recipe, only))

    table = run(("DTN w/o STG",), lr=2e-3, augment="light")
    assert table.rows[0].after["recipe"] == ("CE + Ct-c; from scratch; augmentation light", "")
    assert not any("different recipes" in note for note in table.notes)
    weights = tmp_path / "soft-labels/DTN_w_o_STG/generation-0/model.safetensors"
    before = weights.read_bytes()
    table = run(("DTN w/ STG",))
    assert weights.read_bytes() == before
    assert [row.after["recipe"][0] for row in table.rows] == [
        "CE + Ct-c; from scratch; augmentation light; lr 0.002",
        "CE + Ct-c, then CE + KD + Ct-c; from scratch; augmentation forensic; lr 0.001",
    ]
    assert "the rows were trained by different recipes" in (tmp_path / "soft-labels.md").read_text()
    with pytest.raises(UsageError, match=r"DTN_w_o_STG: holds a run with lr 0\.002 \(now 0\.001\)"):
        run(())


def test_baselines_have_their_own_losses_and_weights() -> None:
    """Cross-entropy alone, as published; weights where there are such."""
    asked = Recipe(pretrained=True, pretrained_from=("legacy_xception=x.pth", "efficientnet_b0=e.pth"))
    rows = {v.name: configure(v, SMALL, asked)[1] for v in ABLATIONS["cross-dataset"].variants}
    told = {name: (r.initial_weights, r.pretrained, r.pretrained_from) for name, r in rows.items()}
    assert told == {
        "CViT": ((1.0, 0.0), False, ()),
        "Xception": ((1.0, 0.0), True, ("legacy_xception=x.pth",)),
        "EfficientViT": ((1.0, 0.0), True, ("efficientnet_b0=e.pth",)),
        "CrossEfficientViT": ((1.0, 0.0), True, ("efficientnet_b0=e.pth",)),
        "DTN": ((1.0, 1.0), False, ()),
    }
    assert rows["Xception"].described() == "CE; published weights; augmentation forensic"
    assert rows["CViT"].described(rows["CViT"]) == "CE, then CE + KD + Ct-c; from scratch; augmentation forensic"
    by_recipe = BaselineConfig("recipe")
    for variant in ABLATIONS["mas"].variants:
        assert configure(variant, SMALL, Recipe(), by_recipe)[1].initial_weights == (1.0, 1.0)
        ours = variant.name.startswith("Ours")
        assert (configure(variant, SMALL, Recipe())[1].initial_weights == (1.0, 1.0)) == ours


def test_variants_that_differ_in_their_students_share_a_teacher(few: CropDataset, tmp_path: Path) -> None:
    steps = ablate("soft-labels", few, {"a": few}, tmp_path, SMALL, QUICK)
    events = [(s.variant, s.event.generation) for s in steps if isinstance(s, Working) and s.event is not None]
    assert set(events) == {("DTN w/o STG", 0), ("DTN w/ STG", 1)}
    one, two = (folder_of(tmp_path / "soft-labels", v) / "generation-0" for v in ABLATIONS["soft-labels"].variants)
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}
    steps = ablate("losses", few, {"a": few}, tmp_path, SMALL, QUICK)
    trained = {s.variant for s in steps if isinstance(s, Working) and s.event and not s.event.generation}
    assert trained == {"CE loss", "Ct-c + CE loss"}, "another initial loss is another teacher"


def test_wrong_names_are_told(few: CropDataset, tmp_path: Path) -> None:
    real = dataclasses.replace(few, videos=[v._replace(label=0, method="") for v in few.videos])
    with pytest.raises(UsageError, match="holds no forgery to train on"):
        finish(ablate("cross-manipulation", real, {"a": few}, tmp_path, SMALL, QUICK))
    for recipe, said in (
        (
            changed(QUICK, pretrained=True, pretrained_from=("cvit=x",)),
            "--pretrained-from cvit: no model of cross-manipulation begins",
        ),
        (changed(QUICK, self_blend=True), "--self-blend: cross-manipulation trains on the data's own"),
    ):
        with pytest.raises(UsageError, match=said):
            finish(ablate("cross-manipulation", few, {"a": few}, tmp_path, SMALL, recipe))
    with pytest.raises(UsageError, match="--pretrained: no model of moe has published weights"):
        finish(ablate("moe", few, {"a": few}, tmp_path, SMALL, changed(QUICK, pretrained=True)))
    for name, tests, only, said in (
        ("x", {}, (), "unknown ablation 'x'; there are cross-dataset"),
        ("moe", {}, ("Nothing",), "--only Nothing: unknown; moe has Vanilla MoE, Ours"),
        ("cross-manipulation", {"a": few, "b": few}, (), "of one dataset; give one folder, not 2"),
    ):
        with pytest.raises(UsageError, match=said):
            finish(ablate(name, few, tests, tmp_path, SMALL, QUICK, only))
    assert not list(tmp_path.iterdir())


def test_the_papers_other_rows_stand_among_ours(tmp_path: Path) -> None:
    """Also those of models that nothing here trains, and sizes and students that were not trained."""
    names = lambda name: [row.name for row in printed_rows(name)]
    assert {"TwoStream", "SBIs", "RECCE", "IID", "IDDDM", "UIA-ViT", "FoCus", "NACO"} < set(names("cross-dataset"))
    assert names("generations")[:6] == ["DTN-Teacher", *(f"DTN-Student {g}" for g in range(1, 5)), "Xception-Teacher"]
    assert len(names("generations")) == 15
    assert names("mas") == list(TABLE8)
    by_forgery = [(row.before["trained on"], row.name) for row in printed_rows("cross-manipulation")]
    assert by_forgery[:7] == [("DF", model) for model in ("Xception", "Face X-ray", "SOLA", "IID", "IDDDM",
                                                          "Guan et al.", "DTN")]  # fmt: skip
    assert len(by_forgery) == 28
    on_dfd = in_columns(printed_rows("cross-dataset"), ("DFD", "mine"))
    assert [row.name for row in on_dfd] == ["CViT", "TwoStream", "SBIs", "EfficientViT", "CrossEfficientViT", "IID",
                                            "UIA-ViT", "Yu et al.", "DTN"]  # fmt: skip
    assert all(row.cells.keys() == {"DFD"} for row in on_dfd)
    cells: dict[Any, Any] = {level: {"FF++": Cell(0.5, 0.5, None)} for level in ("frame", "video")}
    sized = {"M params": ("1.000", "85.620"), "GMAC": ("2.000", "16.879")}
    ours = TableRow("ViT", cells, after=sized, paper=TABLE8["ViT"])
    table = ResultTable("mas", "T", ("FF++",), [ours], paper=in_columns(printed_rows("mas")[1:], ("FF++",)))
    header, body = table.text("frame")
    assert header == ["model", "FF++ ACC", "FF++ AUC", "M params", "GMAC"]
    assert body[1] == ["ViT w/ Re-att (the paper's values)", "62.84", "67.42", "85.623", "16.968"]
    assert len(body) == 15
    assert r"ViT$^{\ast}$ & 62.44 & 67.07 & 85.620 & 16.879 \\" in table.latex("frame")
    assert r"CViT$^{\ast}$ & 90.47 & 96.69 & 88.988 & 6.684 \\" in table.latex("frame")


def test_by_forgery_as_table_2() -> None:
    made = variants_of("cross-manipulation", ("Deepfakes", "Unknown"))
    assert [v.label for v in made] == ["Xception on DF", "Xception on Unknown", "DTN on DF", "DTN on Unknown"]
    assert made[2].recipe == {"methods": ("Deepfakes",), "real_repeat": 0}
    _, alone = configure(made[2], SMALL, PRESETS["ffpp-c23"].recipe)
    assert alone.real_repeat == PRESETS["cross-manipulation"].recipe.real_repeat
    assert made[2].paper["FS"] == (None, 74.26)
    assert made[3].paper == {}


def test_the_vanilla_gate_by_its_formula() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, gate="vanilla", num_experts=3, expert_scales=False)
    gate = MoEGate(config).eval()
    x = torch.randn(2, 64, 4, 4)
    assert gate.router is not None
    hidden = [torch.einsum("mc,bchw->bmhw", gate.w1[e], x) + gate.b1[e][:, None, None] for e in range(3)]
    experts = [(torch.einsum("m,bmhw->bhw", gate.w2[e], h.relu()) + gate.b2[e]).sigmoid() for e, h in enumerate(hidden)]
    weights = gate.router(x.mean((2, 3))).softmax(1)
    expected = x * torch.sigmoid(sum(weights[:, e, None, None] * a for e, a in enumerate(experts)))[:, None]
    torch.testing.assert_close(gate(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in NOISES if kind != "none"])
def test_disturbances_disturb_and_pass_gradients(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    y = disturb(x, kind, 0.1)
    assert y.shape == x.shape
    assert 0 < float((y - x).detach().abs().mean()) < 0.5
    assert torch.allclose(disturb(x, kind, 0.0), x, atol=1e-5)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    other = "noise_strength" if kind == "gaussian" else "noise_std"  # is no strength of this noise
    still = MoEGate(dataclasses.replace(SMALL, noise=kind, noise_std=0.0, noise_strength=0.0)).train()
    assert torch.equal(still(torch.ones(1, 64, 2, 2)), still(torch.ones(1, 64, 2, 2)))
    gate = MoEGate(dataclasses.replace(SMALL, noise=kind, **{other: 0.0})).train()
    features = torch.randn(2, 64, 2, 2)
    assert not torch.equal(gate(features), gate(features))
    assert torch.equal(gate.eval()(features), gate(features))


def test_losses_by_weight_and_by_features(dataset: CropDataset) -> None:
    torch.manual_seed(0)
    logits, points, labels = torch.randn(4, 2), torch.randn(4, 7), torch.tensor([0, 1, 1, 0])
    centers = torch.randn(2, 7)
    found = initial_loss(logits, labels, centers, 1.0, (2.0, 0.5), points)
    assert found["loss"] == pytest.approx(float(2 * found["ce"] + 0.5 * found["center"]))
    assert found["center"] == pytest.approx(float(contrastive_center(points, labels, centers, 1.0)))
    recipe = changed(QUICK, center_on="features")
    step = TrainStep(DTN(SMALL), recipe, Execution(), torch.device("cpu"))
    assert step.centers.shape == (2, 64)
    before = step.centers.detach().clone()
    rows = dataset.select("train")[:8]
    step.set_time(0)
    outcome = step(torch.from_numpy(dataset.get(rows)), torch.from_numpy(dataset.labels[rows]))
    assert outcome.values.isfinite().all()
    assert not torch.equal(step.centers, before)
    with pytest.raises(UsageError, match="--center-on features: needs a DTN"):
        TrainStep(build_detector(TimmConfig("resnet10t", 64)), recipe, Execution(), torch.device("cpu"))
    with pytest.raises(UsageError, match="initial-weights"):
        Recipe(initial_weights=(-1.0, 0.0))
