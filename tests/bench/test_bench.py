"""The benchmarks on tiny sizes: that the ways compared do the same, and what is written. No time is asserted."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_knn import plain_rank

from dino_simpool import bench, cli
from dino_simpool.bench import knn, step
from dino_simpool.config import BenchKnnConfig, to_dict
from dino_simpool.eval.recall import recall_at_k

TINY = BenchKnnConfig(
    width=24, images=90, products=20, bank=300, queries=37, classes=8, k=(3, 20), published_chunks=(4, 100), repetitions=2,
    device="cpu",
)  # fmt: skip


@pytest.mark.parametrize("parts", [1, 4, 37, 100])
def test_the_published_way_is_k_nn(parts: int):
    """All its classes, but for those without votes, against a loop in float64."""
    bank, labels = knn.make_features(TINY.bank, TINY.classes, cfg=TINY, seed=2)
    queries, _ = knn.make_features(TINY.queries, TINY.classes, cfg=TINY, seed=3)
    found = knn.published_knn(bank, labels, queries, k=20, num_classes=TINY.classes, parts=parts).numpy()
    ranks, nearest = plain_rank(bank.numpy(), labels.numpy(), queries.numpy(), ks=(20,), num_classes=TINY.classes)[20]
    assert found.shape == ranks.shape
    for ours, theirs, voters in zip(ranks, found, nearest, strict=True):
        voted = len(set(labels.numpy()[voters]))
        assert np.array_equal(ours[:voted], theirs[:voted])


def test_features_share_their_centers():
    """A nearest center found on one set classifies another; other seeds are other noise."""
    easy = BenchKnnConfig(width=24, classes=8, noise=0.3)
    (x, y), (other, its) = (knn.make_features(200, 8, cfg=easy, seed=seed) for seed in (2, 3))
    assert torch.allclose(x.norm(dim=1), torch.ones(200), atol=1e-6) and not torch.equal(x, other)
    centers = torch.stack([x[y == label].mean(0) for label in range(8)])
    assert ((other @ centers.T).argmax(1) == its).double().mean() > 0.95


def test_ways_take_turns(capsys: pytest.CaptureFixture[str]):
    calls: list[str] = []
    ways = {name: (lambda name=name: calls.append(name) or len(calls)) for name in "ab"}
    seconds, results = bench.interleave(ways, repetitions=3, device=torch.device("cpu"))
    assert calls == list("ababab") and results == {"a": 5, "b": 6}
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert bench.medians({"a": [3.0, 1.0, 2.0], "b": [4.0, 1.0]}) == {"a": 2.0, "b": 2.5}
    assert "round 3 of 3: b" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["knn", "data"])
def test_an_impossible_run_is_refused_at_once_and_leaves_the_last_result(name: str, tmp_path: Path, capsys, monkeypatch):
    (tmp_path / "file.png").touch()
    data = ["--data", str(tmp_path)] if name == "data" else []
    assert cli.main(["bench", name, "--out", str(tmp_path / "file.png"), *data]) == 1
    assert re.search(r"error: cannot write to .*file.*give another --out", capsys.readouterr().err)
    (tmp_path / f"{name}.json").write_text("of the last run")
    monkeypatch.setattr(knn, "measure_recall", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) if name == "knn" else nullcontext():
        assert cli.main(["bench", name, "--out", str(tmp_path), *["--data", "nowhere"][: 2 * (name == "data")]]) == 1
    assert (tmp_path / f"{name}.json").read_text() == "of the last run"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(knn, "peak_memory", lambda cfg: 1.25)  # its process is for the next test
    options = {**to_dict(TINY), "out": str(tmp_path)}
    line = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert cli.main(["bench", "knn", *line]) == 0
    record, printed = json.loads((tmp_path / "knn.json").read_text()), capsys.readouterr().out
    assert record["benchmark"] == "knn" and record["config"] == json.loads(json.dumps(options))
    assert {"device", "cores", "threads", "load", "environment", "versions"} == set(record["machine"])
    comparisons = record["knn"]["comparisons"]
    assert list(comparisons) == [f"{n} chunks, {k}" for n in (4, 100) for k in ("k = 3", "k = 20", "all k")]
    for name, found in comparisons.items():
        assert found["differing_predictions"] == 0 and found["times_as_fast"] > 0 and name in printed
    assert printed.count("identical") == 6 and "peak memory of Recall@k: 1.25 GB" in printed
    assert all(len(times) == 2 and min(times) > 0 for part in ("knn", "recall") for times in record[part]["seconds"].values())
    x, y = knn.make_features(TINY.images, TINY.products, cfg=TINY, seed=1)
    assert record["recall"]["recall"] == {str(k): value for k, value in recall_at_k(x, y, (1, 10, 100)).items()}
    assert record["recall"]["times_the_products"]["bare products"] == 1


def test_differing_predictions_are_counted(monkeypatch: pytest.MonkeyPatch):
    """A published way that is wrong for three queries is found out."""
    published = knn.published_knn

    def wrong(*arguments, **options):
        classes = published(*arguments, **options)
        classes[:3] = classes[:3].roll(1, 1)
        return classes

    monkeypatch.setattr(knn, "published_knn", wrong)
    comparisons = knn.measure_knn(TINY, torch.device("cpu"))["comparisons"]
    assert [found["differing_predictions"] for found in comparisons.values()] == [3, 3, 6] * 2


def test_peak_memory_is_that_of_a_process_with_torch_in_it():
    assert 0.1 < knn.peak_memory(TINY) < 4


def test_impossible_options():
    for options, message in (
        ({"bank": 10, "k": (20,)}, "k is 20: the published code needs at least as many images in the bank"),
        ({"k": ()}, "k is empty"),
        ({"k": (3, 0)}, "k is .*: allowed is 1 to"),
        ({"repetitions": 0}, "repetitions is 0: allowed is 1 to"),
    ):
        with pytest.raises(ValueError, match=message):
            BenchKnnConfig(**options)


def test_peak_memory_is_in_gigabytes_of_ten_to_the_nine(monkeypatch: pytest.MonkeyPatch):
    """From bytes on macOS, from KiB elsewhere."""
    found: list[float] = []
    for platform in ("darwin", "freebsd"):
        monkeypatch.setattr(knn, "sys", SimpleNamespace(platform=platform))
        usage = SimpleNamespace(ru_maxrss=3 * 10**9 if platform == "darwin" else 3 * 10**9 // 1024)
        monkeypatch.setattr(knn.resource, "getrusage", lambda who, usage=usage: usage)
        knn._recall_alone(TINY, SimpleNamespace(put=found.append))
    assert found == pytest.approx([3, 3])


# -- a training step

SMALL = [
    "--model.width", "24", "--model.heads", "2", "--model.depth", "2", "--model.image_size", "32", "--crops.global_size", "32",
    "--crops.local_size", "16", "--crops.num_local", "2", "--head.out_dim", "96", "--head.hidden_dim", "32",
    "--head.bottleneck_dim", "16", "--batch_size", "2", "--repetitions", "2", "--device", "cpu",
]  # fmt: skip


def stepped(tmp_path: Path, *options: str) -> dict:
    assert cli.main(["bench", "step", *SMALL, "--out", str(tmp_path), *options]) == 0
    return json.loads((tmp_path / "step.json").read_text())


@pytest.mark.parametrize(
    "model",
    [
        ("vit_tiny", "--model.gamma", "1.25"),
        ("vit_tiny", "--model.pool", "cls"),
        ("resnet18", "--model.gamma", "2", "--model.depth", "[1, 1]", "--model.heads", "null"),
        ("convnext_atto", "--model.gamma", "2", "--model.depth", "[1, 1]", "--model.heads", "null", "--crops.local_size", "32"),
    ],
    ids=lambda model: "_".join(model[:3]),
)
def test_the_plain_step_computes_the_same(model: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Loss and gradients to 1e-5; every figure of the record follows from its times."""
    record, printed = stepped(tmp_path, "--model.arch", *model), capsys.readouterr().out
    assert record["loss_difference"] < 1e-5 and record["gradient_difference"] < 1e-5
    assert (record["precision"], record["plain_precision"], record["batch_size"]) == ("fp32", "fp32", 2)
    assert (
        record["views"]
        == [[2, 3, 32, 32]] * 2
        + [[2, 3, record["config"]["crops"]["local_size"]] * 1 + [record["config"]["crops"]["local_size"]]] * 2
    )
    for name in ("plain", "ours"):
        found, times = record[name], record["seconds"][name]
        assert found["seconds"] == sum(times) / 2 and len(times) == 2 and found["peak_gib"] is None
        assert found["images_per_second"] == 2 / found["seconds"]
        assert found["tflops_per_second"] == pytest.approx(found["flops"] / found["seconds"] / 1e12)
        share = found["tflops_per_second"] / record["matrix_product_tflops"]
        assert found["share_of_matrix_product"] == pytest.approx(share) and f"{100 * share:.0f} %" in printed
        assert list(record["parts"][name]) == [
            "teacher",
            "student",
            "loss",
            "backward",
            "clipping and optimizer",
            "moving average",
        ]
    ratios = [a / b for a, b in zip(record["seconds"]["plain"], record["seconds"]["ours"], strict=True)]
    assert record["ours"]["times_plain"] == pytest.approx(sum(ratios) / 2) and record["plain"]["times_plain"] == 1


def test_operations_of_a_step_are_those_that_are_counted_by_hand(tmp_path: Path):
    """A ViT without SimPool: its products, three times each for the student, once for the teacher."""
    record = stepped(tmp_path, "--model.arch", "vit_tiny", "--model.pool", "gap")
    width, batch, prototypes = 24, 2, 96

    def forward(size: int, views: int) -> tuple[int, int]:
        """Products of the trunk for all views of a size, those with images as their input apart."""
        tokens = (size // 16) ** 2
        layers = 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width
        return views * batch * 2 * layers, views * batch * 2 * tokens * 3 * 16**2 * width

    def head(views: int) -> int:
        return views * batch * 2 * (width * 32 + 32 * 32 + 32 * 16)

    (global_trunk, global_patches), (local_trunk, local_patches) = forward(32, 2), forward(16, 2)
    logits = 2 * batch * 16 * prototypes  # of one view
    teacher = global_trunk + global_patches + head(2) + 2 * logits
    student = 3 * (global_trunk + local_trunk + head(4)) + 2 * (global_patches + local_patches) + 3 * 4 * logits
    # position embeddings of the local views are resampled by a product, without a gradient of the matrix
    resampled = 2 * 2 * 1 * 4 * width
    assert record["plain"]["flops"] == teacher + student + resampled


def test_a_preset_and_a_difference_that_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record = stepped(tmp_path, "--preset", "h100", "--model.arch", "vit_tiny", "--compile")
    assert (record["precision"], record["plain_precision"]) == ("bf16", "bf16") and record["ours, compiled"]["seconds"] > 0
    assert 1e-6 < record["gradient_difference"] < 0.05
    monkeypatch.setattr(step.PlainLearner, "loss", lambda self, student, teacher, temperature: student.square().mean())
    record = stepped(tmp_path, "--model.arch", "vit_tiny")
    assert record["loss_difference"] > 0.1 and record["gradient_difference"] > 0.1
