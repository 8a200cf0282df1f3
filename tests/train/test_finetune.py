"""Fine-tuning: a new forgery is learned, the old ones are kept, and the run is one like any other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small import RECIPE, SMALL, changed

from dtn_fast.data.blend import METHOD
from dtn_fast.data.crop_dataset import CropDataset, ShardFiles
from dtn_fast.data.loader import Loader, replay_order
from dtn_fast.data.replay import NEW, OLD, joined, only, part, parts_of
from dtn_fast.data.video_table import Video
from dtn_fast.errors import DtnWarning, UsageError
from dtn_fast.evaluation.before_after import Comparison
from dtn_fast.evaluation.calibration import calibrate
from dtn_fast.runtime.load import load_model
from dtn_fast.train import losses
from dtn_fast.train.checkpoint import load_state
from dtn_fast.train.config import Recipe, for_finetuning
from dtn_fast.train.distill import distill, train_initial
from dtn_fast.train.finetune import begin, finetune, folder_for, measure, open_both, open_training_crops, recipe_from
from dtn_fast.train.loop import Epoch, Step
from dtn_fast.train.run_folder import COMPARISON, CROPS, STATE, TEACHER, start_run
from dtn_fast.train.run_report import write_run_report

SIDE = 64
COUNTS = {"train": 12, "val": 6, "test": 12}
FRAMES = 3
BASE = changed(RECIPE, epochs=3, augment="none", generations=1)
TUNING = changed(for_finetuning(BASE), lr=BASE.lr, epochs=4)
KEPT = 0.2
"""The most that the AUC of the old forgeries may fall by; training on the new data alone loses over twice as much."""


FORGERIES = {
    "Dark": lambda area: area * 0.8,
    "Smooth": lambda area: area.mean((0, 1)) + 0.6 * (area - area.mean((0, 1))),
    "Light": lambda area: area * 1.1,
}


def painted(seed: int, methods: tuple[str, ...], name: str, light: float = 1.0, reals: bool = True) -> CropDataset:
    """Noise pictures, as bright as ``light`` says, of which each forgery changes the middle in its own way."""
    rng = np.random.default_rng(seed)
    videos, pixels = [], []
    for split, count in COUNTS.items():
        for number in range(count):
            for method in ("real",) * reals + methods:
                videos.append(Video(f"{name}/{split}/{method}/{number}", int(method != "real"), method, split))
                for _ in range(FRAMES):
                    picture = rng.uniform(60, 196, (SIDE, SIDE, 3)) * light
                    if method != "real":
                        middle = picture[16:48, 16:48]
                        middle[:] = FORGERIES[method](middle)
                    pixels.append(picture.astype(np.uint8))
    place = np.repeat(np.arange(len(videos)), FRAMES)
    status = [{"asked": FRAMES, "frames": FRAMES, "faces": FRAMES, "boxes": "own", "error": None, "reason": None}
              for _ in videos]  # fmt: skip
    frame = np.tile(np.arange(FRAMES), len(videos))
    return CropDataset(ShardFiles([np.array(pixels)], SIDE), place, frame, np.zeros_like(place), videos, status, True,
                       folder=f"/{name}")  # fmt: skip


@pytest.fixture(scope="module")
def old() -> CropDataset:
    return painted(0, ("Dark", "Smooth"), "old")


@pytest.fixture(scope="module")
def new() -> CropDataset:
    return painted(1, ("Light",), "new")


@pytest.fixture(scope="module")
def both(new: CropDataset, old: CropDataset) -> CropDataset:
    return joined(new, [old], (), ("Dark", "Smooth"), 0)


@pytest.fixture(scope="module")
def base(old: CropDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained on the old forgeries."""
    run = tmp_path_factory.mktemp("base") / "run"
    start_run(run, BASE, SMALL)
    for _ in train_initial(run, old):
        pass
    return run


def tuned(base: Path, out: Path, dataset: CropDataset, recipe: Recipe) -> list[Epoch]:
    begin(out, base, recipe)
    return [event for event in finetune(out, dataset) if isinstance(event, Epoch)]


def test_the_new_forgery_is_learned_and_the_old_ones_are_kept(base: Path, both: CropDataset, tmp_path: Path) -> None:
    """Replay keeps what training on the new crops alone forgets; the teacher alone would keep all as it was."""
    changes = {}
    recipes = {
        "finetune": TUNING,
        "plain": changed(TUNING, replay_share=0.0, weights=(4.0, 0.0, 0.6)),
        "teacher": changed(TUNING, weights=(0.0, 4.0, 0.0), kd_on="all", epochs=2),
    }
    for name, recipe in recipes.items():
        epochs = tuned(base, tmp_path / name, both, recipe)
        assert [e.val_auc for e in epochs] == pytest.approx([np.mean(list(e.val_aucs.values())) for e in epochs])
        *_, made = measure(tmp_path / name, both, "cpu")
        assert isinstance(made, Comparison)
        changes[name] = {row.data: row.frame.after - row.frame.before for row in made.rows if row.fakes == "all"}
    assert changes["finetune"][NEW] > 0.5
    assert changes["finetune"][OLD] >= -KEPT
    assert changes["plain"][NEW] > 0.5
    assert changes["plain"][OLD] < -2 * KEPT
    assert changes["teacher"][OLD] >= -KEPT
    assert changes["teacher"][NEW] < 0.4


def test_soft_labels_of_the_right_crops_alone() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    teacher = torch.where(torch.tensor([1, 1, 0, 1, 0, 0])[:, None] == 1, 1.0, -1.0) * torch.eye(2)[labels]
    how = (labels, teacher, torch.eye(2), (4.0, 0.4, 0.6), 2.0, 1.0, None, None)
    right = losses.dsd_loss(logits, *how, only_right=True)
    some = torch.tensor([0, 1, 3])
    expected = losses.distillation(logits[some], teacher[some], 2.0) / 2  # three of six, mean over all
    torch.testing.assert_close(right["kd"], expected)
    whole = losses.dsd_loss(logits, *how)
    torch.testing.assert_close(whole["kd"], losses.distillation(logits, teacher, 2.0))
    assert all(torch.equal(whole[name], right[name]) for name in ("ce", "center"))


def test_every_batch_holds_the_share_of_old_crops_and_of_each_class() -> None:
    labels = np.array([0] * 10 + [1] * 30 + [0] * 50 + [1] * 200)
    new, past = np.arange(40), np.arange(40, 290)
    order = replay_order(labels, new, past, 0.25, 1)
    assert len(order) == 60 + 20
    for batch in order.reshape(-1, 16):
        for group, count in ((labels[batch] == 1, 8), (batch >= 40, 4), ((batch >= 40) & (labels[batch] == 1), 2)):
            assert abs(group.sum() - count) <= 2, batch
    times = np.bincount(order, minlength=290)
    assert set(times[10:40]) == {1}, "each new fake once"
    assert set(times[:10]) == {3}, "new reals as often as balances the classes"
    assert times[40:].max() == 1, "no old crop twice before all others"
    assert set(order[order >= 40]) != set((other := replay_order(labels, new, past, 0.25, 2))[other >= 40])
    fakes = replay_order(labels, new[10:], past, 0.5, 1)
    assert len(fakes) == 120
    assert labels[fakes].sum() == 60
    assert (fakes >= 40).sum() == 30 + 60, "reals that the new data lack are the old data's"
    assert set(replay_order(labels, new, past, 0.0, 1)) <= set(new)


def test_joined_crops_are_those_of_their_own_sets(new: CropDataset, old: CropDataset, both: CropDataset) -> None:
    count = len(new.video)
    rows = np.array([count + 5, 3, 0, count, len(both.video) - 1])
    expected = [old.get(rows[[0]] - count), new.get(np.array([3, 0])), old.get(np.array([0, len(old.video) - 1]))]
    np.testing.assert_array_equal(both.get(rows), np.concatenate(expected))
    np.testing.assert_array_equal(both.labels, np.concatenate([new.labels, old.labels]))
    assert both.is_old(rows).tolist() == [True, False, False, True, True]
    kinds = lambda of, split: sorted({of.videos[v].method for v in of.video[of.select(split)]})
    for videos, source in zip(parts_of(both).values(), (new, old), strict=True):
        assert [kinds(part(both, videos), split) for split in COUNTS] == [kinds(source, split) for split in COUNTS]
    assert kinds(joined(new, [old], (), ("Dark",), 0), "train") == ["Dark", "Light", "real"], "what was learned"
    assert kinds(joined(new, [old], (), ("Other",), 0), "train") == ["Dark", "Light", "Smooth", "real"]
    blended = joined(new, [old], (), (METHOD,), 0)
    assert kinds(blended, "train") == ["Light", METHOD, "real"]
    assert {blended.videos[v].method for v in blended.video[blended.select("train", ("Light",))]} == {
        "Light", METHOD, "real",
    }, "--methods names new forgeries"  # fmt: skip
    without = joined(part(new, np.array([v.split != "test" for v in new.videos])), [old], (), (), 0)
    assert not len(part(without, parts_of(without)[NEW]).select("test")), "a split that is not there is not the old one"
    twice = joined(new, [only(old, ("Dark",)), only(old, ("Smooth",))], (), (), 0)
    assert len(twice.video) == len(new.video) + 2 * len(old.video)


def test_a_class_that_the_new_data_lack_is_the_old_datas(base: Path, old: CropDataset, tmp_path: Path) -> None:
    fakes = painted(1, ("Light",), "new", reals=False)
    with pytest.warns(DtnWarning, match="the new data hold no reals in train and val; the old data's are used"):
        both = joined(fakes, [old], (), ("Dark", "Smooth"), 0)
    (epoch,) = tuned(base, tmp_path, both, changed(TUNING, epochs=1))
    assert set(epoch.val_aucs) == {NEW, OLD}
    *_, made = measure(tmp_path, both, "cpu")
    assert isinstance(made, Comparison)
    assert [(row.data, row.fakes) for row in made.rows] == [
        (NEW, "all"), (OLD, "all"), (OLD, "Dark"), (OLD, "Smooth"),
    ]  # fmt: skip
    assert "12 real, 12 fake" in made.rows[0].note
    labels = np.concatenate([b.labels for b in Loader(both, both.select("train"), 8, (0,), 0, replay=0.5).epoch(0)])
    assert labels.mean() == 0.5


def test_unsuitable_data_are_named(new: CropDataset, old: CropDataset) -> None:
    for given, text in (
        ((new, [new], (), ()), "/new --replay /new: new/train/Light/0 is in the new and in the old data; name the new"),
        ((new, [old], ("Dark",), ()), "--methods Dark: not in /new, which holds Light"),
        ((keep(new, "train"), [old], (), ()), "the val split of the new data holds no crops; .*--splits train val"),
        ((new, [only(old, ())], (), ()), "the train split of the old data needs reals and fakes that the model"),
    ):
        with pytest.raises(UsageError, match=text):
            joined(*given, 0)
    same = joined(old, [old], ("Dark",), ("Smooth",), 0)  # a folder may hold the new and the old forgeries
    assert {v.method for v in same.videos_of("train")} == {"Dark", "Smooth", "real"}


def keep(dataset: CropDataset, split: str) -> CropDataset:
    return part(dataset, np.array([video.split == split for video in dataset.videos]))


def test_a_fine_tuned_run_resumes_to_the_bit_and_goes_on_like_any_other(
    base: Path, both: CropDataset, tmp_path: Path
) -> None:
    recipe = changed(TUNING, epochs=2)
    tuned(base, tmp_path / "whole", both, recipe)
    begin(tmp_path / "paused", base, recipe)
    for event in (events := finetune(tmp_path / "paused", both)):
        if isinstance(event, Step) and (event.epoch, event.step) == (0, 0):
            terms = event.losses
            assert terms["loss"] == pytest.approx(4 * terms["ce"] + 0.4 * terms["kd"] + 0.6 * terms["center"], rel=1e-4)
            assert event.lr < 0.1 * TUNING.lr
        if isinstance(event, Step) and event.epoch == 1:
            events.close()
            break
    tuned(base, tmp_path / "paused", both, recipe)
    a, b = (load_state(tmp_path / name / "generation-0" / STATE) for name in ("whole", "paused"))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert torch.equal(a["centers"], b["centers"])
    run = tmp_path / "whole"
    card = load_model(run).config.card
    assert card is not None
    assert (card.fingerprint, card.calibration) == (json.loads((run / CROPS).read_text())["fingerprint"], None)
    assert [counts.split for counts in card.splits] == ["train", "val"]
    before, kept = load_model(base).state_dict(), load_model(run / TEACHER).state_dict()
    assert all(torch.equal(before[name], kept[name]) for name in before)
    assert "/new --replay /old" in (run / CROPS).read_text()
    assert json.loads((run / CROPS).read_text())["fingerprint"].count("+") == 1
    facts = load_model(run).config.trained_on
    assert facts is not None
    assert facts.forgeries == ("Dark", "Light", "Smooth")
    assert facts.recipe.endswith("from scratch; augmentation none; fine-tuned by CE + KD + Ct-c, augmentation none")
    *_, made = measure(run, both, "cpu")
    assert isinstance(made, Comparison)
    assert Comparison.from_json(json.loads((run / f"{COMPARISON}.json").read_text())) == made
    page = write_run_report(run).read_text()
    assert "mean of the new and the old" in page
    assert all(cell in page for row in made.table()[1] for cell in row)
    list(distill(run, both))
    student = load_model(run / "generation-1").config.trained_on
    assert student is not None
    assert student.recipe == f"{facts.recipe}; distilled by CE + KD + Ct-c, augmentation none"
    (first, second) = json.loads((run / "summary.json").read_text())["generations"]
    assert second["gain"][0] == pytest.approx(second["val_auc"] - first["val_auc"])
    assert second["gain"][1] <= second["gain"][0] <= second["gain"][2]


def test_a_run_that_does_not_fit_is_refused_and_nothing_is_written_into_the_source(
    base: Path, trained: Path, both: CropDataset, new: CropDataset, old: CropDataset, tmp_path: Path
) -> None:
    content = lambda: sorted((str(path), path.stat().st_mtime_ns) for path in base.rglob("*"))
    before = content()
    assert folder_for(base) == folder_for(base / "generation-0") == base.with_name("run-finetuned")
    for out in (base, base / "generation-0" / "x"):
        with pytest.raises(UsageError, match="is the model to begin with, or in its folder"):
            folder_for(base / "generation-0", out)
    tuned(base, tmp_path / "run", both, changed(TUNING, epochs=1))
    for out, source, recipe, text in (
        (tmp_path / "other", tmp_path / "none", TUNING, "no such checkpoint"),
        (trained, base, TUNING, "holds a run of dtn-fast train; choose another --out"),
        (tmp_path / "run", trained, TUNING, "began with other weights than"),
        (tmp_path / "run", base, changed(TUNING, lr=0.5), "holds a run with epochs 1 .*lr 0.001 .now 0.5."),
        (tmp_path / "other", base, changed(TUNING, self_blend=True), "--self-blend: not in fine-tuning"),
    ):
        with pytest.raises(UsageError, match=text):
            begin(out, source, recipe)
    with pytest.raises(UsageError, match="holds a run of dtn-fast finetune"):
        start_run(tmp_path / "run", changed(TUNING, epochs=1), SMALL)
    with pytest.raises(UsageError, match=r"trained on /new --replay /old .*, these are /new "):
        list(finetune(tmp_path / "run", new))
    with pytest.raises(UsageError, match="--replay: only of a run of dtn-fast finetune"):
        open_training_crops(base, tmp_path, [tmp_path], BASE)
    assert content() == before


def test_the_calibration_of_the_source_is_its_own(
    trained: Path, crops: Path, dataset: CropDataset, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "run"
    shutil.copytree(trained / "generation-0", source)
    list(calibrate(source, crops))
    tuned(source, out, dataset, changed(TUNING, epochs=1))
    cards = [load_model(path).config.card for path in (source, out / TEACHER, out)]
    assert [card is not None and card.calibration is not None for card in cards] == [True, True, False]
    assert load_model(out).novelty is None
    *_, compared = measure(out, dataset, "cpu")
    assert isinstance(compared, Comparison)
    assert any("run dtn-fast calibrate again" in note for note in compared.notes)


def test_the_recipe_begins_with_that_of_the_source(base: Path, tmp_path: Path) -> None:
    for source in (base, base / "generation-0"):
        recipe = recipe_from(source)
        assert (recipe.augment, recipe.batch_size, recipe.kd_on) == ("none", BASE.batch_size, "right")
        assert recipe.lr < BASE.lr
    assert recipe_from(tmp_path) == for_finetuning(Recipe())


def test_without_old_data_forgetting_is_not_measured(
    base: Path, crops: Path, trained: Path, dataset: CropDataset, tmp_path: Path
) -> None:
    teacher = load_model(trained)
    with pytest.warns(DtnWarning, match="forgetting is not measured: no old data were named by --replay"):
        alone = open_both(trained, teacher, crops, (), changed(TUNING, methods=("SynthWarp",)))
    assert {v.method for v in alone.videos_of("train")} == {"real", "SynthWarp"}
    (epoch,) = tuned(trained, tmp_path, alone, changed(TUNING, epochs=1, methods=("SynthWarp",)))
    assert not epoch.val_aucs
    assert "kd" in epoch.losses
    *_, made = measure(tmp_path, alone, "cpu")
    assert isinstance(made, Comparison)
    assert {row.data for row in made.rows} == {NEW}
    assert "forgetting is not measured" in (tmp_path / f"{COMPARISON}.md").read_text()
    teacher.config = dataclasses.replace(teacher.config, image_size=128)
    with pytest.raises(UsageError, match="takes 128 pixels, the crops have 64"):
        open_both(trained, teacher, crops, (), TUNING)
