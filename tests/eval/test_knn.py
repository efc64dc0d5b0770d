"""Weighted k-NN against the published classifier, hand cases and a plain loop in float64."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.load import load, meta, sub
from PIL import Image
from test_features import TRANSFORM, TinyEncoder, extract, write_images
from torch import Tensor, nn

from dino_simpool.checkpoint import export_encoder
from dino_simpool.config import KnnConfig, ModelConfig
from dino_simpool.data import class_folder
from dino_simpool.eval import balanced_accuracy, knn, per_class, run
from dino_simpool.eval.knn import knn_accuracy, knn_rank, vote_each_k
from dino_simpool.features import chunks
from dino_simpool.features import neighbors as search
from dino_simpool.features.encode import Forward
from dino_simpool.features.neighbors import neighbors
from dino_simpool.files import file_sha256
from dino_simpool.models.encoder import build_encoder


def plain_rank(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, *, ks: tuple[int, ...], num_classes: int):
    """For each k all classes by vote (T, C) and the neighbors (T, k), written as directly as possible."""
    ranks, nearest = {k: [] for k in ks}, {k: [] for k in ks}
    for x in test_x.astype(np.float64):
        similarity = [float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())) for y in train_x.astype(np.float64)]
        order = sorted(range(len(train_x)), key=lambda j: (-similarity[j], j))
        for k in ks:
            votes = [0.0] * num_classes
            for j in order[:k]:
                votes[train_y[j]] += math.exp(similarity[j] / 0.07)
            ranks[k].append(sorted(range(num_classes), key=lambda c: (-votes[c], c)))
            nearest[k].append(order[:k])
    return {k: (np.array(ranks[k]), np.array(nearest[k])) for k in ks}


def signs(rng: np.random.Generator, count: int, width: int = 16) -> np.ndarray:
    """Vectors of +1 and -1, whose cosines are exact multiples of 2 / width: full of ties."""
    return rng.choice([-1.0, 1.0], (count, width)).astype(np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden(dtype: torch.dtype):
    golden = load("open_knn")
    arrays = {name: torch.from_numpy(array) for name, array in sub(golden, "knn/in").items()}
    train_x, test_x = arrays["train_x"].to(dtype), arrays["test_x"].to(dtype)
    ks, classes = meta(golden, "knn")["ks"], meta(golden, "knn")["classes"]
    voted = vote_each_k(train_x, arrays["train_y"], test_x, ks=ks, temperature=0.07, num_classes=classes, top=5)
    for row, bounds in zip(golden["knn/out/table"], golden["knn/diag/table"], strict=True):
        best, votes = voted[int(row[0])]
        hits = (best == arrays["test_y"][:, None]) & (votes > 0)
        assert 100 * hits[:, 0].double().mean().item() == row[2] == row[4]
        # The published top-5 gives places to classes without votes, in the order that its sort happens to leave.
        assert bounds[2] <= round(100 * hits.any(1).double().mean().item(), 9) <= bounds[3]
        ranks = knn_rank(train_x, arrays["train_y"], test_x, k=int(row[0]))
        assert torch.equal(ranks, best)


def test_hand_case():
    """Cosines .90 (class 0), .88 and .87 (class 1): one neighbor says 0, three say 1, 5.380e5 votes against 3.835e5."""
    cosine = torch.tensor([0.90, 0.88, 0.87, -1.0], dtype=torch.float64)
    train_x = 3 * torch.stack([cosine, (1 - cosine**2).sqrt()], 1)
    train_y, test_x = torch.tensor([0, 1, 1, 2]), torch.tensor([[7.0, 0.0]], dtype=torch.float64)
    assert knn_rank(train_x, train_y, test_x, k=1).tolist() == [[0, 1, 2]]
    assert knn_rank(train_x, train_y, test_x, k=3).tolist() == [[1, 0, 2]]
    assert knn_rank(train_x, train_y, test_x, k=3, top=1).tolist() == [[1]]
    _, votes = vote_each_k(train_x, train_y, test_x, ks=(3,), temperature=0.07, num_classes=3, top=5)[3]
    assert votes[0, 0].item() == pytest.approx(5.380e5 / 3.835e5, rel=1e-3)
    assert votes[0, 2].item() == 0


@pytest.mark.parametrize("make", [signs, lambda rng, count: rng.normal(size=(count, 16)).astype(np.float32)])
@pytest.mark.parametrize("num_classes", [1, 3, 7])
@pytest.mark.parametrize("num_test", [1, 7, 499])
def test_equal_to_a_plain_loop(make, num_classes: int, num_test: int):
    rng = np.random.default_rng(num_classes * 1000 + num_test)
    size = 50 if num_test == 499 else 300
    train_x, train_y, test_x = make(rng, size), rng.integers(0, num_classes, size), make(rng, num_test)
    train_x[size // 2 :: 3] = train_x[: len(train_x[size // 2 :: 3])]  # duplicates
    tensors = torch.from_numpy(train_x), torch.from_numpy(train_y), torch.from_numpy(test_x)
    expected = plain_rank(train_x, train_y, test_x, ks=(1, 10, size), num_classes=num_classes)
    for k, (ranks, nearest) in expected.items():
        assert np.array_equal(neighbors(tensors[0], tensors[2], k=k)[1], nearest)
        assert np.array_equal(knn_rank(*tensors, k=k, num_classes=num_classes), ranks[:, :5])


def test_more_neighbors_than_images():
    rng = np.random.default_rng(0)
    train_x, train_y, test_x = (torch.from_numpy(a) for a in (signs(rng, 9), rng.integers(0, 4, 9), signs(rng, 5)))
    with pytest.warns(UserWarning, match="k = 200 is more than the 9 training images"):
        ranks = knn_rank(train_x, train_y, test_x, k=200, num_classes=4)
    assert torch.equal(ranks, knn_rank(train_x, train_y, test_x, k=9, num_classes=4))


@pytest.mark.parametrize("copies", [1, 34, 90])
def test_ties_beyond_the_spare_candidates(copies: int):
    """Groups of equal rows, larger than the candidates looked at: the lowest indices are taken all the same."""
    rng = np.random.default_rng(copies)
    rows = np.tile(rng.normal(size=(300 // copies, 24)).astype(np.float32), (copies, 1))
    test_x = rng.normal(size=(11, 24)).astype(np.float32)
    labels = np.zeros(len(rows), np.int64)
    for k, (_, nearest) in plain_rank(rows, labels, test_x, ks=(3, 50), num_classes=1).items():
        assert np.array_equal(neighbors(torch.from_numpy(rows), torch.from_numpy(test_x), k=k)[1], nearest)


def test_neighbors_hidden_by_rounding():
    """200 rows that float32 products cannot order, in the best order last: found by the search in float64."""
    angle = 0.5 - 1e-8 * torch.arange(200, dtype=torch.float64)
    train = torch.stack([angle.cos(), angle.sin()], 1)
    _, index = neighbors(train, torch.tensor([[1.0, 0.0]], dtype=torch.float64), k=4)
    assert index.tolist() == [[199, 198, 197, 196]]


@pytest.mark.parametrize("max_bytes", [1, 30_000, 1_000_000])
def test_blocks_change_nothing(max_bytes: int, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(150, 24, generator=generator), torch.randn(9, 24, generator=generator)
    train[60:120] = train[:1]  # ties that need the search in float64
    expected = neighbors(train, test, k=20)
    for found_by in (search._search_faiss, search._search_blocked):
        monkeypatch.setattr(search, "_search_faiss", found_by)
        found = neighbors(train, test, k=20, max_bytes=max_bytes)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_working_arrays_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch):
    """No array handed to the searches is larger than max_bytes, with a bank of 30 times that."""
    max_bytes, sizes = 2**19, {"search": 0, "keys": 0}
    train = torch.randn(40_000, 96, generator=torch.Generator().manual_seed(0))
    train[100:] = train[:1]  # so many ties that all three searches run
    plain_search, plain_keys = search._search_faiss, search.keys_of

    def watched_search(queries: Tensor, unit: Tensor, count: int) -> tuple[Tensor, Tensor]:
        sizes["search"] = max(sizes["search"], queries.nbytes, unit.nbytes)
        return plain_search(queries, unit, count)

    def watched_keys(similarity: Tensor, index: Tensor) -> Tensor:
        sizes["keys"] = max(sizes["keys"], similarity.nbytes)
        return plain_keys(similarity, index)

    monkeypatch.setattr(search, "_search_faiss", watched_search)
    monkeypatch.setattr(search, "keys_of", watched_keys)
    _, index = neighbors(train, train[:40] + 0.1, k=10, max_bytes=max_bytes)
    assert 0 < sizes["search"] <= max_bytes < train.nbytes / 25
    assert 0 < sizes["keys"] <= max_bytes
    assert index.shape == (40, 10)


@pytest.mark.parametrize(
    ("count", "row_bytes", "max_bytes", "most"), [(0, 8, 64, None), (1, 8, 1, None), (17, 8, 64, None), (17, 8, 64, 3)]
)
def test_chunks(count: int, row_bytes: int, max_bytes: int, most: int | None):
    parts = list(chunks(count, row_bytes, max_bytes=max_bytes, most=most))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    assert all(1 <= part.stop - part.start <= max(1, min(max_bytes // row_bytes, most or count)) for part in parts)


def test_impossible_input():
    x, y = torch.eye(3), torch.tensor([0, 1, 2])
    for arguments, message in [
        ((x, y, x, {"k": 0}), "k is 0"),
        ((x, y, x, {"k": 1, "temperature": 0.0}), "temperature is 0.0"),
        ((x, y, x, {"k": 1, "num_classes": 2}), "labels are 0 to 2: allowed is 0 to 1"),
        ((x, y - 1, x, {"k": 1}), "labels are -1 to 1"),
        ((x, y[:2], x, {"k": 1}), "3 training features and 2 labels"),
        ((x[:0], y[:0], x, {"k": 1}), "0 training features and 0 labels"),
        ((x, y, x / 0, {"k": 1}), "feature 0 is not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            knn_rank(*arguments[:3], **arguments[3])


def test_zero_vectors_and_small_temperatures():
    train_x, train_y = torch.tensor([[0.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]), torch.tensor([2, 1, 0])
    ranks = knn_rank(train_x, train_y, torch.tensor([[0.0, 1.0], [0.0, 0.0]]), k=1, temperature=1e-4)
    assert ranks.tolist() == [[1, 0, 2], [2, 0, 1]]  # to a zero vector all are equally similar: the first one votes


def accuracy(train: Path, val: Path, encoder: nn.Module | None = None, **settings):
    return knn_accuracy(
        encoder or TinyEncoder(), class_folder(str(train)), class_folder(str(val)), Forward(TRANSFORM, 4, 0), **settings
    )


def test_accuracy_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train = write_images(tmp_path / "train", {"a": 5, "b": 4, "c": 6, "d": 1, "e": 3, "f": 2}, seed=1)
    val = write_images(tmp_path / "val", {"b": 3, "e": 2, "f": 1}, seed=2)
    sets = class_folder(str(train)), class_folder(str(val))
    features = [extract(images).numpy() for images in sets]
    truth = np.array([1, 1, 1, 4, 4, 5])  # classes are numbered by the train folders, though val lacks some
    assert accuracy(train, val, ks=(30,)).percent == {"30": accuracy(train, val, ks=(21,)).percent["21"]}
    assert capsys.readouterr().err.count("warning: k = 30 is more than the 21 training images") == 1
    result = accuracy(train, val, ks=(1, 7))
    found = result.percent
    assert list(found) == ["1", "7"]
    for k, (ranks, nearest) in plain_rank(features[0], sets[0].labels, features[1], ks=(1, 7), num_classes=6).items():
        voted = [set(sets[0].labels[row]) for row in nearest]
        top5 = [t in r[:5] and t in v for t, r, v in zip(truth, ranks, voted, strict=True)]
        assert found[str(k)]["top1"] == pytest.approx(100 * (ranks[:, 0] == truth).mean(), abs=1e-9)
        assert found[str(k)]["top5"] == pytest.approx(100 * np.mean(top5), abs=1e-9)
        right = [ranks[truth == label, 0] == label for label in (1, 4, 5)]
        shares = [100 * hits.sum().item() / len(hits) for hits in right]
        assert found[str(k)]["balanced"] == pytest.approx(np.mean(shares), abs=1e-9)
        if k == 1:  # the classes are of the first k
            tops = {name: each["top1"] for name, each in result.per_class.items()}
            assert tops == {"a": None, "b": shares[0], "c": None, "d": None, "e": shares[1], "f": shares[2]}
            assert [each["images"] for each in result.per_class.values()] == [0, 3, 0, 0, 2, 1]
            assert result.per_class["e"]["correct"] == right[1].sum()
    assert found["1"]["top1"] == found["1"]["top5"]  # one neighbor votes for one class: the other places are nobody's


def write_colors(root: Path, folders: dict[str, str]) -> Path:
    """An image of one color for each letter in a class folder: r, g, or x for a file that is no image."""
    for name, letters in folders.items():
        (root / name).mkdir(parents=True)
        for number, letter in enumerate(letters):
            path = root / name / f"{number}.png"
            Image.new("RGB", (8, 8), {"r": "red", "g": "lime", "x": "black"}[letter]).save(path)
            if letter == "x":
                path.write_bytes(b"no image")
    return root


def test_broken_images_are_left_out_of_their_own_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Bank without 0 and 1, queries without 3: of the four left the two red ones of a and one of b are right, b's red one not.

    Were the numbers of one set taken for the other, the bank would lose its only green image, or the queries those of a.
    """
    train = write_colors(tmp_path / "train", {"a": "xxr", "b": "g"})
    val = write_colors(tmp_path / "val", {"a": "rr", "b": "gxr"})
    found = accuracy(train, val, encoder=knn.Pixels(8), ks=(1,), skip_broken=True)
    assert found.percent == {"1": {"top1": 75.0, "balanced": 75.0, "top5": 75.0}}
    assert found.per_class["b"] == {"images": 2, "correct": 1, "top1": 50.0}
    assert found.overlap == {"same_folder": False, "equal_files": 4, "val": 4}  # the broken ones do not count
    said = capsys.readouterr().err
    assert "k-NN bank leaves out 2 broken image(s), such as" in said
    assert "k-NN val leaves out 1 broken image(s), such as" in said


@pytest.mark.parametrize("seed", range(4))
def test_shares_of_the_classes_are_those_of_a_loop(seed: int):
    """Of 1 to 30 images in up to 6 classes, some without images, all right, or all wrong."""
    rng = np.random.default_rng(seed)
    for count in (1, 2, 30):
        labels, correct = rng.integers(0, 6, count), rng.random(count) < rng.choice([0, 0.3, 1])
        shares: dict[str, dict[str, float | None]] = {}
        for number, name in enumerate("abcdef"):
            own = [bool(hit) for hit, label in zip(correct, labels, strict=True) if label == number]
            shares[name] = {"images": len(own), "correct": sum(own), "top1": 100 * sum(own) / len(own) if own else None}
        given = torch.from_numpy(correct), torch.from_numpy(labels)
        assert per_class(*given, "abcdef") == shares
        expected = [each["top1"] for each in shares.values() if each["top1"] is not None]
        assert balanced_accuracy(*given) == pytest.approx(math.fsum(expected) / len(expected), abs=1e-12)
    assert balanced_accuracy(torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)) == 0


def test_copies_of_the_bank_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By their bytes, whatever their names and classes; one image of each class is not a copy. `subset_per_class` leaves
    copies out of the bank, and then they do not count."""
    train = write_images(tmp_path / "train", {"a": 3, "b": 2}, seed=1)
    val = write_images(tmp_path / "val", {"a": 1, "b": 1}, seed=2)
    for source, copy in (("a/000", "a/x"), ("a/000", "b/x"), ("a/002", "a/y"), ("b/001", "b/y")):
        shutil.copy(train / f"{source}.png", val / f"{copy}.png")
    common = {"features": "pixels", "image_size": 8, "workers": 0, "k": (1,), "device": "cpu", "data": str(tmp_path)}
    for part, equal in ((None, 4), (2, 3), (1, 2)):
        record = run("knn", knn.evaluate, KnnConfig(out=str(tmp_path / "out"), subset_per_class=part, **common))
        assert record["overlap"] == {"same_folder": False, "equal_files": equal, "val": 6}
        assert f"  warning: {equal} of 6 val images are also in train (same bytes)\n" in capsys.readouterr().out
    record = run("knn", knn.evaluate, KnnConfig(out=str(tmp_path / "out"), val="train", **common))
    assert record["overlap"] == {"same_folder": True, "equal_files": 5, "val": 5}
    assert "warning: train and val are the same folder; 5 of 5 val images are also in train" in capsys.readouterr().out


def test_foreign_class_is_named(tmp_path: Path):
    train = write_images(tmp_path / "train", {"a": 1, "b": 1})
    val = write_images(tmp_path / "val", {"a": 1, "zebra": 1})
    with pytest.raises(ValueError, match=r"class zebra of .*val is not among the 2 classes of .*train"):
        accuracy(train, val)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A run folder with an exported encoder, beside data with train and val."""
    write_images(tmp_path / "data/train", {"a": 3, "b": 4}, seed=1)
    write_images(tmp_path / "data/val", {"a": 2, "b": 1}, seed=2)
    (tmp_path / "run").mkdir()
    config = ModelConfig(arch="vit_tiny", patch_size=4, width=16, heads=2, depth=1, image_size=8, mean=(0.5, 0.5, 0.5))
    export_encoder(tmp_path / "run", build_encoder(config))
    return tmp_path / "run/backbone.safetensors"


def test_results_file(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    data = str(checkpoint.parent.parent / "data")
    config = KnnConfig(checkpoint=str(checkpoint), data=data, k=(2, 3), workers=0, device="cpu", seed=3)
    returned = run("knn", knn.evaluate, config)
    record = json.loads((checkpoint.parent / "results/knn.json").read_text())
    assert record["metrics"] == returned["metrics"]
    assert list(record["metrics"]) == [f"{name}_k{k}" for k in (2, 3) for name in ("top1", "balanced", "top5")]
    assert record["overlap"] == {"same_folder": False, "equal_files": 0, "val": 3} and list(record["per_class"]) == ["a", "b"]
    sets = {part: class_folder(f"{data}/{part}") for part in ("train", "val")}
    assert record["image_digests"] == {part: images.digest() for part, images in sets.items()}
    assert record["evaluator"] == "knn" and record["dataset"] == data and record["split"] == "val" and record["units"] == "%"
    assert record["counts"] == {"train": 7, "val": 3, "classes": 2}
    assert record["config"]["k"] == [2, 3] and record["config"]["temperature"] == 0.07
    assert record["preprocessing"] == {"image_size": 8, "resize": 9, "mean": [0.5] * 3, "std": [0.229, 0.224, 0.225]}
    model = record["model"]
    assert model["width"] == 16 and model["sha256"] == file_sha256(checkpoint) and model["which"] == "teacher"
    assert model["checkpoint"] == str(checkpoint)
    assert {"python", "torch", "torchvision", "timm", "numpy", "faiss", "PIL", "dino_simpool"} == set(record["versions"])
    assert (record["device"], record["dtype"], record["seed"], record["processes"]) == ("cpu", "fp32", 3, 1)
    assert record["seconds"] > 0
    assert f"{record['metrics']['top1_k2']:.2f} %" in capsys.readouterr().out


def test_other_weights_and_pixels_have_their_own_files(checkpoint: Path):
    data, out = str(checkpoint.parent.parent / "data"), checkpoint.parent / "results"
    common = {"data": data, "k": (1,), "workers": 0, "device": "cpu"}
    run("knn", knn.evaluate, KnnConfig(checkpoint=str(checkpoint), which="untrained", **common))
    pixels = run("knn", knn.evaluate, KnnConfig(checkpoint=str(checkpoint), features="pixels", **common))
    assert sorted(path.name for path in out.iterdir()) == ["knn_pixels.json", "knn_untrained.json"]
    plain = run("knn", knn.evaluate, KnnConfig(features="pixels", image_size=8, out=str(out / "plain"), **common))
    assert plain["model"] is None and pixels["model"]["width"] == 16

    sets = class_folder(f"{data}/train"), class_folder(f"{data}/val")
    vectors = [extract(images, encoder=knn.Pixels(8)).numpy() for images in sets]  # ImageNet's normalization, as in `plain`
    ranks, _ = plain_rank(vectors[0], sets[0].labels, vectors[1], ks=(1,), num_classes=2)[1]
    assert plain["metrics"]["top1_k1"] == pytest.approx(100 * (ranks[:, 0] == sets[1].labels).mean())


def test_missing_input_is_named(checkpoint: Path):
    with pytest.raises(ValueError, match="no checkpoint is given"):
        run("knn", knn.evaluate, KnnConfig(data="data"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run("knn", knn.evaluate, KnnConfig(checkpoint="nowhere/last.pth", data="data"))
    with pytest.raises(ValueError, match="no data is given"):
        run("knn", knn.evaluate, KnnConfig(checkpoint=str(checkpoint)))
    with pytest.raises(ValueError, match="give --image_size"):
        run("knn", knn.evaluate, KnnConfig(features="pixels", data="data", out=str(checkpoint.parent / "results")))
    with pytest.raises(ValueError, match="cannot write to"):
        run("knn", knn.evaluate, KnnConfig(checkpoint=str(checkpoint), data="data", out=str(checkpoint)))


def test_command_votes_with_the_temperature_of_its_options(tmp_path: Path):
    """One copy of the image in its class, three similar images in the other: the temperature decides."""
    noise = np.random.default_rng(0)
    pixels = noise.integers(60, 196, (8, 8, 3))
    images = {"train/a/0": 0, "train/b/0": 55, "train/b/1": 55, "train/b/2": 55, "val/a/0": 0}
    for name, spread in images.items():
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        changed = pixels + noise.integers(-spread, spread + 1, pixels.shape)
        Image.fromarray(changed.clip(0, 255).astype(np.uint8)).save(path)
    found = {}
    for temperature in (0.001, 100.0):
        cfg = KnnConfig(
            data=str(tmp_path), features="pixels", image_size=8, resize=8, k=(4,), temperature=temperature, workers=0
        )
        found[temperature] = knn.evaluate(None, cfg)["top1_k4"]
    assert found == {0.001: 100, 100.0: 0}


def test_the_number_of_neighbors_that_is_reported_is_the_papers():
    """The first of them; reports and tables show it."""
    assert KnnConfig().k == (10, 20, 100, 200)
