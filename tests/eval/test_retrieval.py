"""Landmark retrieval against the published metric and multi-scale features, hand cases, plain loops, and from the outside."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from golden.load import GOLDEN_POSITIONS, assert_close, cases, load, meta, sub
from miniatures import LANDMARKS, write_image, write_landmarks
from PIL import Image
from safetensors.torch import load_file
from test_model_golden import load_encoder, tensors, with_options
from torch import Tensor, nn
from torch.nn import functional as F

from dino_simpool import cli, distributed
from dino_simpool.checkpoint import export_encoder
from dino_simpool.config import ConfigError, ModelConfig, RetrievalConfig, parse
from dino_simpool.data import find_images
from dino_simpool.eval.retrieval import (
    PRESETS,
    SCALES,
    MultiScale,
    average_precision,
    evaluate,
    evaluate_ranks,
    rank,
    resolve,
    thumbnail,
)
from dino_simpool.features import whitening
from dino_simpool.features.whitening import Whitening, unit
from dino_simpool.layouts.landmarks import landmarks
from dino_simpool.models.encoder import Encoder, build_encoder

VIT = ModelConfig(arch="vit_tiny", patch_size=4, width=16, heads=2, depth=1, image_size=16)
MEAN, STD = VIT.mean, VIT.std
ROOT = Path(cli.__file__).parents[1]


# -- the metric


@pytest.mark.parametrize("case", cases(load("open_map")))
def test_golden_metric(case: str) -> None:
    golden = load("open_map")
    labels = golden[f"{case}/in/labels"]  # 1 easy, 2 hard, 3 junk
    gnd = [{kind: np.flatnonzero(column == i) for i, kind in enumerate(("easy", "hard", "junk"), 1)} for column in labels.T]
    kappas = meta(golden, case)["kappas"]
    found = evaluate_ranks(golden[f"{case}/in/ranks"], gnd, kappas=kappas)
    for protocol, scores in found.items():
        out = sub(golden, f"{case}/out")
        for ours, name in ((scores.map, "map"), (scores.ap, "aps"), (scores.mp, "mpk"), (scores.precision, "prs")):
            assert_close(ours, out[f"{protocol}_{name}"], rtol=1e-9, atol=0, name=f"{protocol} {name}")


def test_hand_case() -> None:
    """Positives at 0 and 2: (1 + 1) / 4 + (1/2 + 2/3) / 4; the precision at 5 stops at the third rank."""
    assert average_precision([0, 2], 2) == pytest.approx(0.791667, abs=1e-6)
    assert average_precision([0, 2], 4) == pytest.approx(0.791667 / 2, abs=1e-6)
    assert average_precision([], 3) == 0
    assert average_precision([0, 1, 2], 3) == 1
    scores = evaluate_ranks(np.array([[5], [7], [1], [0]]), [{"easy": [5, 1], "hard": [], "junk": []}])
    assert scores["easy"].map == pytest.approx(0.791667, abs=1e-6)
    assert scores["easy"].mp.tolist() == [1, 2 / 3, 2 / 3]
    # With the image between them as junk, they are first and second; as hard it is junk for Easy and positive for Medium.
    scores = evaluate_ranks(np.array([[5], [7], [1], [0]]), [{"easy": [5, 1], "hard": [7], "junk": []}])
    assert (scores["easy"].map, scores["medium"].map, scores["hard"].map) == (1, 1, 1)
    assert math.isnan(evaluate_ranks(np.array([[0]]), [{"easy": [], "hard": [0], "junk": []}])["easy"].map)


def plain_scores(order: list[int], positive: set[int], junk: set[int], kappas: tuple[int, ...]) -> tuple[float, list[float]]:
    """AP and precisions of one query, written as directly as possible."""
    seen = [image in positive for image in order if image not in junk]
    ap, found = 0.0, 0
    for place, hit in enumerate(seen):
        if hit:
            ap += ((found / place if place else 1.0) + (found + 1) / (place + 1)) / (2 * len(positive))
            found += 1
    last = max((place for place, hit in enumerate(seen) if hit), default=-1)
    stops = [min(last + 1, kappa) if last >= 0 else kappa for kappa in kappas]
    return ap, [sum(seen[:stop]) / stop for stop in stops]


@pytest.mark.parametrize("seed", range(12))
def test_equal_to_a_plain_loop(seed: int) -> None:
    """Random features full of ties and duplicates; empty sets, images named twice, and rankings that end early."""
    rng = np.random.default_rng(seed)
    num, count = int(rng.integers(1, 60)), int(rng.integers(1, 6))
    database = torch.from_numpy(rng.choice([-1.0, 1.0], (num, 4))).float() * (1 + torch.arange(num)[:, None] % 3)
    database[num // 2 :: 3] = database[0]
    queries = torch.from_numpy(rng.choice([-1.0, 1.0], (count, 4))).float()
    order = rank(queries, database).numpy()
    for query, row in zip(queries.numpy().astype(np.float64), order, strict=True):
        similarity = [round(float(query @ x / math.sqrt(query @ query * (x @ x))), 9) for x in database.numpy().astype(float)]
        assert row.tolist() == sorted(range(num), key=lambda j: (-similarity[j], j))
    gnd = []
    for _ in range(count):
        label = rng.choice(4, num, p=[0.4, 0.2, 0.2, 0.2]) if rng.random() < 0.7 else np.full(num, rng.integers(0, 4))
        gnd.append({kind: np.flatnonzero(label == i).tolist() for i, kind in enumerate(("easy", "hard", "junk"), 1)})
        gnd[-1]["easy"] += gnd[-1]["easy"][:1]  # named twice
    kept = order.T[: int(rng.integers(1, num + 1))]
    for protocol, scores in evaluate_ranks(torch.from_numpy(np.array(kept)), gnd, kappas=(1, 3, 50)).items():
        expected = []
        for column, entry in zip(kept.T, gnd, strict=True):
            kinds = {name: set(values) for name, values in entry.items()}
            positive, junk = {
                "easy": (kinds["easy"], kinds["junk"] | kinds["hard"]),
                "medium": (kinds["easy"] | kinds["hard"], kinds["junk"]),
                "hard": (kinds["hard"], kinds["junk"] | kinds["easy"]),
            }[protocol]
            ap, precision = (
                plain_scores(column.tolist(), positive, junk, (1, 3, 50)) if positive else (math.nan, [math.nan] * 3)
            )
            expected.append([ap, *precision])
        assert_close(np.column_stack([scores.ap, scores.precision]), np.array(expected), rtol=1e-12, atol=1e-15)
        usable = [row for row in expected if not math.isnan(row[0])]
        mean = np.mean(usable, 0) if usable else np.full(4, math.nan)
        assert_close(np.array([scores.map, *scores.mp]), mean, rtol=1e-12, atol=1e-15)


def test_ranking_in_blocks_and_of_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    database, queries = torch.randn(90, 24, generator=generator), torch.randn(7, 24, generator=generator)
    database[30:60] = 2 * database[:30]  # the same direction: equally similar, so the lower number comes first
    expected = rank(queries, database)
    similarity = (unit(queries) @ unit(database).T * 2**30).round().numpy()
    for row, values in zip(expected.tolist(), similarity, strict=True):
        assert row == sorted(range(90), key=lambda j: (-values[j], j))
    monkeypatch.setattr("dino_simpool.eval.retrieval.chunks", lambda count, _: (slice(i, i + 1) for i in range(count)))
    assert torch.equal(rank(queries, database), expected)
    angle = 0.5 + torch.tensor([2e-12, 1e-12, 0, 1e-6], dtype=torch.float64)  # a tie but for rounding, and none
    near = torch.stack([angle.cos(), angle.sin()], 1)
    assert rank(torch.tensor([[1.0, 0.0]]), near).tolist() == [[0, 1, 2, 3]]
    assert rank(queries[:1], database[:1]).tolist() == [[0]] and rank(queries, database[:0]).shape == (7, 0)


def test_impossible_rankings() -> None:
    gnd = [{"easy": [0], "hard": [], "junk": []}]
    with pytest.raises(ValueError, match=r"shape \(1, 2\) for 1 queries: give \(images, queries\)"):
        evaluate_ranks(np.zeros((1, 2), int), gnd)
    with pytest.raises(ValueError, match=r"kappas are \(0,\)"):
        evaluate_ranks(np.zeros((1, 1), int), gnd, kappas=(0,))
    with pytest.raises(ValueError, match="1 positives cannot give"):
        average_precision([0, 1], 1)
    with pytest.raises(ValueError, match="0 positives"):
        average_precision([], 0)


# -- images and features


class Linear(nn.Module):
    """The golden encoder: the mean pixel times a matrix."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.embed_dim = weight, weight.shape[1]
        self.sizes: list[list[int]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(list(images.shape[2:]))
        return images.mean((2, 3)) @ self.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", cases(load("open_multiscale")))
def test_golden_multi_scale(case: str, dtype: torch.dtype) -> None:
    arrays = load("open_multiscale")
    golden, settings = sub(arrays, case), meta(arrays, case)
    encoder: nn.Module
    if case.startswith("linear"):
        encoder = Linear(torch.from_numpy(golden["in/w"]).to(dtype))
    else:
        simpool = settings["mode"] == "simpool"
        config = ModelConfig(
            "vit_tiny",
            width=settings["embed_dim"],
            depth=settings["depth"],
            heads=settings["num_heads"],
            patch_size=settings["patch_size"],
            image_size=settings["img_size"],
            pool="simpool" if simpool else "cls",
            gamma=settings["gamma"] if simpool else None,
            beta=simpool,
            pos_interp=GOLDEN_POSITIONS[settings["mode"]],
        )
        built = build_encoder(config)
        load_encoder(built, tensors(sub(golden, "param")))
        encoder = with_options(built.to(dtype), min_over="image") if simpool else built.to(dtype)
        encoder.eval()
    images = torch.from_numpy(golden["in/x"]).to(dtype)
    with torch.no_grad():
        features = F.normalize(MultiScale(encoder, SCALES)(images), dim=1)
    exact = dtype == torch.float64
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if exact else {"rtol": 1e-5, "atol": 1e-6}
    assert_close(features, golden[f"out{'64' if exact else ''}/y_per_image"], **tolerance)
    if len(images) == 1:  # the published code divides by the length of the whole batch: a row's own for one image only
        assert_close(features, golden[f"out{'64' if exact else ''}/y"], **tolerance)
    if isinstance(encoder, Linear):
        assert encoder.sizes == [[45, 60], *golden["out/scaled_sizes"].tolist()]


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (64, 64), (300, 7), (20, 10), (1, 1)])
def test_thumbnails(size: tuple[int, int]) -> None:
    """The longest side is 64 at most, images are not enlarged, and the filter is Lanczos."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    tensor = thumbnail(image, image_size=64, mean=MEAN, std=STD)
    assert image.size == size  # the given image is left alone
    shrunk = Image.fromarray(pixels)
    if max(size) > 64:
        short = 64 * min(size) / max(size)  # of the whole numbers around it, that which keeps the aspect ratio best
        short = min((max(1, math.floor(short)), math.ceil(short)), key=lambda n: abs(64 / n - max(size) / min(size)))
        sides = (64, short) if size[0] >= size[1] else (short, 64)
        shrunk = shrunk.resize(sides, Image.Resampling.LANCZOS, reducing_gap=2.0)
    expected = (np.asarray(shrunk, np.float64) / 255 - np.array(MEAN)) / np.array(STD)
    assert tensor.shape == (3, shrunk.height, shrunk.width) and tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_whitening_equals_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    train = rng.normal(size=(40, 6)) * [3, 2, 1, 1, 0.5, 1e-3] + [1, 1, 1, 1, 1, 0]
    x = rng.normal(size=(5, 6))
    rows = train / np.linalg.norm(train, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(np.cov(rows.T, bias=True))
    assert values[0] < 1e-5 * values[-1] < values[1]  # the floor matters for one of them
    values = np.maximum(values, 1e-5 * values[-1])
    for dim in (1, 4, 6):
        found = Whitening.learn(torch.from_numpy(train), dim)(torch.from_numpy(x)).numpy()
        expected = np.zeros((5, dim))
        for i, row in enumerate(x / np.linalg.norm(x, axis=1, keepdims=True)):
            for d in range(dim):
                expected[i, d] = (row - rows.mean(0)) @ vectors[:, -1 - d] / math.sqrt(values[-1 - d])
        np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-8)  # an eigenvector has no sign
        np.testing.assert_allclose(found @ found.T, expected @ expected.T, rtol=1e-8)
        monkeypatch.setattr(whitening, "chunks", lambda count, _: (slice(i, i + 2) for i in range(0, count, 2)))
    with pytest.raises(ValueError, match=r"3 features .* are all alike"):
        Whitening.learn(torch.ones(3, 4), 2)


# -- on images


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("landmarks")
    for name in LANDMARKS:
        write_landmarks(root, name)
    return root


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return build_encoder(VIT).eval()


def options(data: Path, **changed: Any) -> RetrievalConfig:
    return RetrievalConfig(**({"data": str(data), "workers": 0, "device": "cpu"} | changed))


def plain_features(encoder: Encoder, images: Any, size: int, scales: tuple[float, ...]) -> np.ndarray:
    """Unit features of an independent loop, (M, D) float64."""
    rows = []
    for i in range(len(images)):
        image = images.read(i)
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy((np.asarray(image, np.float64) / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()
        views = [pixels if s == 1 else F.interpolate(pixels, scale_factor=s, mode="bilinear") for s in scales]
        with torch.no_grad():
            row = sum(encoder(view)[0].double() for view in views) / len(views)
        rows.append((row / row.norm()).numpy())
    return np.array(rows)


@pytest.mark.parametrize("name", LANDMARKS)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(name: str, preset: Any, data: Path, encoder: Encoder) -> None:
    """Every preset equals a plain loop with the settings of its row in the table."""
    size, multi_scale, crop = {
        "dino_default": (224, False, False),
        "dino_readme": (224, False, False) if name == "roxford5k" else (512, True, False),
        "ibot": (512, True, False),
        "strict": (512, True, True),
    }[preset]
    # The miniatures are smaller than either size, so it is halved to 32 or 73 for the comparison.
    cfg = options(data, dataset=name, preset=preset)
    assert resolve(cfg) == {"image_size": size, "multi_scale": multi_scale, "query_crop": crop}
    size = size // 7
    result = evaluate(encoder, options(data, dataset=name, preset=preset, image_size=size))
    database, queries, truth = landmarks(name, str(data))
    if not crop:
        object.__setattr__(queries, "boxes", None)
    scales = (1.0, 1 / math.sqrt(2), 0.5) if multi_scale else (1.0,)
    similarity = plain_features(encoder, queries, size, scales) @ plain_features(encoder, database, size, scales).T
    order = np.argsort(-similarity, axis=1, kind="stable")
    assert result["ranks"].dtype == torch.int32 and np.array_equal(result["ranks"].numpy(), order)
    for protocol, scores in evaluate_ranks(order.T, truth).items():
        assert_close(result[f"ap_{protocol}"].numpy(), 100 * scores.ap, rtol=1e-12)
        if not math.isnan(scores.map):
            assert result[f"map_{protocol}"] == pytest.approx(100 * scores.map)
            assert [result[f"mp{k}_{protocol}"] for k in (1, 5, 10)] == pytest.approx((100 * scores.mp).tolist())
    used = result["preprocessing"]
    assert (used["preset"], used["image_size"], used["multi_scale"], used["query_crop"]) == (preset, size, multi_scale, crop)
    assert used["scales"] == scales and used["mean"] == MEAN and used["std"] == STD
    assert "hard" in result["queries_with_positives"]
    assert ("map_hard" in result) == (result["queries_with_positives"]["hard"] > 0)


def test_each_setting_can_be_changed(data: Path) -> None:
    cfg = options(data, preset="strict", image_size=1024, multi_scale=False, query_crop=False)
    assert resolve(cfg) == {"image_size": 1024, "multi_scale": False, "query_crop": False}
    cfg = options(data, preset="dino_default", query_crop=True)
    assert resolve(cfg) == {"image_size": 224, "multi_scale": False, "query_crop": True}


def test_whitening_and_distractors(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    other = data / "rparis6k" / "jpg"
    database, queries, truth = landmarks("roxford5k", str(data))
    object.__setattr__(queries, "boxes", None)
    features = [plain_features(encoder, images, 224, (1.0,)) for images in (database, queries, find_images(str(other)))]
    # One distractor is each query itself: nothing can come before it, and it is a negative.
    extra = np.concatenate([5 * features[1], -features[1]]).astype(np.float32)
    np.save(tmp_path / "extra.npy", extra)
    plain = evaluate(encoder, options(data))
    assert plain["counts"] == {"database": 12, "queries": 3, "distractors": 0} and plain["whitening"] is None
    result = evaluate(encoder, options(data, distractors=str(tmp_path / "extra.npy")))
    assert result["counts"]["distractors"] == 6 and result["ranks"].shape == (3, 18)
    assert result["ranks"][:, 0].tolist() == [12, 13, 14] and result["mp1_medium"] == 0
    named = evaluate(encoder, options(data, distractors=str(other)))  # images, prepared as the database
    np.save(tmp_path / "other.npy", features[2].astype(np.float32))
    from_file = evaluate(encoder, options(data, distractors=str(tmp_path / "other.npy")))
    assert named["counts"] == from_file["counts"] and named["counts"]["distractors"] == len(features[2])
    assert torch.equal(named["ranks"], from_file["ranks"])
    without = [[number for number in row if number < 12] for row in result["ranks"].tolist()]
    assert without == plain["ranks"].tolist()

    result = evaluate(
        encoder, options(data, whitening_data=str(other), whitening_dim=4, distractors=str(tmp_path / "extra.npy"))
    )
    assert result["whitening"] == {"data": str(other), "dimensions": 4} and result["counts"]["whitening"] == 8
    assert not any("whitening" in name for name, value in result.items() if isinstance(value, int | float))  # metrics in %
    learned = Whitening.learn(torch.from_numpy(features[2]), 4)
    x, q = (unit(learned(torch.from_numpy(rows))) for rows in (np.concatenate([features[0], extra]), features[1]))
    order = (q @ x.T).argsort(stable=True, dim=1, descending=True)
    assert torch.equal(result["ranks"].long()[:, 3:], order[:, 3:])
    scores = evaluate_ranks(order.T, truth)
    assert result["map_medium"] == pytest.approx(100 * scores["medium"].map) != plain["map_medium"]


def test_impossible_extras_are_refused_before_any_image_is_read(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    for name, array, message in (
        ("wide", np.zeros((3, 17), np.float32), r"float32 of shape \(3, 17\): distractors are features \(images, 16\)"),
        ("flat", np.zeros(16, np.float32), r"of shape \(16,\)"),
        ("whole", np.zeros((3, 16), int), "holds int64"),
        ("infinite", np.full((3, 16), np.inf, np.float32), "not finite"),
        ("objects", np.array([[None] * 16]), "is not an array of features"),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=message):
            evaluate(encoder, options(data, distractors=str(tmp_path / f"{name}.npy")))
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    (tmp_path / "text.npy").write_text("features")
    for file, message in (("two.npz", "several arrays"), ("text.npy", "is not an array of features")):
        with pytest.raises(ValueError, match=message):
            evaluate(encoder, options(data, distractors=str(tmp_path / file)))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npy"):
        evaluate(encoder, options(data, distractors=str(tmp_path / "nowhere.npy")))
    other = str(data / "rparis6k")
    with pytest.raises(ValueError, match=r"whitening_dim is 16: features of width 16 from 8 images have no more than 7"):
        evaluate(encoder, options(data, whitening_data=other))
    with pytest.raises(ValueError, match="whitening_dim is 17"):
        evaluate(encoder, options(data, whitening_data=other, whitening_dim=17))
    with pytest.raises(ValueError, match="whitening_dim is 8"):  # as many as images: one direction would be noise
        evaluate(encoder, options(data, whitening_data=other, whitening_dim=8))
    with pytest.raises(ValueError, match="no data is given"):
        evaluate(encoder, RetrievalConfig())


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"whitening_dim": 8}, "give whitening_data to learn from too"), ({"image_size": 0}, "image_size is 0: allowed is 1 to")],
)
def test_impossible_options(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrievalConfig(**changed)
    with pytest.raises(ConfigError, match=message):
        parse(RetrievalConfig, [f"--{name}={value}" for name, value in changed.items()])


@pytest.mark.parametrize(
    ("arch", "shorter", "refused"),
    [
        ("resnet18", 60, ""),
        ("resnet18", 10, ""),
        ("convnext_tiny", 70, ""),
        ("convnext_tiny", 60, "30 x 70 pixels at scale 0.5 are too small for the encoder: give a larger image_size"),
        ("vit_tiny", 8, ""),
        ("vit_tiny", 7, "images of 3 x 70 pixels are smaller than a patch of vit_tiny"),
    ],
)
def test_thin_images(arch: str, shorter: int, refused: str, tmp_path: Path) -> None:
    """The published CNNs take a map with one row, so it is taken here; what nobody can take is named with its image."""
    write_landmarks(tmp_path, "rparis6k")
    Image.new("RGB", (140, shorter), "blue").save(tmp_path / "rparis6k/jpg/paris_defense_000001.jpg")
    for path in set((tmp_path / "rparis6k/jpg").iterdir()) - {tmp_path / "rparis6k/jpg/paris_defense_000001.jpg"}:
        Image.new("RGB", (140, 100), "red").save(path)
    depth = {"depth": (1, 1, 1, 1)} if arch == "convnext_tiny" else {}
    encoder = build_encoder(VIT if arch == "vit_tiny" else ModelConfig(arch, width=8, gamma=2.0, **depth))
    cfg = options(tmp_path, dataset="rparis6k", multi_scale=True)
    if refused:
        with pytest.raises(ValueError, match=f"^jpg/paris_defense_000001.jpg: {refused}"):
            evaluate(encoder, cfg)
    else:
        assert evaluate(encoder, cfg)["ranks"].shape == (2, 6)


def in_two_processes(rank: int, root: str) -> None:
    """What every process computes; see test_two_processes_equal_one."""
    torch.set_num_threads(1)
    if rank >= 0:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{root}/store", rank=rank, world_size=2, timeout=timedelta(minutes=2)
        )
    torch.manual_seed(0)
    encoder = build_encoder(VIT).eval()
    torch.save(evaluate(encoder, options(Path(root), preset="strict")), f"{root}/results{rank}.pth")
    distributed.cleanup()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    write_landmarks(tmp_path, "roxford5k")
    in_two_processes(-1, str(tmp_path))
    second = mp.get_context("spawn").Process(target=in_two_processes, args=(1, str(tmp_path)), daemon=True)
    second.start()
    in_two_processes(0, str(tmp_path))
    second.join(60)
    assert second.exitcode == 0
    one, *two = (torch.load(tmp_path / f"results{number}.pth", weights_only=True) for number in (-1, 0, 1))
    for results in two:
        for name, value in one.items():
            assert_close(results[name], value) if isinstance(value, Tensor) else None
            assert isinstance(value, Tensor) or results[name] == value, name


def test_workers_change_nothing(data: Path, encoder: Encoder) -> None:
    one, two = (evaluate(encoder, options(data, workers=workers)) for workers in (0, 2))
    assert torch.equal(one["ranks"], two["ranks"]) and one["map_medium"] == two["map_medium"]


def test_the_command(data: Path, encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One preset from the outside, the others by the same function in this process, then what goes wrong in one line."""
    (tmp_path / "run").mkdir()
    export_encoder(tmp_path / "run", encoder)
    arguments = ["retrieval", "--checkpoint", str(tmp_path / "run/backbone.safetensors"), "--device", "cpu", "--workers", "0"]
    more = ["--data", str(data), "--multi_scale", "true", "--image_size", "40"]
    program = [sys.executable, "-m", "dino_simpool", *arguments, *more]
    done = subprocess.run(program, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning: roxford5k: database: 12 found, 4,993 expected" in done.stderr
    path = tmp_path / "run/results/retrieval_roxford5k_dino_default.json"
    record, saved = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    expected = evaluate(encoder, options(data, multi_scale=True, image_size=40))
    assert torch.equal(saved["ranks"], expected["ranks"]) and saved["ap_hard"].dtype == torch.float64
    assert set(saved) == {"ranks", "ap_easy", "ap_medium", "ap_hard"}
    assert record["metrics"] == {name: value for name, value in expected.items() if isinstance(value, float)}
    assert len(record["metrics"]) == 12 and f"map_medium         {record['metrics']['map_medium']:8.2f} %" in done.stdout
    assert (record["evaluator"], record["dataset"], record["split"]) == ("retrieval", "roxford5k", "test")
    assert record["preprocessing"] == json.loads(json.dumps(expected["preprocessing"]))
    assert record["count_warnings"] == expected["count_warnings"] and record["config"]["preset"] == "dino_default"
    assert record["queries_with_positives"] == {"easy": 2, "medium": 3, "hard": 2}

    for preset in ("dino_readme", "ibot", "strict"):
        assert cli.main([*arguments, "--data", str(data), "--dataset", "rparis6k", "--preset", preset]) == 0
        record = json.loads((tmp_path / f"run/results/retrieval_rparis6k_{preset}.json").read_text())
        expected = evaluate(encoder, options(data, dataset="rparis6k", preset=preset))
        assert record["metrics"] == {name: value for name, value in expected.items() if isinstance(value, float)}
        assert record["preprocessing"] == json.loads(json.dumps(expected["preprocessing"]))
    capsys.readouterr()
    assert cli.main([*arguments, "--data", str(tmp_path)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dino-simpool retrieval: error: {tmp_path}/roxford5k/gnd_roxford5k.pkl is missing")


def test_the_record_has_the_dimensions_that_a_whitening_keeps(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    """By default all of a feature with less than 256."""
    for number in range(18):
        write_image(tmp_path / f"{number}.png", "other", seed=number)
    result = evaluate(encoder, options(data, whitening_data=str(tmp_path)))
    assert result["whitening"] == {"data": str(tmp_path), "dimensions": 16}
