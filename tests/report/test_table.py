"""The tables: the paper's figures as printed, which of them belongs to a result, and what is said to differ."""

from __future__ import annotations

import copy
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_features import write_images

from dino_simpool import cli
from dino_simpool.checkpoint import export_encoder
from dino_simpool.config import ModelConfig, to_dict
from dino_simpool.models.encoder import build_encoder
from dino_simpool.report import paper
from dino_simpool.report.paper import Key
from dino_simpool.report.table import COLUMNS, Row, find_results, read_result, rows_of

COUNTS = {"train": 1_281_167, "val": 50_000, "classes": 1000}


def result(evaluator: str = "knn", metrics: dict[str, float] | None = None, **changes: Any) -> dict[str, Any]:
    """A record as `eval.run` writes it, of the paper's protocol; changes: `model__gamma=None`, `dataset="sop"`, ..."""
    record: dict[str, Any] = {
        "evaluator": evaluator, "dataset": "imagenet", "split": "val", "metrics": metrics or {"top1_k10": 69.5},
        "counts": COUNTS, "config": {"temperature": 0.07, "epochs": 100, "lr": 1e-3, "preset": "dino_default"},
        "preprocessing": {"image_size": 224, "resize": 256}, "dtype": "fp32", "probe": {"batch_size": 1024},
        "model": to_dict(ModelConfig(gamma=1.25))
        | {"checkpoint": "run/last.pth", "sha256": "0", "which": "teacher", "epochs": 100.0}
        | {"num_images": 1_281_167, "images": "0"},
    }  # fmt: skip
    record = copy.deepcopy(record)
    for name, value in changes.items():
        *groups, last = name.split("__")
        place = record
        for group in groups:
            place = place[group]
        place[last] = value
    return record


def put(run: Path, record: dict[str, Any]) -> Path:
    """A run's folder with this result; its path."""
    path = run / "results" / f"{record['evaluator']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def rows(run: Path, record: dict[str, Any]) -> dict[str, Row]:
    path = put(run, record)
    return {row.metric: row for row in rows_of(read_result(path), path)}


# -- the paper's figures


FINE_GRAINED = {  # CUB200, Cars196, SOP, In-Shop
    (paper.SUPERVISED, "ResNet-50"): "42.7/55.2/67.7 43.0/55.2/67.9; 42.3/54.2/65.7 43.8/56.2/67.4; "
    "48.3/63.2/71.8 48.7/64.1/72.9; 27.6/49.9/56.5 27.0/49.9/56.5",
    (paper.SUPERVISED, "ViT-S"): "55.8/68.3/78.3 56.8/69.6/79.2; 38.2/50.3/61.8 38.9/50.7/63.3; "
    "54.1/69.2/81.6 54.2/69.4/81.9; 30.9/56.5/63.2 32.8/57.6/64.3",
    (paper.SELF, "ResNet-50"): "26.0/36.2/46.9 30.7/40.9/53.3; 34.1/44.2/55.0 33.6/43.6/54.3; "
    "51.2/65.3/76.5 52.1/66.5/77.2; 37.1/58.4/64.1 38.1/60.0/65.6",
    (paper.SELF, "ViT-S"): "56.7/69.4/80.5 61.8/74.4/83.6; 37.5/47.5/58.4 37.6/48.0/58.4; "
    "59.8/74.4/85.4 59.5/73.9/85.0; 40.4/63.9/70.3 41.1/64.3/70.8",
}


def test_fine_grained_figures() -> None:
    ks = {"cub200": (1, 2, 4), "cars196": (1, 2, 4), "sop": (1, 10, 100), "inshop": (1, 10, 20)}
    seen = 0
    for (regime, network), text in FINE_GRAINED.items():
        for (dataset, columns), both in zip(ks.items(), text.split("; "), strict=True):
            for method, values in zip(("baseline", "SimPool"), both.split(), strict=True):
                for k, value in zip(columns, values.split("/"), strict=True):
                    figure = paper.PAPER[Key("C5", network, method, regime, 100, dataset, f"R@{k}")]
                    assert figure == (float(value), "Table C5")
                    seen += 1
    assert seen == sum(key.table == "C5" for key in paper.PAPER)


@pytest.mark.parametrize(
    ("network", "epochs", "knn", "probe"),
    [
        ("ResNet-50", 100, "61.8 63.8", "63.0 64.4"),
        ("ConvNeXt-S", 100, "65.1 68.8", "68.2 72.2"),
        ("ViT-S", 100, "68.9 69.8", "71.5 72.8"),
        ("ViT-S", 300, "72.2 72.6", "74.3 75.0"),
    ],
)
def test_classification_figures(network: str, epochs: int, knn: str, probe: str) -> None:
    for metric, text in (("k-NN", knn), ("probe", probe)):
        for method, value in zip(("baseline", "SimPool"), text.split(), strict=True):
            key = Key("3", network, method, paper.SELF, epochs, "ImageNet-1k", metric)
            assert paper.PAPER[key] == (float(value), "Table C2" if epochs == 300 else "Table 3")


def test_retrieval_figures() -> None:
    text = {"ResNet-50": "27.2/7.9 29.7/8.7 47.3/19.0 51.6/23.0", "ViT-S": "29.4/10.0 32.1/10.6 54.6/26.2 56.5/27.3"}
    places = [(d, m) for d in ("roxford5k", "rparis6k") for m in ("baseline", "SimPool")]
    for network, values in text.items():
        for (dataset, method), both in zip(places, values.split(), strict=True):
            for protocol, value in zip(("medium", "hard"), both.split("/"), strict=True):
                key = Key("C4", network, method, paper.SELF, 100, dataset, protocol)
                assert paper.PAPER[key].value == float(value)


def test_the_number_of_figures() -> None:
    count = {table: sum(key.table == table for key in paper.PAPER) for table in paper.TITLES}
    assert count == {"3": 16, "C4": 16, "C5": 96, "8": 16}
    assert {key.table for key, _ in paper.RELEASE} == {"3"} and all(key in paper.PAPER for key, _ in paper.RELEASE)


# -- which figure belongs to a result


def test_paper_protocol(tmp_path: Path) -> None:
    row = rows(tmp_path, result())["k-NN"]
    assert (row.table, row.network, row.method, row.epochs) == ("3", "ViT-S", "SimPool", "100")
    assert row.figure == (69.8, "Table 3") and row.release == (69.7, paper.README) and row.differences == ()
    found = rows(tmp_path, result("linear", {"best_top1": 72.0, "last_top1": 71.5}))
    assert found["probe"].figure == (72.8, "Table 3") and found["last_top1"].figure is None
    assert found["probe"].differences == () and found["probe"].release is None
    assert rows(tmp_path, result(model__epochs=300.0))["k-NN"].figure == (72.6, "Table C2")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__gamma": None}, "gamma null (paper: 1.25)"),
        ({"model__min_over": "batch"}, "min_over batch (paper: image)"),
        ({"model__num_heads": 2}, "heads of SimPool 2 (paper: 1)"),
        ({"model__which": "student"}, "weights student (paper: teacher)"),
        ({"config__temperature": 0.1}, "temperature 0.1 (paper: 0.07)"),
        ({"preprocessing__resize": 248}, "resize 248 (paper: 256)"),
        ({"preprocessing__image_size": 96}, "image_size 96 (paper: 224)"),
        ({"counts__train": 260_000}, "train: 260,000 (paper: 1,281,167)"),
        ({"config__subset_per_class": 13}, "subset_per_class 13 (paper: null)"),
        ({"dtype": "bf16"}, "precision bf16 (paper: fp32)"),
        ({"config__exif_orientation": True}, "exif_orientation True (paper: False)"),
    ],
)
def test_each_difference_is_said(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    row = rows(tmp_path, result(**changes))["k-NN"]
    assert row.differences == (said,) and row.figure == (69.8, "Table 3")


def test_no_gamma_has_a_figure_of_its_own_in_the_release(tmp_path: Path) -> None:
    assert rows(tmp_path, result(model__gamma=None))["k-NN"].release == (69.8, paper.README)
    cnn = {"model__arch": "convnext_small", "model__pool": "gap", "model__gamma": None}
    row = rows(tmp_path, result(**cnn))["k-NN"]
    assert (row.figure, row.release, row.method) == ((65.1, "Table 3"), (59.3, paper.README), "baseline")


def test_the_release_without_gamma() -> None:
    """The rows of its README with gamma `-` and mode SimPool, 100 epochs: k-NN and linear probe, where the paper's differ."""
    readme = {"ViT-S": (69.8, 72.6), "ResNet-50": (63.7, 64.2), "ConvNeXt-S": (68.8, 72.2)}
    for network, values in readme.items():
        for metric, value in zip(("k-NN", "probe"), values, strict=True):
            key = Key("3", network, paper.SIMPOOL, paper.SELF, 100, "ImageNet-1k", metric)
            assert paper.RELEASE.get((key, False), paper.PAPER[key]).value == value


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__num_images": 260_000}, "images of pre-training 260,000, ImageNet-20 % (paper: 1,281,167)"),
        ({"model__num_images": 1_281_166}, "images of pre-training 1,281,166 (paper: 1,281,167)"),
        ({"model__num_images": None}, "images of pre-training unknown (paper: 1,281,167)"),
        ({"image_digests": {"train": "1"}}, "images of pre-training 1,281,167, but not those of train (their names differ)"),
        ({"image_digests": {"train": "0"}}, ""),
        ({"image_digests": {"train": "1"}, "model__images": None}, ""),
        ({"overlap": {"same_folder": False, "equal_files": 7, "val": 50}}, "7 of 50 val images are also in train (same bytes)"),
    ],
)
def test_the_images_behind_the_weights_are_compared(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    row = rows(tmp_path, result(**changes))["k-NN"]
    assert row.figure == (69.8, "Table 3") and row.differences == ((said,) if said else ())
    assert row.other_images == said.startswith("images of pre-training")


def test_figures_of_other_images_have_a_mark_and_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In text and markdown; in CSV numbers stay numbers. The release of 0.1 knew no number of images: marked too."""
    put(tmp_path / "all", result())
    assert cli.main(["table", str(tmp_path)]) == 0
    assert "*" not in capsys.readouterr().out
    put(tmp_path / "part", result(model__num_images=260_000))
    marked = {}
    for form in ("text", "markdown", "csv"):
        assert cli.main(["table", str(tmp_path), "--format", form]) == 0
        marked[form] = capsys.readouterr().out
    assert "69.50  69.8   -0.30" in marked["text"] and "69.50  69.8*  -0.30" in marked["text"]
    note = "* of weights trained on all of ImageNet-1k; ours were trained on other images, or it is unknown on which"
    assert marked["text"].endswith(f"\n  {note}\n")
    assert "| 69.8 |" in marked["markdown"] and r"| 69.8\* |" in marked["markdown"]
    assert marked["markdown"].endswith(f"\n\n\\{note}\n")
    assert [line["paper"] for line in csv.DictReader(io.StringIO(marked["csv"]))] == ["69.8", "69.8"]


@pytest.mark.parametrize(
    ("epochs", "known", "said"),
    [
        (20, "20", ("epochs of pre-training 20 (paper: 100)",)),
        (100.0, "100", ()),
        (1 / 75, "0.0133", ("epochs of pre-training 0.0133 (paper: 100)",)),
        (400, "400", ("epochs of pre-training 400 (paper: 100)",)),
        (None, "", ("epochs of pre-training unknown (paper: 100)",)),
    ],
)
def test_epochs_come_from_the_run(tmp_path: Path, epochs: Any, known: str, said: tuple[str, ...]) -> None:
    row = rows(tmp_path, result(model__epochs=epochs))["k-NN"]
    assert (row.epochs, row.differences) == (known, said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"counts__classes": 10}, "not ImageNet-1k: 10 classes"),
        ({"model__which": "untrained"}, "untrained weights"),
        ({"config__features": "pixels"}, "raw pixels"),
    ],
)
def test_what_cannot_be_compared_has_no_figure(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    row = rows(tmp_path, result(**changes))["k-NN"]
    assert (row.figure, row.release, row.differences, row.data) == (None, None, (said,), "imagenet")


@pytest.mark.parametrize(
    ("changes", "network", "method"),
    [
        ({"model__depth": 11}, "vit_small (depth 11)", "SimPool"),
        ({"model__arch": "vit_tiny"}, "vit_tiny", "SimPool"),
        ({"model__pool": "gap"}, "ViT-S", "GAP"),
        ({"model__norm_order": "norm_then_pool"}, "ViT-S", "SimPool"),
    ],
)
def test_other_models_have_no_figure(tmp_path: Path, changes: dict[str, Any], network: str, method: str) -> None:
    row = rows(tmp_path, result(**changes))["k-NN"]
    assert (row.network, row.method, row.figure) == (network, method, None)


def test_retrieval_recall_and_grid(tmp_path: Path) -> None:
    counts = {"database": 4_993, "queries": 70, "distractors": 0}
    found = rows(tmp_path, result("retrieval", {"map_medium": 32.0, "mp1_hard": 3.0}, dataset="roxford5k", counts=counts))
    assert found["medium"].figure == (32.1, "Table C4") and found["mp1_hard"].figure is None
    assert found["medium"].differences == ("preset dino_default (the paper is silent)",)
    shrunk = result(
        "retrieval", {"map_hard": 1.0}, dataset="rparis6k", counts=counts, config__image_size=512, whitening={"dimensions": 64}
    )
    assert rows(tmp_path, shrunk)["hard"].differences == (
        "whitening 64 (paper: null)",
        "database: 4,993 (paper: 6,322)",
        "preset dino_default (the paper is silent)",
        "image_size 512 in place of the preset's",
    )
    more = result("retrieval", {"map_hard": 1.0}, dataset="roxford5k", counts=counts, config__distractors="more.npy")
    assert rows(tmp_path, more)["hard"].differences[0] == "distractors more.npy (paper: null)"
    counts = {"queries": 60_502, "classes": 11_316}
    found = rows(tmp_path, result("recall", {"recall_10": 70.0, "map_at_r": 9.0}, dataset="sop", counts=counts))
    assert found["R@10"].figure == (73.9, "Table C5") and found["map_at_r"].figure is None
    assert found["R@10"].differences == ("preset dino_default (the paper is silent)",)
    tied = result("recall", {"recall_10": 70.0}, dataset="sop", counts=counts, config__ties="optimistic")
    assert rows(tmp_path, tied)["R@10"].differences[-1] == "ties optimistic in place of the published"
    supervised = result("recall", {"recall_1": 60.0}, dataset="cub200", model__norm_order="norm_then_pool")
    assert rows(tmp_path, supervised)["R@1"].figure == (56.8, "Table C5")
    grid = rows(tmp_path, result("linear_grid", {"top1": 70.0}))["probe"]
    assert grid.figure == (72.8, "Table 3") and "grid of learning rates" in grid.differences[0]
    probe = rows(tmp_path, result("linear", {"best_top1": 70.0}, config__epochs=10, probe__batch_size=256))["probe"]
    assert probe.differences == ("probe epochs 10 (paper: 100)", "probe batch 256 (paper: 1,024)")


# -- files and output


def test_files_folders_and_runs(tmp_path: Path) -> None:
    for name in ("b", "a"):
        put(tmp_path / "runs" / name, result())
    (tmp_path / "runs" / "a" / "model.json").write_text("{}")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "knn.json").write_text(json.dumps(result()))
    a, b = (tmp_path / "runs" / name / "results" / "knn.json" for name in ("a", "b"))
    assert find_results([str(tmp_path / "runs")]) == [a, b]
    assert find_results([str(b), str(tmp_path / "runs"), str(b.parent)]) == [b, a]
    assert find_results([str(tmp_path / "flat")]) == [tmp_path / "flat" / "knn.json"]
    for place in ("none", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=f"no results in .*{place}"):
            find_results([str(tmp_path / place)])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a result of an evaluator .it is a list, not an object with fields.: leave it out"),
        ('{"arch": "vit_small"}', "it has no evaluator"),
        ('{"evaluator": "knn", "metrics": {"top1": "high"}, "config": {}}', "its top1 is no int or float"),
        ('{"evaluator": "knn", "metrics": {}, "config": {}, "model": {"arch": "vit_small"}}', "it has no model.pool"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=rf"x\.json {'' if said.startswith('is') else '.*'}{said}"):
        read_result(tmp_path / "x.json")


def test_command_in_each_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "one, run", result(model__gamma=None))
    put(tmp_path / "two", result("masks", {"ratio": 1.5}))
    places = [str(tmp_path / "one, run"), str(tmp_path / "two")]
    assert cli.main(["table", *places]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == paper.TITLES["3"] and "\nOther results\n" in text and "1.50" in text
    assert "69.50  69.8   -0.30       69.8     gamma null (paper: 1.25)" in text
    assert cli.main(["table", *places, "--format", "markdown", "--out", str(tmp_path / "table.md")]) == 0
    markdown = (tmp_path / "table.md").read_text()
    assert "| ViT-S | SimPool | 100 | ImageNet-1k | k-NN | 69.50 | 69.8 | -0.30 | 69.8 | gamma null" in markdown
    assert capsys.readouterr().out == ""
    assert cli.main(["table", *places, "--format", "csv"]) == 0
    lines = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert lines[0] == ["table", *COLUMNS] and lines[1][:7] == ["3", "ViT-S", "SimPool", "100", "ImageNet-1k", "k-NN", "69.5"]
    assert lines[2][0] == "Other results" and lines[2][5:7] == ["ratio", "1.5"]
    assert cli.main(["table"]) == 1 and "no results are given" in capsys.readouterr().err
    assert cli.main(["table", str(tmp_path / "missing")]) == 1 and "missing does not exist" in capsys.readouterr().err


def test_results_of_real_evaluators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """k-NN of a tiny encoder, of raw pixels, and the resources of the paper's ViT-S, as their commands write them."""
    torch.manual_seed(0)
    tiny = ModelConfig("resnet18", width=8, depth=(1, 1), stem="small", pool="gap", image_size=16)
    export_encoder(tmp_path, build_encoder(tiny), epochs=1 / 75)  # stopped after one step of many
    for part in ("train", "val"):
        write_images(tmp_path / "data" / part, {"a": 2, "b": 2}, seed=len(part))
    common = ["--checkpoint", str(tmp_path / "backbone.safetensors"), "--data", str(tmp_path / "data"), "--workers", "0"]
    for options in ([], ["--features", "pixels"]):
        assert cli.main(["knn", *common, "--k", "[1, 2]", "--device", "cpu", *options]) == 0
    assert cli.main(["resources", "--recipe", "vit_small_simpool", "--out", str(tmp_path / "results")]) == 0
    capsys.readouterr()
    assert cli.main(["table", str(tmp_path), "--format", "csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["metric"] for line in lines if line["table"] == "8"] == ["params", "macs_thop", "macs_full", "macs_executed"]
    assert {line["epochs"] for line in lines if line["method"] == "baseline"} == {"0.0133"}
    vit = {line["metric"]: line for line in lines if line["network"] == "ViT-S"}
    assert (vit["params"]["paper"], vit["params"]["difference"], vit["params"]["differs"]) == ("22.3", "+0.05", "")
    assert (vit["macs_thop"]["paper"], vit["macs_thop"]["difference"]) == ("4.26", "+0.00")
    knn = [line for line in lines if line["table"] == "3"]
    assert {line["differs"] for line in knn} == {"not ImageNet-1k: 2 classes", "raw pixels; not ImageNet-1k: 2 classes"}
    assert {line["paper"] for line in knn} == {""} and all(float(line["ours"]) >= 0 for line in knn)
