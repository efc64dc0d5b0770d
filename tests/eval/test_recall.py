"""Recall@k, R-precision and MAP@R against hand cases and a plain loop in float64, and the command on miniature data sets."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import BUILDERS
from PIL import Image
from safetensors.torch import load_file
from test_distributed import free_port

from dino_simpool import cli, distributed
from dino_simpool.checkpoint import export_encoder, load_encoder
from dino_simpool.config import ModelConfig, RecallConfig
from dino_simpool.data import EvalTransform
from dino_simpool.eval import recall
from dino_simpool.eval.recall import first_positive, precision_at_r, recall_at_k
from dino_simpool.features import ranking
from dino_simpool.layouts.metric_learning import fine_grained
from dino_simpool.models.encoder import build_encoder

ROOT = Path(__file__).parents[2]


def plain(x, labels, gallery=None, gallery_labels=None, *, ties: str):
    """(rank of the first positive, R-precision, MAP@R) of each query, as directly as possible, in Python's float64."""
    own = gallery is None
    bank, bank_labels = (x, labels) if own else (gallery, gallery_labels)
    results = []
    for i, q in enumerate(x.astype(np.float64)):
        others = [j for j in range(len(bank)) if not (own and j == i)]
        rows = bank[others].astype(np.float64)
        lengths = np.maximum(np.sqrt((rows * rows).sum(1)), 1e-12) * max(math.sqrt((q * q).sum()), 1e-12)
        similarity = np.round((rows * q).sum(1) / lengths * 2**30)
        order = sorted(range(len(others)), key=lambda n: (-similarity[n], others[n]))
        hits = [bank_labels[others[n]] == labels[i] for n in order]
        positives = sum(hits)
        if not positives:
            results.append((0, 0.0, 0.0))
            continue
        first = hits.index(True) + 1
        if ties == "optimistic":
            first = 1 + sum(similarity[n] > similarity[order[first - 1]] for n in order)
        precisions = [sum(hits[: r + 1]) / (r + 1) for r in range(positives) if hits[r]]
        results.append((first, sum(hits[:positives]) / positives, sum(precisions) / positives))
    return tuple(np.array(column) for column in zip(*results, strict=True))


def normal(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.normal(size=(count, 16)).astype(np.float32)


def signs(rng: np.random.Generator, count: int) -> np.ndarray:
    """Vectors of +1 and -1: cosines are multiples of 1/8, full of ties."""
    return rng.choice([-1.0, 1.0], (count, 16)).astype(np.float32)


def with_duplicates(rng: np.random.Generator, count: int) -> np.ndarray:
    x = normal(rng, count)
    x[count // 2 :: 2] = x[: len(x[count // 2 :: 2])] * 3  # the same after normalization
    return x


def constant(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.ones((count, 16), np.float32)


def check(x, labels, gallery=(), *, tile: int | None = None) -> None:
    tensors = torch.from_numpy(x), torch.from_numpy(labels)
    other = dict(zip(("gallery_features", "gallery_labels"), map(torch.from_numpy, gallery), strict=False))
    for ties in ("stable", "optimistic"):
        ranks, r_precision, map_at_r = plain(x, labels, *gallery, ties=ties)
        found = first_positive(*tensors, **other, ties=ties, tile=tile)
        assert found.dtype == torch.int32 and np.array_equal(found.numpy(), ranks)
        expected = {k: 100 * np.mean((ranks > 0) & (ranks <= k)) for k in (1, 2, 5, 1000)}
        assert recall_at_k(*tensors, tuple(expected), **other, ties=ties) == pytest.approx(expected, abs=1e-9)
    both = precision_at_r(*tensors, **other)
    np.testing.assert_allclose(both[0].numpy(), r_precision, atol=1e-12)
    np.testing.assert_allclose(both[1].numpy(), map_at_r, atol=1e-12)


@pytest.mark.parametrize("make", [normal, signs, with_duplicates, constant])
@pytest.mark.parametrize(("count", "num_classes"), [(1, 1), (2, 1), (7, 7), (90, 1), (131, 40), (131, 3)])
def test_own_gallery_equals_a_plain_loop(make, count: int, num_classes: int):
    rng = np.random.default_rng(count + num_classes)
    labels = rng.integers(0, num_classes, count)
    labels[count // 3] = 1000  # alone in its class
    check(make(rng, count), labels, tile=32)


@pytest.mark.parametrize("make", [normal, signs, with_duplicates, constant])
@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 1), (1, 9), (70, 45), (33, 130)])
def test_gallery_equals_a_plain_loop(make, count: int, size: int):
    rng = np.random.default_rng(count * size)
    labels, gallery_labels = rng.integers(0, 12, count), rng.integers(3, 15, size)  # some queries without positives
    gallery = make(rng, size)
    x = make(rng, count)
    x[::3] = gallery[np.arange(len(x[::3])) % size]  # copies of gallery images
    check(x, labels, (gallery, gallery_labels), tile=32)


@pytest.mark.parametrize("tile", [3, 7, 50, 150, None])
def test_tiles_change_nothing(tile: int | None):
    rng = np.random.default_rng(3)
    x, labels = torch.from_numpy(with_duplicates(rng, 151)), torch.from_numpy(rng.integers(0, 20, 151))
    expected = first_positive(x, labels, tile=1000)
    assert torch.equal(first_positive(x, labels, tile=tile), expected)
    other = {"gallery_features": x[40:], "gallery_labels": labels[40:]}
    assert torch.equal(first_positive(x, labels, **other, tile=tile), first_positive(x, labels, **other, tile=1000))


def test_by_hand():
    """On a circle, at these angles: each query's neighbors can be read off."""
    angles = np.deg2rad([0, 10, 25, 100, 131, 170])
    x = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], 1) * np.arange(1, 7)[:, None])
    labels = torch.tensor([0, 1, 0, 1, 1, 2])
    # 0: 10(1) 25(0) -> 2; 10: 0 25 100(1) -> 3; 25: 10(1) 0(0) -> 2; 100: 131(1) -> 1; 131: 100(1) -> 1; 170: alone
    assert first_positive(x, labels).tolist() == [2, 3, 2, 1, 1, 0]
    assert recall_at_k(x, labels, (1, 2, 3, 100)) == pytest.approx({1: 200 / 6, 2: 400 / 6, 3: 500 / 6, 100: 500 / 6})
    # Of the class of three, R = 2: at 10 degrees none of the two nearest; at 100: 131 is, 170 is not; at 131: 100 and not 170.
    r_precision, map_at_r = precision_at_r(x, labels)
    assert r_precision.tolist() == [0, 0, 0, 0.5, 0.5, 0] and map_at_r.tolist() == [0, 0, 0, 0.5, 0.5, 0]
    # With R = 3 and positives at the ranks 1 and 3: R-precision 2/3, MAP@R (1 + 2/3) / 3.
    angles = torch.deg2rad(torch.tensor([1.0, 2, 3, 4, 5]))
    gallery = {
        "gallery_features": torch.stack([angles.cos(), angles.sin()], 1),
        "gallery_labels": torch.tensor([7, 8, 7, 8, 7]),
    }
    r_precision, map_at_r = precision_at_r(torch.tensor([[1.0, 0.0]]), torch.tensor([7]), **gallery)
    assert r_precision.tolist() == [2 / 3] and map_at_r.item() == pytest.approx((1 + 2 / 3) / 3)


def test_a_query_is_left_out_by_its_number_not_as_the_first_hit():
    """Image 1 copies image 0, of another class. Dropping what comes first would keep image 1 for itself: a false hit."""
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0.1, 1]])
    labels = torch.tensor([0, 1, 0, 1])
    ranks = first_positive(x, labels)
    assert ranks.tolist() == [3, 2, 2, 3]  # of 0: image 1, 3, then 2; of 1: 0, 3; of 2: 3, 0, 1; of 3: 2, 0, 1
    assert recall_at_k(x, labels, (1,)) == {1: 0.0}
    assert recall_at_k(x, torch.tensor([0, 0, 1, 1]), (1,)) == {1: 100.0}


def test_ties_by_hand():
    """A negative as similar as the positive: before it if its number is lower, never before it if the rule is optimistic."""
    query, gallery = torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 1], [1, -1], [1, 1], [0, 1]])
    for labels, stable in (([1, 0, 1, 0], 2), ([0, 1, 1, 1], 1), ([1, 1, 0, 0], 3), ([1, 1, 1, 0], 4), ([1, 1, 1, 1], 0)):
        for ties, expected in (("stable", stable), ("optimistic", {4: 4, 0: 0}.get(stable, 1)), (None, None)):
            expected = {4: 4, 0: 0}.get(stable, 1) if ties is None else expected  # with a gallery the default is optimistic
            found = first_positive(
                query, torch.tensor([0]), gallery_features=gallery, gallery_labels=torch.tensor(labels), ties=ties
            )
            assert found.tolist() == [expected]
    assert first_positive(torch.ones(3, 2), torch.tensor([5, 6, 5])).tolist() == [2, 0, 1]  # and without one it is stable


def test_near_ties_that_float32_cannot_order():
    """Negatives nearer by 1e-9 than the positive, and others farther by as much: 40 and 60 of them."""
    angle = 0.5 + 2e-9 * torch.cat([-torch.arange(1, 41), torch.arange(1, 61), torch.zeros(1)]).double()
    gallery, labels = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([1] * 100 + [0])
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for scale in (1.0, 7.5):
        other = {"gallery_features": scale * gallery, "gallery_labels": labels}
        assert first_positive(query, torch.tensor([0]), **other, ties="stable").tolist() == [41]


def test_near_ties_are_settled_in_both_ways(monkeypatch: pytest.MonkeyPatch):
    """A few pairs by themselves, many by a product of all: the same numbers."""
    rng = np.random.default_rng(8)
    x, labels = torch.from_numpy(signs(rng, 120)), torch.from_numpy(rng.integers(0, 30, 120))
    settle, shares = ranking._Counter._settle, []

    def watched(self, near, rows, columns):
        shares.append(float(near.double().mean()))
        settle(self, near, rows, columns)

    monkeypatch.setattr(ranking._Counter, "_settle", watched)
    ties = first_positive(x, labels, tile=40)
    assert max(shares) > 1 / 8
    shares.clear()
    x = torch.from_numpy(normal(rng, 120))
    first_positive(x, labels, tile=40)
    assert 0 < max(shares) <= 1 / 8
    assert np.array_equal(ties.numpy(), plain(signs(np.random.default_rng(8), 120), labels.numpy(), ties="stable")[0])


def test_impossible_input():
    x, y = torch.eye(3), torch.tensor([0, 1, 1])
    for arguments, options, message in [
        ((x, y, ()), {}, "k is empty: give one or more"),
        ((x, y, (1, 0)), {}, "k is 1, 0"),
        ((x, y[:2], (1,)), {}, r"query features \(3, 3\) and 2 labels"),
        ((x[:0], y[:0], (1,)), {}, r"query features \(0, 3\) and 0 labels: give .* at least one"),
        ((x, y, (1,)), {"gallery_features": x}, "a gallery has features and labels"),
        ((x, y, (1,)), {"gallery_features": x[:0], "gallery_labels": y[:0]}, r"gallery features \(0, 3\)"),
        ((x, y, (1,)), {"gallery_features": x[:, :2], "gallery_labels": y}, "have 3 and 2 dimensions"),
        ((x / 0, y, (1,)), {}, "feature 0 is not finite"),
        ((x, y, (1,)), {"ties": "random"}, "ties is random: give stable or optimistic"),
    ]:
        with pytest.raises(ValueError, match=message):
            recall_at_k(*arguments, **options)
    with pytest.raises(ValueError, match="tile is 0: allowed is 1 to"):
        RecallConfig(tile=0)


# -- processes


def share(rank: int, world: int, port: int, results) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.setup("cpu")
    x, labels = torch.from_numpy(signs(np.random.default_rng(1), 61)), torch.arange(61) % 9
    ranks = first_positive(x, labels, tile=16, shared=True)
    results.put((rank, ranks.tolist(), [values.tolist() for values in precision_at_r(x, labels, shared=True)]))
    distributed.cleanup()


def test_processes_share_the_work_and_agree():
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    processes = [context.Process(target=share, args=(rank, 2, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    x, labels = torch.from_numpy(signs(np.random.default_rng(1), 61)), torch.arange(61) % 9
    expected = first_positive(x, labels).tolist(), [values.tolist() for values in precision_at_r(x, labels)]
    assert [(ranks, both) for _, ranks, both in found] == [expected, expected]


# -- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = ModelConfig(arch="vit_tiny", patch_size=4, width=16, heads=2, depth=1, image_size=16, mean=(0.5, 0.5, 0.5))
    export_encoder(folder, build_encoder(config))
    return str(folder / "backbone.safetensors")


EXPECTED = {
    # layout: counts, default ks, ties
    "cub200": ({"queries": 6, "classes": 3, "queries_without_positive": 1}, [1, 2, 4], "stable"),
    "cars196": ({"queries": 6, "classes": 3, "queries_without_positive": 1}, [1, 2, 4], "stable"),
    "sop": ({"queries": 5, "classes": 3, "queries_without_positive": 1}, [1, 10, 100], "stable"),
    "inshop": ({"queries": 3, "gallery": 3, "classes": 2, "queries_without_positive": 0}, [1, 10, 20], "optimistic"),
    "folder": ({"queries": 4, "classes": 2, "queries_without_positive": 0}, [1, 2, 4], "stable"),
}


@pytest.mark.parametrize("layout", EXPECTED)
def test_command(layout: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = BUILDERS[layout](tmp_path / "data")
    common = [
        "recall",
        "--checkpoint",
        checkpoint,
        "--data",
        str(data),
        "--layout",
        layout,
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    assert cli.main([*common, "--out", str(tmp_path / "out")]) == 0
    [file] = (tmp_path / "out").glob("*.json")
    record, printed = json.loads(file.read_text()), capsys.readouterr()
    counts, ks, ties = EXPECTED[layout]
    assert file.name == f"recall_{layout}_dino_eval.json"
    assert (record["counts"], record["k"], record["ties"]) == (counts, ks, ties)
    assert (record["dataset"], record["split"], record["evaluator"]) == (layout, "test", "recall")
    assert record["preprocessing"]["interpolation"] == "bicubic" and record["preprocessing"]["preset"] == "dino_eval"
    assert len(record["count_warnings"]) == len(counts) - 1 if layout != "folder" else not record["count_warnings"]
    assert printed.err.count("expected") == len(record["count_warnings"])
    assert set(record["metrics"]) == {*(f"recall_{k}" for k in ks), "r_precision", "map_at_r"}
    ranks = load_file(file.with_suffix(".safetensors"))["first_positive"]
    assert ranks.dtype == torch.int32 and len(ranks) == counts["queries"]
    assert int((ranks == 0).sum()) == counts["queries_without_positive"]
    for k in ks:
        assert record["metrics"][f"recall_{k}"] == pytest.approx(100 * ((ranks > 0) & (ranks <= k)).double().mean().item())
        assert f"{record['metrics'][f'recall_{k}']:.2f} %" in printed.out
    assert np.array_equal(ranks.numpy(), expected_ranks(layout, data, checkpoint, ties=ties))


def expected_ranks(layout: str, data: Path, checkpoint: str, *, ties: str) -> np.ndarray:
    """What the command must find, image by image."""
    encoder = load_encoder(checkpoint)
    transform = EvalTransform(16, resize=18, mean=(0.5, 0.5, 0.5), std=(0.229, 0.224, 0.225))
    arrays = []
    for images in filter(None, fine_grained(layout, str(data))):
        with torch.no_grad():
            arrays += [np.concatenate([encoder(transform(images.read(i))[None]).numpy() for i in range(len(images))])]
        arrays += [images.labels]
    return plain(*arrays, ties=ties)[0]


def test_command_with_other_options_and_as_a_script(checkpoint: str, tmp_path: Path):
    data = BUILDERS["sop"](tmp_path / "data")
    command = [sys.executable, str(ROOT / "eval/eval_recall.py"), "--checkpoint", checkpoint, "--data", str(data)]
    command += ["--layout", "sop", "--preset", "dml_eval", "--k", "[3]", "--ties", "optimistic", "--map_at_r", "false"]
    command += ["--tile", "2", "--out", str(tmp_path / "out"), "--workers", "0", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out/recall_sop_dml_eval.json").read_text())
    assert list(record["metrics"]) == ["recall_3"] and record["ties"] == "optimistic" and record["k"] == [3]
    assert record["preprocessing"]["interpolation"] == "bilinear"


def test_mistakes_are_one_line(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    common = ["recall", "--checkpoint", checkpoint, "--device", "cpu", "--out", str(tmp_path / "out")]
    for options, message in [
        (["--layout", "cub200"], "no data is given: give --data DIR, the folder that holds the data set"),
        (["--layout", "cub200", "--data", str(tmp_path)], "images.txt is missing"),
        (["--layout", "cub200", "--data", str(tmp_path), "--k", "[0]"], "k is (0,): allowed is 1 to"),
    ]:
        assert cli.main([*common, *options]) == (2 if "--k" in options else 1)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_presets_differ_in_the_interpolation_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (31, 47, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for method, pillow in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        found = EvalTransform(16, resize=20, mean=(0, 0, 0), std=(1, 1, 1), interpolation=method)(image)
        resized = np.asarray(image.resize((20 * 47 // 31, 20), pillow)).astype(np.float32) / 255
        assert np.allclose(found.permute(1, 2, 0).numpy(), resized[2:18, 7:23], atol=1e-6)
    assert set(recall.INTERPOLATIONS) == {"dino_eval", "dml_eval"}
