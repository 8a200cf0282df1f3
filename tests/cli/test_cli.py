"""The command line as a user types it: every verb, its help, its exit code."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data
from small import RECIPE, SMALL, changed
from torch.distributed.run import get_args_parser

from dtn_fast import DTN, DTNConfig
from dtn_fast.cli import main as cli
from dtn_fast.detect import batch
from dtn_fast.runtime.load import load_model
from dtn_fast.train.config import for_finetuning


def dtn_fast(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["dtn-fast", *map(str, words)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capfd.readouterr()
    code = stop.value.code
    return (code if isinstance(code, int) else 0), out, err


@pytest.fixture
def run(capfd, monkeypatch):
    return lambda *words: dtn_fast(capfd, monkeypatch, *words)


def test_help_names_every_verb_and_shows_examples_that_parse(run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for verb in cli.VERBS:
        assert verb in out
        code, text, _ = run(verb, "--help")
        assert code == 0
        plain = " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())
        example = re.search(r"Example: dtn-fast (.*?)(?= Prints| options| positional|$)", plain)
        assert example, f"{verb} shows no example"
        flags = [w for w in shlex.split(example[1]) if w.startswith("--")]
        assert all(flag in text.replace(example[0], "") for flag in flags), (verb, flags)


def test_the_earlier_spelling_of_people_still_works() -> None:
    for given, read in (
        ("prepare x --faces all", "prepare x --people all"),
        ("prepare x --faces=largest --out y", "prepare x --people one --out y"),
        ("prepare x --faces yunet --faces all", "prepare x --faces yunet --people all"),
        ("detect x --faces=yunet --out=y", "detect x --faces yunet --out=y"),
    ):
        assert cli.renamed(given.split()) == read.split()


def test_distill_starts_from_the_recipe_of_its_run(trained: Path) -> None:
    """Options change it; the last --run counts, as it does for the verb."""
    words = ["distill", "crops", "--run", "none", f"--run={trained}", "--temperature", "4", "--epochs", "9"]
    call = cli._parsed(words)
    assert isinstance(call, functools.partial)
    assert call.keywords["recipe"] == changed(RECIPE, temperature=4.0, epochs=9)
    assert call.keywords["run"] == trained


def test_finetune_starts_from_the_recipe_of_its_run_wherever_it_stands(trained: Path, tmp_path: Path) -> None:
    wanted = for_finetuning(RECIPE)
    for source in (trained, trained / "generation-0"):
        for words in (
            ["finetune", str(source), "crops", "--epochs", "9"],
            ["finetune", "--epochs", "9", "--out", str(tmp_path), str(source), "crops"],
        ):
            call = cli._parsed(words)
            assert isinstance(call, functools.partial)
            assert call.keywords["recipe"] == changed(wanted, epochs=9)
            assert call.keywords["run"] == source


@pytest.mark.parametrize("verb", ["train", "distill", "finetune", "ablate"])
def test_torchrun_takes_the_command_shown(verb: str) -> None:
    """It takes the start of one of its own options, such as --run, for its own."""
    (line,) = re.findall(r"On 8 GPUs: torchrun (.*)", cli.VERBS[verb].__doc__ or "")
    given = get_args_parser().parse_args(shlex.split(line))
    assert (given.module, given.nproc_per_node, given.training_script) == (True, "8", "dtn_fast")
    assert given.training_script_args[0] == verb
    assert cli._parsed(given.training_script_args) is not None


def test_usage_errors_exit_2(run, tmp_path: Path) -> None:
    for words, word in (
        (["fly"], "fly"),
        (["detect", "x.png"], "--model"),
        (["detect", "x.png", "--model", tmp_path / "none"], "no such checkpoint"),
        (["export", tmp_path, "--out", "x.pt"], "must end in .onnx, .mnn"),
        (["train", tmp_path, "--out", tmp_path / "r"], "dtn-fast prepare"),
        (["prepare", tmp_path, "--out", tmp_path / "c"], "is it the FF++ root"),
        (["train", tmp_path, "--out", tmp_path / "r", "--epochs", "0"], "--epochs 0: must be at least 1"),
    ):
        code, out, err = run(*words)
        assert code == 2, words
        assert word in out + err
        if err.startswith("dtn-fast: error"):
            assert err.count("\n") == 1


def test_the_whole_path(run, video_set: Path, tmp_path: Path) -> None:
    """prepare, train, resume, distill, evaluate, export, detect with the checkpoint and with the ONNX file."""
    (tmp_path / "small.json").write_text(SMALL.to_json())
    crops, training, onnx = tmp_path / "crops", tmp_path / "run", tmp_path / "m.onnx"
    code, _, err = run("prepare", video_set, "--out", crops, "--preset", "tiny", "--frames", "2")
    assert code == 0, err
    (tmp_path / "tiny.json").write_text(SMALL.to_json().replace('"image_size": 64', '"image_size": 128'))
    flags = [
        "--config",
        tmp_path / "tiny.json",
        "--epochs",
        "1",
        "--lr",
        "1e-3",
        "--generations",
        "1",
        "--batch-size",
        "8",
    ]
    for _ in range(2):
        code, out, err = run("train", crops, "--out", training, *flags)
        assert code == 0, err
    assert "generation-0" in out
    code, out, _ = run("distill", crops, "--run", training)
    assert code == 0
    assert "student 1" in out
    code, out, _ = run("evaluate", crops, "--model", training, "--out", tmp_path / "test")
    assert code == 0
    assert "SynthWarp" in out
    assert "no claim about real deepfakes" in out
    assert json.loads((tmp_path / "test.json").read_text())["rows"][0]["fakes"] == "all"
    assert (tmp_path / "test.md").read_text().startswith("| fakes")
    written = next(line for line in out.splitlines() if line.startswith("written: ")).split()[1:]
    assert written == [str(tmp_path / name) for name in ("test.json", "test.md", "test.tex", "commands.jsonl")]
    (first, second), *_ = json.loads((video_set / "splits/test.json").read_text())
    (tmp_path / "groups.csv").write_text(f"identity,gender\n{first},man\n{second},woman\n")
    groups = "--groups", tmp_path / "groups.csv", "--group-size", "1", "--families", "SynthWarp=other"
    code, out, err = run("evaluate", crops, "--model", training, *groups, "--out", tmp_path / "test")
    assert code == 0, err
    assert "family other" in out
    assert "By group; rates in percent" in out
    assert re.search(r"^Widest gap in AUC: gender, |^No gap in AUC: ", out, re.MULTILINE)
    assert (tmp_path / "test.svg").is_file()
    code, out, _ = run("export", training, "--out", onnx)
    assert code == 0
    assert "largest error" in out
    Image.fromarray(data.astronaut()).save(tmp_path / "face.png")
    scores = []
    for model in (training, onnx):
        inputs = tmp_path / "face.png", video_set / "original_sequences"
        code, out, err = run("detect", *inputs, "--model", model, "--out", tmp_path / "out", "--frames", "2")
        assert code == 0, err
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert len(results["results"]) == 9
        scores.append([r["score"] for r in results["results"]])
        assert "synthetic" in (tmp_path / "out" / "report.html").read_text()
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_deployment_from_the_command_line(run, trained: Path, crops: Path, video_set: Path, tmp_path: Path) -> None:
    """export in every form, inspect, verify, repository, detect with each file that this machine runs."""
    file = lambda name: tmp_path / name
    quantized = ["--linears", "int8", "--calibrate", crops, "--images", "8", "--max-auc-drop", "1"]
    for name, words, said in (
        ("m.onnx", [], "largest error"),
        ("m.mnn", [], "MNN against torch"),
        ("m.rtx", ["--batches", "1", "2", "4"], "compute capability 7.5, 8.0, 8.6, 8.9, 12.0, attention native"),
        ("q.onnx", [*quantized, "--convs", "int8", "--target", "cpu", "--sensitivity"], "most sensitive first"),
        ("q.rtx", [*quantized, "--archs", "89"], "validation split, 30 crops: frame AUC"),
    ):
        code, out, err = run("export", trained, "--out", file(name), *words)
        assert code == 0, err
        assert said in out
    words = [*quantized, "--sensitivity", "--max-logit-change", "0"]
    code, out, err = run("export", trained, "--out", file("x.onnx"), *words)
    assert (code, file("x.onnx").exists()) == (1, False)
    assert "find the worst layers by --sensitivity" in err
    assert "most sensitive first" in out, "the table is shown when the model is refused"
    code, out, _ = run("export", file("m.onnx"), "--out", file("again.rtx"), "--archs", "86", "120")
    assert (code, "8.6, 12.0" in out) == (0, True)
    code, out, _ = run("inspect", file("q.rtx"))
    assert code == 0
    assert "linears int8" in out
    assert "fp16" in out
    code, out, _ = run("verify", trained, file("m.onnx"), "--data", crops, "--layers")
    assert code == 0
    assert "the same verdict on 30 of 30" in out
    assert "blocks.0.qkv" in out
    code, out, err = run("verify", file("m.mnn"), file("q.onnx"), "--tolerance", "1e-9", "--images", "4")
    assert code == 1
    assert "over --tolerance 1e-09" in err
    code, out, _ = run("repository", file("m.onnx"), "--out", file("models"))
    assert (code, out.count("config.pbtxt")) == (0, 3)
    scores = {}
    video = next((video_set / "original_sequences").rglob("*.mp4"))
    for model in (trained, file("m.mnn"), file("q.onnx")):
        code, out, err = run("detect", video, "--model", model, "--out", file("out"), "--annotate", "--rate", "100")
        assert code == 0, err
        assert "frames/s; work: decoding" in out
        assert file("out/001-" + video.name).is_file()
        scores[model.name] = json.loads(file("out/results.json").read_text())["results"][0]["score"]
    assert scores["m.mnn"] == pytest.approx(scores[trained.name], abs=1e-4)
    assert scores["q.onnx"] == pytest.approx(scores[trained.name], abs=1e-2)
    for words, said in (
        (["export", file("m.onnx"), "--out", file("x.onnx")], "an .onnx file becomes an engine only"),
        (["export", file("no.onnx"), "--out", file("x.rtx")], "no such file"),
        (["export", file("m.onnx"), "--out", file("x.rtx"), *quantized], "quantise when the .onnx file is written"),
        (["export", trained, "--out", file("x.mnn"), *quantized], "MNN files are float32"),
        (["export", trained, "--out", file("x.onnx"), "--convs", "fp8"], "name real crops to calibrate with"),
        (["export", file("q.onnx"), "--out", file("x.rtx")], "quantised for CPUs"),
        (["detect", video, "--model", file("m.rtx")], "an engine needs an NVIDIA GPU"),
        (["verify", trained, file("m.mnn"), "--layers"], "MNN shows no layers"),
        (["repository", file("m.mnn"), "--out", file("x")], "the server takes .onnx and .engine"),
        (["detect", video, "--model", trained, "--rate", "-1"], "--rate -1.0: must"),
        (["serve", trained, "--port", "99999"], "--port 99999"),
    ):
        code, _, err = run(*words)
        assert code == 2, words
        assert said in err, words
    assert not list(tmp_path.glob("x*"))


def test_a_model_is_fine_tuned(run, trained: Path, crops: Path, tmp_path: Path) -> None:
    """By one command, with the result beside the run; a second command goes on, and other verbs take the new run."""
    words = ["--epochs", "1", "--batch-size", "8", "--augment", "none"]
    methods = ["SynthBlend", "SynthSwap", "SynthResample"]
    (tmp_path / "small.json").write_text(SMALL.to_json())
    base, tuned = tmp_path / "run", tmp_path / "run-finetuned"
    train = ["train", crops, "--out", base, "--config", tmp_path / "small.json", *words, "--methods", *methods]
    assert run(*train)[0] == 0
    command = ["finetune", base, crops, *words, "--methods", "SynthWarp", "--replay", crops]
    for _ in range(2):
        code, out, err = run(*command)
        assert code == 0, err
        assert re.search(r"│ new +│ all +│ 0", out)
        assert re.search(r"│ old +│ SynthSwap +│ 0", out)
        assert f"best weights in {tuned / 'generation-0'}" in out
    assert {"finetune.json", "finetune.md", "report.html", "commands.jsonl"} <= {p.name for p in tuned.iterdir()}
    assert run("evaluate", crops, "--model", tuned)[0] == 0
    code, _, err = run("distill", crops, "--run", tuned, "--replay", crops, "--generations", "1")
    assert code == 0, err
    for given, said in (
        (["distill", crops, "--run", tuned, "--generations", "1"], "name the same crops, or a new --out"),
        (["distill", crops, "--run", base, "--replay", crops], "--replay: only of a run of dtn-fast finetune"),
        (["finetune", tmp_path / "no", crops], "no such checkpoint"),
        (["finetune", base, tmp_path / "no", "--out", tmp_path / "x"], "no prepared crops there"),
        (["finetune", base, crops, "--replay", crops, "--out", tmp_path / "x"], "name the new forgeries by --methods"),
        (["finetune", base, crops, "--replay-share", "1", "--out", tmp_path / "x"], "--replay-share 1"),
        ([*command, "--out", base], "is the model to begin with"),
        ([*command, "--lr", "0.5"], "lr 2e-05 (now 0.5)"),
    ):
        code, _, err = run(*given)
        assert code == 2, given
        assert said in err, (given, err)
    assert not (tmp_path / "x").exists()


def test_a_timm_model_takes_crops_of_any_size_or_names_its_own(run, crops: Path, tmp_path: Path) -> None:
    words = ["--epochs", "1", "--batch-size", "8", "--augment", "none", "--timm"]
    code, _, err = run("train", crops, "--out", tmp_path / "a", *words, "test_resnet")
    assert code == 0, err
    assert load_model(tmp_path / "a").config.image_size == SMALL.image_size
    code, _, err = run("train", crops, "--out", tmp_path / "b", *words, "efficientformer_l1")
    assert code == 2
    assert re.fullmatch(r"dtn-fast: error: efficientformer_l1: .* prepare the crops with --size 224\n", err)
    assert not (tmp_path / "b" / "generation-0").exists()


def test_the_papers_experiments_from_the_command_line(run, trained: Path, crops: Path, tmp_path: Path) -> None:
    """Tables 1 and 2, an ablation, the pictures and the page of all of it, on the miniature set."""
    (tmp_path / "small.json").write_text(SMALL.to_json())
    other = tmp_path / "one"
    words = ["--config", tmp_path / "small.json", "--epochs", "1", "--batch-size", "8", "--methods", "SynthSwap"]
    assert run("train", crops, "--out", other, *words)[0] == 0
    table = tmp_path / "tables" / "table1"
    code, out, err = run("evaluate", crops, crops, "--model", trained, other, "--out", table, "--data-names", "FF++",
                         "DFD", "--model-names", "first", "second")  # fmt: skip
    assert code == 0, err
    assert "99.70" in out  # the paper's DTN, beside ours
    assert {path.suffix for path in table.parent.glob("table1.*")} == {".json", ".md", ".tex", ".svg"}
    code, out, err = run("evaluate", crops, "--model", other, other, "--protocol", "cross-manipulation", "--out",
                         tmp_path / "tables" / "table2", "--trained-on", "Deepfakes", "SynthSwap")  # fmt: skip
    assert code == 0, err
    text = (tmp_path / "tables" / "table2.md").read_text()
    assert "| one | DF |" in text.replace(str(other), "one")
    assert "the paper's values" not in text  # it tests on none of these forgeries
    code, out, err = run("evaluate", crops, "--model", other, "--protocol", "cross-manipulation")
    assert code == 0, err
    assert re.search(r"│ one +│ SynthSwap +│", out)  # what its run says
    code, out, err = run("evaluate", crops, "--model", trained, "--out", tmp_path / "tables" / "one", "--data-names",
                         "FF++")  # fmt: skip
    assert code == 0, err
    assert r"DTN$^{\ast}$ & 97.13 & 99.70" in (tmp_path / "tables" / "one.tex").read_text()
    ablation = ["ablate", "moe", "--data", crops, "--test-names", "DFD", "--out", tmp_path / "ablations", "--preset",
                "tiny", "--epochs", "1", "--batch-size", "16", "--config", tmp_path / "small.json"]  # fmt: skip
    code, out, err = run(*ablation, "--only", "Ours")
    assert code == 0, err
    assert "1 of 1: Ours, generation 0, epoch 1" in out
    code, out, err = run(*ablation)
    assert code == 0, err
    assert "[90.58]" in out
    assert (tmp_path / "ablations" / "moe.svg").is_file()
    code, out, err = run("explain", crops, "--models", trained, other, "--out", tmp_path / "pictures", "--count", "20")
    assert code == 0, err
    assert "t-sne.svg" in out
    assert "heat-scores" not in out
    words = ["--kinds", "heat-scores", "--depths", "head", "--out", tmp_path / "scores"]
    code, out, err = run("explain", crops, "--models", trained, *words)
    assert code == 0, err
    for said in (f"Grad-CAM of {trained.name} against the masks of {crops.name}, all fakes", "chance: Gaussian"):
        assert said in out
    assert (tmp_path / "scores" / "heat-scores.svg").is_file()
    words = ["--kinds", "feature-maps", "--data-names", "FF++", "DFD", "--out", tmp_path / "figure9"]
    code, out, err = run("explain", crops, crops, "--models", trained, *words)
    assert code == 0, err
    assert "feature-maps.png" in out
    code, out, err = run("report", trained, other, tmp_path / "tables", tmp_path / "pictures", tmp_path / "ablations",
                         "--out", tmp_path / "report.html")  # fmt: skip
    assert code == 0, err
    text = (tmp_path / "report.html").read_text()
    assert "dtn-fast evaluate" in text
    assert "dtn-fast train" in text
    assert "made by <code>dtn-fast ablate moe" in text
    code, out, err = run("evaluate", crops, crops, "--model", trained, "--data-names", "FF++", "DFD", "--self-blend",
                         "--out", table)  # fmt: skip
    assert code == 0, err
    text = table.with_name("table1.md").read_text()
    assert "FF++, self-blended AUC" in text
    assert "99.70" not in text  # the paper measured no such set
    big = tmp_path / "big"
    DTN(DTNConfig.preset("tiny")).save_pretrained(big)
    for words, said in (
        (["evaluate", crops, crops, "--model", trained], "each must be named once"),
        (["evaluate", crops, crops, "--model", trained, "--protocol", "within"], "takes one dataset and one model"),
        (
            ["evaluate", crops, "--model", trained, "--protocol", "cross-manipulation"],
            "give one forgery for each model by --trained-on",
        ),
        (["evaluate", crops, "--model", trained, "--trained-on", "DF"], "only for --protocol cross-manipulation"),
        (["evaluate", crops, "--model", trained, other, "--out", "."], "--out .: a folder; name the files in it"),
        (["evaluate", crops, "--model", trained, big], "takes 128 pixels, the crops have 64"),
        (["explain", crops, "--models", tmp_path / "small.json"], "give a training run or a checkpoint folder"),
        (["explain", crops, crops, "--models", trained], "--data-names: "),
        (["explain", "--models", trained], "name at least one dataset"),
        (["explain", crops, "--models", trained, "--depths", "head", "head"], "--depths head head: name at least one"),
        (["robustness", crops, "--models", trained, "--levels", "1", "1"], "each once"),
        (["ablate", "nothing", "--data", crops, "--preset", "tiny"], "unknown ablation 'nothing'"),
        (["explain", crops, "--models", trained, "--kinds", "portrait", "--out", tmp_path / "p"], "unknown figure"),
        (["report", tmp_path / "none"], "no such folder"),
        (["verify", trained, trained, "--provider", "cuda"], "--provider cuda: not for"),
    ):
        code, out, err = run(*words)
        assert code == 2, words
        assert said in err, (words, err)


def test_batch_jobs_go_on_and_exit_1(run, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(data.astronaut()).save(folder / "face.png")
    Image.fromarray(np.zeros((99, 33, 3), np.uint8)).save(folder / "blank.png")
    (folder / "broken.jpg").write_bytes((folder / "face.png").read_bytes()[:500])
    (folder / "text.mp4").write_text("hello")
    code, out, err = run("detect", folder, tmp_path / "gone.png", "--model", trained, "--out", tmp_path / "out")
    assert code == 1
    assert err.count("dtn-fast: ") == 4
    assert all(name in err for name in ("blank.png", "broken.jpg", "text.mp4", "gone.png"))
    verdicts = {
        Path(r["path"]).name: r["verdict"]
        for r in json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    }
    assert verdicts["face.png"] in ("real", "fake")
    assert (verdicts["blank.png"], verdicts["broken.jpg"], verdicts["text.mp4"]) == ("no face", "failed", "failed")
    assert "report:" in out


def test_checkpoint_of_another_preset_is_named(run, trained: Path, tmp_path: Path) -> None:
    import shutil

    from dtn_fast import DTNConfig

    shutil.copytree(trained / "generation-0", tmp_path / "mixed")
    (tmp_path / "mixed" / "config.json").write_text(DTNConfig.preset("paper").to_json())
    code, _, err = run("detect", "x.png", "--model", tmp_path / "mixed")
    assert code == 2
    assert "another preset" in err


def test_corrupt_and_bench(run, video_set: Path, tmp_path: Path) -> None:
    Image.fromarray(data.astronaut()).save(tmp_path / "face.png")
    code, _, err = run(
        "corrupt", tmp_path / "face.png", "--out", tmp_path / "o" / "grey.png", "--kind", "saturation", "--level", 5
    )
    assert code == 0, err
    grey = np.asarray(Image.open(tmp_path / "o" / "grey.png")).astype(int)
    assert np.abs(grey - grey[..., :1]).max() <= 2
    video = next((video_set / "original_sequences").rglob("*.mp4"))
    code, _, err = run("corrupt", video, "--out", tmp_path / "v.mp4", "--kind", "video", "--level", 5)
    assert code == 0, err
    assert (tmp_path / "v.mp4").stat().st_size < video.stat().st_size
    for words, word in (
        (["corrupt", video, "--out", tmp_path / "v.png", "--kind", "blur"], "must end in .mp4"),
        (["corrupt", video, "--out", tmp_path / "v.mp4", "--kind", "fog"], "unknown corruption 'fog'"),
        (["bench", "everything"], "unknown suite 'everything'"),
        (["bench", "compare", tmp_path / "a.json", tmp_path / "b.json"], "a.json: No such file"),
        (["prepare", video_set, "--out", tmp_path / "c", "--share", "5/4"], "--share 5/4"),
        (["prepare", video_set, "--out", tmp_path / "c", "--share", "half"], "i/n was expected"),
        (["prepare", video_set, "--out", tmp_path / "c", "--dataset", "dfd"], "with DFD in it"),
    ):
        code, _, err = run(*words)
        assert code == 2, words
        assert word in err
    code, out, _ = run("prepare", video_set, "--out", tmp_path / "c", "--audit-only")
    assert code == 0
    assert "40 videos: test/SynthBlend 2" in out
    assert not (tmp_path / "c").exists()


def test_full_disk_and_interrupt(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x")

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "doctor", full)
    code, _, err = run("doctor")
    assert (code, err) == (
        1,
        "dtn-fast: error: runs/x: No space left on device; free some space and run the same command again\n",
    )
    monkeypatch.setitem(cli.VERBS, "doctor", interrupted)
    assert run("doctor")[0] == 130


def test_detect_keeps_what_is_finished_when_it_is_ended(
    run, small: DTN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.save_pretrained(tmp_path / "m")
    names = [tmp_path / f"{number:02}.png" for number in range(20)]
    for name in names:
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(name)
    real = batch.detect

    def ended(path: Path, *args: Any, **how: Any) -> Any:
        if path == names[3]:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        return real(path, *args, **how)

    monkeypatch.setattr(batch, "detect", ended)
    code, _, err = run("detect", *names, "--model", tmp_path / "m", "--out", tmp_path / "out", "--jobs", "1")
    assert code == 130
    found = re.search(r"error: interrupted; (\d+) of 20 inputs are done, in ", err)
    assert found, err
    stored = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert len(stored) == int(found[1]) in (2, 3)


def test_a_folder_that_takes_no_file_is_wrong_usage(run, small: DTN, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "m")
    (tmp_path / "file").touch()
    for words in (("detect", tmp_path / "file", "--model", tmp_path / "m", "--out", tmp_path / "file" / "x"),
                  ("export", tmp_path / "m", "--out", tmp_path / "file" / "m.onnx")):  # fmt: skip
        code, _, err = run(*words)
        assert code == 2
        assert "file: cannot be written to" in err or "file/x: cannot be written to" in err


def test_inspect_of_a_run(run, small: DTN, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "m")
    code, out, _ = run("inspect", tmp_path / "m")
    assert code == 0
    assert re.search(r"config.image_size\s+│ 64", out)
    code, _, err = run("inspect", tmp_path / "m", "--batch", "2")
    assert code == 2
    assert "--batch: times the layers of an engine" in err


def test_doctor_and_progress(run) -> None:
    code, out, _ = run("doctor")
    assert code == 0
    assert "training precision" in out
