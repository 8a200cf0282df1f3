"""The training loop and the chain: repeatable, resumable to the bit, exactly Algorithm 1."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import RECIPE, SMALL, changed

from dtn_fast import DTN, DTNConfig
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.loader import epoch_order
from dtn_fast.data.video_table import Video
from dtn_fast.device import choose_precision
from dtn_fast.errors import DtnError, DtnWarning, UsageError
from dtn_fast.evaluation.metrics import evaluate_scores
from dtn_fast.model.config import Adaptation, CropPolicy, TimmConfig
from dtn_fast.runtime.load import STUDENT, best_checkpoint, load_model, read_recipe
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.train import distill as chain
from dtn_fast.train import loop, run_folder
from dtn_fast.train import step as step_module
from dtn_fast.train.checkpoint import load_centers, load_state, save_state
from dtn_fast.train.config import CHAIN, PRESETS, STUDENTS, Execution, Recipe
from dtn_fast.train.finetune import begin, finetune
from dtn_fast.train.log_lines import append_line, cut_lines, read_lines
from dtn_fast.train.loop import Epoch, Step, Stopped, fit
from dtn_fast.train.run_folder import start_run
from dtn_fast.train.run_lock import locked
from dtn_fast.train.run_report import write_run_report


def train(
    out: Path, dataset: CropDataset, recipe: Recipe = RECIPE, stop_after: int | None = None, **kwargs
) -> list[Epoch]:
    torch.manual_seed(1)
    events = fit(DTN(SMALL), dataset, recipe, out, **kwargs)
    epochs = []
    for event in events:
        if isinstance(event, Epoch):
            epochs.append(event)
        elif stop_after is not None and event.epoch == stop_after and event.step == 1:
            events.close()  # killed in the middle of an epoch
            break
    return epochs


def test_same_seed_same_run_and_resume_to_the_bit(dataset: CropDataset, tmp_path: Path) -> None:
    recipe = changed(RECIPE, epochs=3)
    whole = train(tmp_path / "a", dataset, recipe)
    train(tmp_path / "b", dataset, recipe, stop_after=1)
    resumed = train(tmp_path / "b", dataset, recipe)
    assert [e.epoch for e in resumed] == [1, 2]
    a, b = (load_state(tmp_path / run / loop.STATE) for run in "ab")
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert torch.equal(a["centers"], b["centers"])
    same = [
        {k: row[k] for k in ("epoch", "losses", "val_auc", "lr")} for row in read_lines(tmp_path / "a" / loop.METRICS)
    ]
    other = [
        {k: row[k] for k in ("epoch", "losses", "val_auc", "lr")} for row in read_lines(tmp_path / "b" / loop.METRICS)
    ]
    assert same == other
    assert len(same) == len(whole) == 3
    assert not train(tmp_path / "a", dataset, recipe), "a finished run stays as it is"
    different = train(tmp_path / "c", dataset, changed(recipe, seed=5))
    assert different[0].losses != whole[0].losses


def test_paper_defaults() -> None:
    recipe = Recipe()
    assert (recipe.batch_size, recipe.lr, recipe.weight_decay, recipe.lr_step) == (32, 1e-4, 1e-4, 15)
    assert recipe.weights == (4.0, 0.4, 0.6)


def test_learning_rate_drops_by_ten(dataset: CropDataset, tmp_path: Path) -> None:
    epochs = train(tmp_path, dataset, changed(RECIPE, epochs=3, lr_step=2))
    assert [e.lr for e in epochs] == pytest.approx([1e-3, 1e-3, 1e-4])


def test_best_epoch_is_kept_and_patience_stops(
    dataset: CropDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aucs = iter([0.6, 0.9, 0.9, 0.8, 0.95])  # of equals the first is kept
    real = loop.evaluate_scores
    monkeypatch.setattr(loop, "evaluate_scores", lambda *given: real(*given)._replace(auc=next(aucs)))
    saved: list[int] = []
    monkeypatch.setattr(DTN, "save_pretrained", lambda self, folder: saved.append(len(saved)))
    epochs = train(tmp_path, dataset, changed(RECIPE, epochs=9, epoch_patience=2))
    assert [e.best_auc for e in epochs] == [0.6, 0.9, 0.9, 0.9]
    assert len(saved) == 2


def test_reals_are_repeated_to_balance(dataset: CropDataset) -> None:
    rows = dataset.select("train")
    for repeat, expected in ((0, 4), (1, 1), (7, 7)):
        drawn = epoch_order(dataset.labels, rows, repeat, 0)
        counts = np.bincount(drawn, minlength=len(dataset.labels))
        assert set(counts[rows][dataset.labels[rows] == 0]) == {expected}
        assert set(counts[rows][dataset.labels[rows] == 1]) == {1}
        assert counts.sum() == len(drawn)


def test_non_finite_loss_stops_with_advice(
    dataset: CropDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls, bad = step_module.initial_loss, itertools.count(), {2, 5}
    save = loop._Loop._save

    def poison(*inputs):
        losses = real(*inputs)
        return {**losses, "loss": losses["loss"] * torch.nan} if next(calls) in bad else losses

    monkeypatch.setattr(step_module, "initial_loss", poison)
    epochs = train(tmp_path / "few", dataset, changed(RECIPE, max_nonfinite=2))
    assert epochs[-1].skipped == 2
    assert all(np.isfinite(value) for e in epochs for value in e.losses.values())
    lines = read_lines(tmp_path / "few" / loop.NONFINITE)
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 2), (0, 5)]
    assert all(len(line["rows"]) == len(line["videos"]) == RECIPE.batch_size for line in lines)
    assert lines[0]["values"]["loss"] == "nan"
    calls, stops = itertools.count(), iter([0] * 7 + [15])
    monkeypatch.setattr(loop._Loop, "_save", lambda self: None)
    how = {"stop": lambda: next(stops), "execution": Execution(save_every=0)}
    with pytest.raises(Stopped):  # without a state: the bad steps are done and recorded again, once
        train(tmp_path / "paused", dataset, changed(RECIPE, max_nonfinite=2), **how)
    monkeypatch.setattr(loop._Loop, "_save", save)
    calls = itertools.count()
    train(tmp_path / "paused", dataset, changed(RECIPE, max_nonfinite=2))
    assert read_lines(tmp_path / "paused" / loop.NONFINITE) == lines
    bad.update(range(10**6))
    with pytest.raises(DtnError, match=r"3 steps were not finite.*lower --lr"):
        train(tmp_path / "many", dataset, changed(RECIPE, max_nonfinite=2))
    assert not (tmp_path / "many" / loop.STATE).exists()


def test_wrong_crops_are_named(dataset: CropDataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the model: takes 128 pixels, the crops have 64"):
        next(fit(DTN(DTNConfig.preset("tiny")), dataset, RECIPE, tmp_path))
    forgeries = ", ".join(dataset.methods)
    preset = PRESETS["ffpp-c23"].recipe.methods
    text = f"--methods .* names {', '.join(preset)}, and the data holds {forgeries}; name some of these"
    with pytest.raises(UsageError, match=text):
        next(fit(DTN(SMALL), dataset, changed(RECIPE, methods=preset), tmp_path))
    with pytest.warns(DtnWarning, match=f"names Deepfakes, and the data holds {forgeries}; training goes on without"):
        next(fit(DTN(SMALL), dataset, changed(RECIPE, methods=("Deepfakes", *dataset.methods)), tmp_path))


@pytest.mark.parametrize(
    ("keep", "text", "blend"),
    [
        (
            lambda v: v.split != "val",
            "val split .* 0 crops of reals and 0 of fakes; .* prepare again with --splits",
            False,
        ),
        (lambda v: v.split != "train", "the train split .*prepare again with --splits train val", False),
        (lambda v: v.split != "val" or v.label, "0 crops of reals and 24 of fakes.*add reals to val$", False),
        (lambda v: not v.label, "train split .* add fakes to train, or --self-blend makes fakes from reals$", True),
    ],
)
def test_a_split_that_lacks_a_class_says_what_the_data_holds(
    dataset: CropDataset, tmp_path: Path, keep: Callable[[Video], bool], text: str, blend: bool
) -> None:
    rows = np.array([row for row, v in enumerate(dataset.video) if keep(dataset.videos[v])])
    part = dataclasses.replace(dataset, video=dataset.video[rows], notes=["left out: 3 videos of val", "6 videos: x"])
    with pytest.raises(UsageError, match=text) as error:
        next(fit(DTN(SMALL), part, RECIPE, tmp_path))
    assert "the data holds " in str(error.value)
    assert "left out: 3 videos of val" in str(error.value)
    assert "6 videos" not in str(error.value)
    assert "test/real 6" in str(error.value)
    assert ("--self-blend" in str(error.value)) == blend


def test_a_run_stores_the_margin_of_its_crops_and_refuses_others(dataset: CropDataset, tmp_path: Path) -> None:
    wide = dataclasses.replace(dataset, crop=CropPolicy(margin=1.7))
    for config in (SMALL, TimmConfig("resnet10t", 64)):
        assert run_folder.for_crops(config, wide).crop == wide.crop
    run_folder.start_run(tmp_path, changed(RECIPE, epochs=1), run_folder.for_crops(SMALL, wide))
    for _ in chain.train_initial(tmp_path, wide):
        pass
    assert load_model(tmp_path).config.crop == wide.crop
    with pytest.raises(UsageError, match=r"the model: takes crops of margin 1.7, these have 1.3.* --margin 1.7"):
        next(chain.distill(tmp_path, dataset))
    pictures = dataclasses.replace(dataset, crop=None)  # a folder of pictures has no margin to compare
    pictures.check_fits(load_model(tmp_path).config, "the model")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_precision_trains(dataset: CropDataset, tmp_path: Path, precision: str) -> None:
    (epoch,) = train(tmp_path, dataset, changed(RECIPE, epochs=1, precision=precision))
    assert np.isfinite(epoch.losses["loss"])


def test_auto_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for flags, expected in (
        ({}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert choose_precision("auto", cpu) == expected
    for capability, expected in (((7, 0), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert choose_precision("auto", gpu) == expected
    assert choose_precision("fp16", gpu) == torch.float16


# --------------------------------------------------------------------------------------------- the chain


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_algorithm_1(trained: Path, dataset: CropDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student starts from its teacher, the teacher stays frozen, hard labels stay in, AUC decides when to stop."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    seen = []

    def spy(model, shards_, recipe, out, teacher=None, generation=0, device="cpu", centers=None, initial=None):
        seen.append((generation, teacher))
        assert teacher is not None
        assert torch.equal(centers, load_centers(run / f"generation-{generation - 1}" / run_folder.CENTERS))
        assert not torch.equal(centers, torch.eye(2))
        expected = weights(run / f"generation-{generation - 1}")
        for part in (model, teacher):
            state = part.state_dict()
            assert all(torch.equal(state[k], expected[k]) for k in expected)
        before = {k: v.clone() for k, v in teacher.state_dict().items()}
        for event in fit(model, shards_, recipe, out, teacher, generation, device, centers=centers, initial=initial):
            if isinstance(event, Step):
                assert set(event.losses) == {"loss", "ce", "kd", "center"}
                total = 4 * event.losses["ce"] + 0.4 * event.losses["kd"] + 0.6 * event.losses["center"]
                assert event.losses["loss"] == pytest.approx(total, rel=1e-4)
            yield event
        assert not any(p.requires_grad for p in teacher.parameters())
        assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
        moved = model.state_dict()
        assert not torch.equal(moved["head.weight"], before["head.weight"])
        assert not torch.equal(moved["backbone.1.running_mean"], before["backbone.1.running_mean"]), "BN trains too"

    monkeypatch.setattr(chain, "fit", spy)
    aucs = {0: 0.8, 1: 0.9, 2: 0.9}
    monkeypatch.setattr(run_folder, "best_auc", lambda run_, generation: aucs[generation])
    list(chain.distill(run, dataset))
    assert [g for g, _ in seen] == [1, 2]
    assert json.loads((run / "summary.json").read_text())["best"] == 1


@pytest.mark.parametrize(
    ("minimum", "patience", "expected"), [(0, 1, [1]), (2, 1, [1, 2]), (0, 2, [1, 2]), (0, 3, [1, 2, 3])]
)
def test_the_chain_stops_without_improvement(
    trained: Path,
    dataset: CropDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    minimum: int,
    patience: int,
    expected: list[int],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / run_folder.RECIPE).unlink()
    recipe = changed(RECIPE, epochs=1, generations=4, min_generations=minimum, generation_patience=patience)
    run_folder.start_run(run, recipe, SMALL)
    monkeypatch.setattr(run_folder, "best_auc", lambda run_, generation: 0.9 - generation / 100)
    done = [e.generation for e in chain.distill(run, dataset) if isinstance(e, Epoch)]
    assert done == expected
    assert best_checkpoint(run) == run / "generation-0"


def test_the_chain_resumes(
    trained: Path, dataset: CropDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "best_auc", lambda run_, generation: generation / 10)
    for name in ("whole", "paused"):
        shutil.copytree(trained, tmp_path / name)
    list(chain.distill(tmp_path / "whole", dataset))
    events = chain.distill(tmp_path / "paused", dataset)
    for event in events:
        if isinstance(event, Epoch) and (event.generation, event.epoch) == (1, 0):
            events.close()
            break
    list(chain.distill(tmp_path / "paused", dataset))
    for generation in (1, 2):
        a, b = (load_state(tmp_path / n / f"generation-{generation}" / loop.STATE) for n in ("whole", "paused"))
        assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        assert torch.equal(a["centers"], b["centers"])


def test_centres_of_the_best_epoch_live_on(
    dataset: CropDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are stored with the weights of the best epoch, and the first Ct-c of a student is its teacher's."""
    aucs = itertools.chain([0.6, 0.9, 0.8], itertools.repeat(0.5))
    real = loop.evaluate_scores
    monkeypatch.setattr(loop, "evaluate_scores", lambda *given: real(*given)._replace(auc=next(aucs)))
    recipe = changed(RECIPE, epochs=3, generations=1, lr=0.01, student_warmup=1.0)
    run_folder.start_run(tmp_path / "run", recipe, SMALL)
    seen = []
    for event in chain.train_initial(tmp_path / "run", dataset):
        if isinstance(event, Epoch):
            seen.append(load_centers(tmp_path / "run" / "generation-0" / run_folder.CENTERS))
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], load_state(tmp_path / "run" / "generation-0" / loop.STATE)["centers"])
    first = {}
    for start in ("teacher", "new"):
        run = tmp_path / start
        shutil.copytree(tmp_path / "run", run)
        stored = json.loads((run / run_folder.RECIPE).read_text())
        stored["recipe"]["student_centers"] = start
        (run / run_folder.RECIPE).write_text(json.dumps(stored))
        first[start] = next(e for e in chain.distill(run, dataset) if isinstance(e, Step)).losses["center"]
    assert first["teacher"] < 0.9 * first["new"]
    for content in (b"", b"x" * 99):
        (tmp_path / "new" / "generation-0" / run_folder.CENTERS).write_bytes(content)
        with pytest.raises(UsageError, match=r"not Ct-c centres .*--student-centers new starts from new ones"):
            load_centers(tmp_path / "new" / "generation-0" / run_folder.CENTERS)


def test_a_gain_inside_its_interval_is_none(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    rng = np.random.default_rng(0)
    video = np.repeat(np.arange(40), 3)
    labels = (video % 2).astype(np.int64)
    noise = rng.normal(size=120)
    scores = {0: labels + 0.9 * noise, 1: labels + 0.88 * noise + 0.1 * rng.normal(size=120), 2: labels + 0.2 * noise}
    (run / "generation-0" / run_folder.METRICS).unlink()
    for generation, values in scores.items():
        folder = run / f"generation-{generation}"
        folder.mkdir(exist_ok=True)
        np.savez(folder / loop.VALIDATION, labels=labels, scores=values, video=video)
        append_line(folder / run_folder.METRICS, {"val_auc": evaluate_scores(labels, values, 0.5).auc})
    stored = json.loads((run / run_folder.RECIPE).read_text())
    stored["recipe"]["gain"] = Recipe().gain
    (run / run_folder.RECIPE).write_text(json.dumps(stored))
    found = run_folder.summarise(run)
    small, large = (row["gain"] for row in found["generations"][1:])
    assert small.value > 0 > small.low, "the case is a gain inside its interval"
    assert 0 < large.low < large.value < large.high
    assert [row.get("over") for row in found["generations"]] == [None, 0, 0]
    assert found["best"] == 2
    shutil.rmtree(run / "generation-2")
    assert run_folder.summarise(run)["best"] == 0
    assert best_checkpoint(run) == run / "generation-0"
    stored["recipe"]["gain"] = "any"
    (run / run_folder.RECIPE).write_text(json.dumps(stored))
    assert run_folder.summarise(run)["best"] == 1
    (run / "generation-0" / loop.VALIDATION).unlink()  # as in runs of earlier versions
    assert run_folder.summarise(run)["generations"][1]["gain"] == (small.value, None, None)
    stored["recipe"]["gain"] = "interval"
    (run / run_folder.RECIPE).write_text(json.dumps(stored))
    with pytest.raises(UsageError, match=r"generation-0.* no validation scores by video, .* use --gain any"):
        run_folder.summarise(run)


def test_students_have_a_recipe_of_their_own(trained: Path, dataset: CropDataset, tmp_path: Path) -> None:
    """distill changes it without a new generation 0; what is begun goes on by what it was begun with."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    initial = {p.name: p.read_bytes() for p in (run / "generation-0").iterdir()}
    own = changed(RECIPE, epochs=1, temperature=4.0, weights=(2.0, 1.0, 0.5), generations=1)
    events = list(chain.distill(run, dataset, recipe=own))
    assert {e.generation for e in events} == {1}
    assert [e.epoch for e in events if isinstance(e, Epoch)] == [0]
    first = next(e for e in events if isinstance(e, Step)).losses
    total = 2 * first["ce"] + first["kd"] + 0.5 * first["center"]
    assert first["loss"] == pytest.approx(total, rel=1e-4)
    assert {p.name: p.read_bytes() for p in (run / "generation-0").iterdir()} == initial
    assert run_folder.load_run(run)[0] == RECIPE
    assert run_folder.student_recipe(run, 1) == own
    assert read_recipe(run / "generation-1")["temperature"] == 4.0
    assert read_recipe(run / "generation-0")["temperature"] == RECIPE.temperature
    text = write_run_report(run).read_text()
    assert re.search(r"Generation 1</th>.*<th>temperature</th><td>4.0</td><td>2.0</td>", text, re.DOTALL)
    assert "1 of 1" in text
    with pytest.raises(UsageError, match=r"generation-1: distilled with .*temperature 4.0 \(now 2.0\).*--restart 1"):
        next(chain.distill(run, dataset))
    later = changed(own, generations=2, min_generations=2, gain="interval")
    assert {e.generation for e in chain.distill(run, dataset, recipe=later)} == {2}, "the chain may become longer"
    assert [run_folder.student_recipe(run, g) for g in (1, 2)] == [later] * 2
    again = changed(later, temperature=1.0, generations=1)
    assert {e.generation for e in chain.distill(run, dataset, 1, again)} == {1}
    assert not (run / "generation-2").exists()
    (run / "generation-1" / STUDENT).write_text("{")
    with pytest.raises(UsageError, match=r"student\.json: damaged .*--restart"):
        next(chain.distill(run, dataset))


def test_the_papers_preset_ends_with_student_3() -> None:
    recipe = PRESETS["ffpp-c23"].recipe
    assert (recipe.generations, recipe.min_generations, recipe.gain) == (3, 3, "any")
    names = {f.name for f in dataclasses.fields(Recipe)}
    assert set(STUDENTS) < names
    assert set(CHAIN) < set(STUDENTS)


def test_run_folders_are_checked(trained: Path, dataset: CropDataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no training run"):
        list(chain.distill(tmp_path, dataset))
    run_folder.start_run(tmp_path / "new", RECIPE, SMALL)
    with pytest.raises(UsageError, match="generation 0 is not trained"):
        list(chain.distill(tmp_path / "new", dataset))
    run_folder.start_run(tmp_path / "new", changed(RECIPE, lr=2.0), SMALL)  # nothing has begun there
    assert run_folder.load_run(tmp_path / "new")[0].lr == 2.0
    (tmp_path / "new" / "generation-0").mkdir()
    (tmp_path / "new" / "generation-0" / "last.pt").touch()
    with pytest.raises(UsageError, match=r"holds a run with lr 2\.0 \(now 1\.0\); repeat these"):
        run_folder.start_run(tmp_path / "new", changed(RECIPE, lr=1.0), SMALL)
    nan, inf = float("nan"), float("inf")
    wrong = [
        ("lr", 0),
        ("lr", nan),
        ("temperature", inf),
        ("epochs", 0),
        ("ema", 1.0),
        ("epoch_patience", -1),
        ("max_nonfinite", -1),
    ]
    for name, value in [*wrong, ("weights", (1.0, -1.0, 1.0)), ("weights", (1.0, nan, 1.0))]:
        with pytest.raises(UsageError, match=f"--{name.replace(chr(95), chr(45))} "):
            changed(RECIPE, **{name: value})
    for restart in (0, -1, 7):
        with pytest.raises(UsageError, match=f"--restart {restart}"):
            run_folder.check_restart(trained, restart)
    model = load_model(trained)
    assert model.notice.startswith("synthetic")
    rows = dataset.select("val")
    assert TorchScorer(model).score_rows(dataset, rows).shape == rows.shape


def test_state_files_never_execute(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"model": Evil()}, tmp_path / "last.pt")
    with pytest.raises(UsageError, match="not a training state"):
        load_state(tmp_path / "last.pt")
    assert not (tmp_path / "executed").exists()
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(UsageError, match="not a training state"):
        load_state(tmp_path / "last.pt")
    save_state(tmp_path / "last.pt", {"epoch": 3})
    assert load_state(tmp_path / "last.pt") == {"epoch": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_lines_of_what_is_done_again_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    rows = [{"epoch": 0, "step": 3}, {"epoch": 0}, {"epoch": 1, "step": 3}, {"epoch": 1, "step": 9}, {"epoch": 1}]
    for row in rows:
        append_line(path, row)
    with path.open("ab") as file:
        file.write(b'{"epoch": 2\xff, "st')  # cut off by a crash
    assert read_lines(path) == rows
    cut_lines(path, 1, 9)
    assert read_lines(path) == rows[:3], "an epoch's own line is of its end"
    cut_lines(path, 1, 0)
    assert read_lines(path) == rows[:2]
    path.write_text('{"epoch": 0}\n{"epo\n{"epoch": 1}\n')
    assert read_lines(path) == [{"epoch": 0}], "nothing after damage is trusted"
    cut_lines(tmp_path / "none.jsonl", 0)
    assert not (tmp_path / "none.jsonl").exists()


def test_restarting_forgets_that_generation_and_the_later_ones(
    trained: Path, dataset: CropDataset, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for generation in (1, 2, 3, 10):
        shutil.copytree(run / "generation-0", run / f"generation-{generation}")
    (run / "generation-notes").mkdir()
    run_folder.forget(run, 2)
    assert sorted(p.name for p in run.glob("generation-*")) == ["generation-0", "generation-1", "generation-notes"]
    done = [e.generation for e in chain.distill(run, dataset, restart=1) if isinstance(e, Epoch)]
    assert done[0] == 1


def test_a_refused_distillation_deletes_nothing(trained: Path, dataset: CropDataset, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", run_folder.load_run(trained)[0]
    shutil.copytree(trained, run)
    for generation in (1, 2):
        shutil.copytree(run / "generation-0", run / f"generation-{generation}")
        run_folder.record_student(run, generation, recipe)
    for restart, fields, match in (
        (2, {"temperature": 9.0}, r"generation-1: distilled with temperature .* add --restart 1"),
        (1, {"center_on": "features"}, r"--center-on features: takes centres \[2, 64\], the teacher's are \[2, 2\]"),
        (1, {"initial_weights": (1.0, 0.0)}, r"generation 0 was trained with initial_weights .* leave these to"),
    ):
        with pytest.raises(UsageError, match=match):
            next(chain.distill(run, dataset, restart, changed(recipe, **fields)))
        assert all((run / f"generation-{g}" / "model.safetensors").is_file() for g in (1, 2)), fields
    shutil.rmtree(run / "generation-1")
    shutil.rmtree(run / "generation-2")
    with pytest.raises(UsageError, match="centres"):
        next(chain.distill(run, dataset, None, changed(recipe, center_on="features")))
    (run / "generation-0" / "validation.npz").unlink()
    with pytest.raises(UsageError, match=r"generation-0: no validation scores by video.*--gain any"):
        next(chain.distill(run, dataset, None, changed(recipe, gain="interval")))
    assert next(chain.distill(run, dataset, None, changed(recipe, gain="any"))), "a refused recipe binds nobody"


def test_a_student_was_trained_on_its_teachers_corruptions_too(
    trained: Path, dataset: CropDataset, tmp_path: Path
) -> None:
    run, recipe = tmp_path / "run", run_folder.load_run(trained)[0]
    shutil.copytree(trained, run)
    initial = load_model(run).config.trained_on
    assert initial is not None
    assert "jpeg" in initial.corruptions
    geometry = changed(recipe, augment="geometry", generations=1, epochs=1, center_on="probabilities")
    list(chain.distill(run, dataset, None, geometry))
    student = load_model(run / "generation-1").config.trained_on
    assert student is not None
    assert (student.forgeries, student.corruptions) == (initial.forgeries, initial.corruptions)
    assert student.recipe == (
        "CE + Ct-c, then CE + KD + Ct-c on probabilities; from scratch; augmentation forensic, then geometry"
    )


def test_published_weights_are_asked_for(dataset: CropDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(chain, "build_detector", lambda config, pretrained, _: asked.append(pretrained) or DTN(SMALL))
    for pretrained in (True, False):
        run = tmp_path / str(pretrained)
        config = TimmConfig("resnet10t", SMALL.image_size)
        run_folder.start_run(run, changed(RECIPE, epochs=1, pretrained=pretrained), config)
        list(chain.train_initial(run, dataset))
    assert asked == [True, False]
    with pytest.raises(UsageError, match="only models of timm have published weights"):
        run_folder.start_run(tmp_path / "dtn", changed(RECIPE, pretrained=True), SMALL)


def test_a_flipped_bit_in_the_training_state_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_state(path, {"model": {"weight": torch.arange(4096.0)}})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"last.pt: .*another checksum than when it was written.*delete it"):
        load_state(path)


def test_students_and_fine_tuned_models_train_what_their_teacher_trained(tmp_path: Path, dataset: CropDataset) -> None:
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    recipe = changed(RECIPE, epochs=1, generations=1)
    start_run(run, recipe, TimmConfig("test_vit", 64, adaptation=Adaptation("lora", 2)))
    list(chain.train_initial(run, dataset))
    list(chain.distill(run, dataset))
    with locked(tuned):
        begin(tuned, run / "generation-0", recipe)
    list(finetune(tuned, dataset))
    before = weights(run / "generation-0")
    for folder in (run / "generation-1", tuned / "generation-0"):
        after = weights(folder)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name.rsplit(".", 1)[-1] for name in moved} == {"left", "right", "weight", "bias"}
        assert {name for name in moved if name.endswith(("weight", "bias"))} == {"net.head.weight", "net.head.bias"}
