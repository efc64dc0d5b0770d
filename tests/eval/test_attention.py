"""Attention of any image: the maps by independent loops, boxes in pixels of the image, what is drawn, and the files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_distributed import group, run_processes, values

from dino_simpool import checkpoint, cli, config, distributed
from dino_simpool.config import AttentionConfig, ConfigError, ModelConfig, TrainConfig, from_dict, to_dict
from dino_simpool.eval import attention as attention_module
from dino_simpool.eval.attention import evaluate, find_any_images, main, resized
from dino_simpool.features.maps import connected_parts, mass_mask
from dino_simpool.models.encoder import Encoder, build_encoder
from dino_simpool.pictures import GAP, VIRIDIS, heat, overlay, to_bytes

ROOT = Path(__file__).parents[2]
FAMILIES = {
    "vit": {"arch": "vit_tiny", "patch_size": 16, "width": 32, "heads": 2, "depth": 2, "image_size": 32},
    "resnet": {"arch": "resnet18", "width": 8, "stem": "small", "depth": (1, 1, 1), "image_size": 32},
    "convnext": {"arch": "convnext_tiny", "width": 8, "stem": "small", "depth": (1, 1, 1), "image_size": 32},
}


def encoder_of(family: str = "vit", *, seed: int = 0, **options: object) -> Encoder:
    """A small encoder whose attention is far from uniform."""
    torch.manual_seed(seed)
    encoder = build_encoder(ModelConfig(**FAMILIES[family] | options)).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(("pool.q.weight", "attn.qkv.weight")):
                parameter *= 30
    return encoder


def write_images(folder: Path, shapes: list[tuple[int, int]], seed: int = 0) -> list[np.ndarray]:
    """Images a0.png, a1.png, ... of shapes (H, W) that vary smoothly, so that resizing them is no matter of luck."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for number, shape in enumerate(shapes):
        pixels = np.random.default_rng(seed + number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
        image.save(folder / f"a{number}.png")
        images.append(np.asarray(image))
    return images


def write_checkpoint(out: Path, encoder: Encoder) -> Path:
    cfg = from_dict(TrainConfig, {"model": to_dict(encoder.config), "run": {"out": str(out)}})
    parts = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    out.mkdir()
    facts = {"config": to_dict(cfg), "num_images": 1, "versions": {}, "step": 1}
    checkpoint.save_state(out, {**facts, "student": parts, "teacher": parts})
    return out / "last.pth"


def options(data: Path, out: Path, **more: object) -> AttentionConfig:
    return AttentionConfig(data=str(data), out=str(out), workers=0, device="cpu", **more)


def run_here(encoder: Encoder, cfg: AttentionConfig) -> tuple[dict, Path]:
    """What `evaluate` returns, and the folder of its files."""
    Path(cfg.out).mkdir(exist_ok=True)
    return evaluate(encoder, cfg), Path(cfg.out) / "attention"


def sheet_size(rows: int, columns: int, *, groups: int) -> tuple[int, int]:
    """Width and height of a contact sheet of tiles of 160 pixels with one line of caption each."""
    return GAP + columns * (160 + GAP) + 2 * GAP * (groups - 1), GAP + rows * (160 + 4 + 17 + GAP)


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image).astype(int)


# -- maps


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("per_head", [False, True])
def test_maps_of_any_size_sum_to_one(family: str, per_head: bool) -> None:
    encoder = encoder_of(family, num_heads=2)
    cell = 16 if family == "vit" else 4
    for height, width in ((427, 488), (96, 40), (33, 65)):
        with torch.inference_mode():
            maps = encoder.attention(torch.randn(1, 3, height, width), per_head=per_head)
        rows, columns = (math.ceil(n / cell) if family == "resnet" else n // cell for n in (height, width))
        assert maps.shape == ((1, 2, rows, columns) if per_head else (1, rows, columns))
        assert (maps >= 0).all()
        np.testing.assert_allclose(maps.double().sum((-2, -1)).numpy(), 1, atol=2e-6)


def test_size_of_the_paper() -> None:
    with torch.inference_mode():
        maps = encoder_of("vit", depth=1, width=16).attention(torch.randn(1, 3, 896, 896))
        assert maps.shape == (1, 56, 56) and maps.sum().item() == pytest.approx(1, abs=1e-5)
        maps = encoder_of("convnext", stem="standard", depth=(1, 1, 1, 1)).attention(torch.randn(1, 3, 896, 896))
        assert maps.shape == (1, 28, 28) and maps.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("pool", ["simpool", "cls"])
def test_heads_equal_a_loop_in_double_precision(pool: str) -> None:
    """Every head by plain loops; the mean map is their mean, for the class token before what prefix tokens get is left out."""
    encoder = encoder_of("vit", pool=pool, num_heads=2).double()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    maps, mean = (encoder.attention(images, per_head=each).detach() for each in (True, False))
    assert maps.shape == (2, 2, 2, 3)
    for image in range(2):
        if pool == "simpool":
            x = encoder.tokens(images)[image].detach().numpy()
            norm, q, k = (module.weight.detach().numpy() for module in (encoder.pool.norm, encoder.pool.q, encoder.pool.k))
            values = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6) * norm
            query, keys = q @ x.mean(0), values @ k.T
        else:
            first, last = encoder.trunk.blocks
            tokens = last.norm1(first(encoder._embed(images)[0]))[image].detach()
            query, keys, _ = (part.detach().numpy() for part in last.attn.qkv(tokens).chunk(3, dim=1))
            query = query[0]
        raw = []
        for head in range(2):
            part = slice(16 * head, 16 * head + 16)
            scores = np.array([math.exp(sum(a * b for a, b in zip(query[part], key[part], strict=True)) / 4) for key in keys])
            raw.append((scores / scores.sum())[-6:])
            np.testing.assert_allclose(maps[image, head].flatten().numpy(), raw[-1] / raw[-1].sum(), rtol=1e-9)
        together = raw[0] + raw[1]
        np.testing.assert_allclose(mean[image].flatten().numpy(), together / together.sum(), rtol=1e-9)
    assert (maps[:, 0] - maps[:, 1]).abs().max() > 0.01, "the heads differ"
    if pool == "simpool":
        torch.testing.assert_close(maps.mean(1), mean)


@pytest.mark.parametrize("pool", ["simpool", "cls"])
def test_heads_need_no_fused_kernel(pool: str) -> None:
    encoder, images = encoder_of("vit", pool=pool, num_heads=2), torch.randn(1, 3, 80, 64)
    fused = encoder.attention(images, per_head=True)
    for block in encoder.trunk.blocks:
        assert block.attn.fused_attn
        block.attn.fused_attn = False
    torch.testing.assert_close(encoder.attention(images, per_head=True), fused, rtol=1e-4, atol=1e-6)


# -- boxes


@pytest.mark.parametrize(
    ("fit", "size", "seen", "cell"),
    [
        ("native", (427, 488), (416, 480), (16, 16)),  # the last 11 and 8 pixels are not seen
        ("square", (64, 64), (64, 64), (16 * 427 / 64, 16 * 488 / 64)),
        ("shorter", (64, 73), (64, 64), (16 * 427 / 64, 16 * 488 / 73)),
        ("longer", (56, 64), (48, 64), (16 * 427 / 56, 16 * 488 / 64)),
    ],
)
def test_boxes_are_in_pixels_of_the_image(tmp_path: Path, fit: str, size: tuple, seen: tuple, cell: tuple) -> None:
    write_images(tmp_path / "data", [(427, 488)])
    result, folder = run_here(
        encoder_of(), options(tmp_path / "data", tmp_path, fit=fit, image_size=None if fit == "native" else 64)
    )
    (record,) = result["images"]
    assert record["image"] == {"height": 427, "width": 488} and record["name"] == "a0.png"
    assert (record["input"], record["seen"]) == (list(size), list(seen))
    attention = np.load(folder / "0_a0.npy")
    assert attention.dtype == np.float32 and attention.shape == tuple(record["grid"]) == (seen[0] // 16, seen[1] // 16)
    assert attention.sum() == pytest.approx(1, abs=1e-6)
    boxes = record["maps"][0]["boxes"]
    expected = [
        [
            part[:, 1].min() * cell[1],
            part[:, 0].min() * cell[0],
            (part[:, 1].max() + 1) * cell[1],
            (part[:, 0].max() + 1) * cell[0],
        ]
        for part in connected_parts(mass_mask(attention))
    ]
    np.testing.assert_allclose([each["box"] for each in boxes], expected, rtol=1e-12)
    assert (
        sum(each["mass"] for each in boxes) >= 60 and json.loads((folder / "0_a0.json").read_text())["maps"] == record["maps"]
    )


# -- what is drawn


def half(image: np.ndarray, colours: np.ndarray) -> np.ndarray:
    return (image.astype(float) + colours) / 2


def test_pictures_to_the_pixel(tmp_path: Path) -> None:
    (image,) = write_images(tmp_path / "data", [(70, 56)])
    result, folder = run_here(encoder_of(), options(tmp_path / "data", tmp_path, fit="native"))
    attention = np.load(folder / "0_a0.npy").astype(np.float64)
    assert attention.shape == (4, 3) and result["images"][0]["seen"] == [64, 48]
    place = (attention - attention.min()) / (attention.max() - attention.min()) * (len(VIRIDIS) - 1)
    colours = np.stack([np.interp(place, range(len(VIRIDIS)), [c[i] for c in VIRIDIS]) for i in range(3)], axis=-1)
    cells = colours.repeat(16, 0).repeat(16, 1)
    assert np.abs(pixels_of(folder / "0_a0_heat.png") - cells).max() <= 0.51
    drawn = pixels_of(folder / "0_a0_overlay.png")
    assert drawn.shape == image.shape, "native: as large as the image"
    assert np.abs(drawn[:64, :48] - half(image[:64, :48], cells)).max() <= 0.51
    assert (drawn[64:] == image[64:]).all() and (drawn[:, 48:] == image[:, 48:]).all(), "what is not seen stays as it is"

    mask = mass_mask(attention).repeat(16, 0).repeat(16, 1)
    padded = np.pad(mask, 1)
    beside = np.stack([padded[i : i + 64, j : j + 48] for i in range(3) for j in range(3)])
    border, interior = mask & ~beside.all(0), beside.all(0)
    drawn = pixels_of(folder / "0_a0_mask.png")
    assert (drawn[:64, :48][border] == (255, 236, 200)).all() and border.any() and interior.any()
    assert np.abs(drawn[:64, :48][interior] - half(image[:64, :48][interior], np.array([255, 64, 32]))).max() <= 0.51
    assert (drawn[:64, :48][~mask] == image[:64, :48][~mask]).all()
    assert (drawn[64:] == image[64:]).all() and (drawn[:, 48:] == image[:, 48:]).all()


def test_sheet_shows_the_pictures_that_are_written(tmp_path: Path) -> None:
    """Image, attention and mask of three images in a row, at the size of a tile, and a fourth below."""
    images = write_images(tmp_path / "data", [(160, 160)] * 4)
    _, folder = run_here(encoder_of(), options(tmp_path / "data", tmp_path, fit="native"))
    sheet = pixels_of(tmp_path / "attention.png")
    assert sheet.shape[1::-1] == sheet_size(2, 9, groups=3)
    for number, image in enumerate(images):
        drawn = [image, *(pixels_of(folder / f"{number}_a{number}_{kind}.png") for kind in ("overlay", "mask"))]
        top = GAP + number // 3 * (160 + 4 + 17 + GAP)
        for column, picture in enumerate(drawn, 3 * (number % 3)):
            left = GAP + column * (160 + GAP) + column // 3 * 2 * GAP
            assert (sheet[top : top + 160, left : left + 160] == picture).all()
            assert sheet[top + 164 : top + 181, left : left + 160].min() < 60, "each has a caption"
    left = GAP + 3 * (160 + GAP) + 2 * GAP
    assert (sheet[GAP + 193 :, left : left + 3 * (160 + GAP) - GAP] == 255).all(), "white beside the fourth"


# -- sizes, poolings, files


@pytest.mark.parametrize(
    ("fit", "expected"), [("square", (24, 24)), ("shorter", (24, 60)), ("longer", (10, 24)), ("native", (20, 50))]
)
def test_fit(fit: str, expected: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8))
    pixels, own = resized(image, fit=fit, image_size=24, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert pixels.shape == (3, *expected) and own.tolist() == [20, 50]
    long = Image.new("RGB", (1, 1000))
    assert resized(long, fit=fit, image_size=24, mean=(0.0,) * 3, std=(1.0,) * 3)[0].shape[1:] == {
        "square": (24, 24), "shorter": (24 * 64, 2), "longer": (24, 1), "native": (1000, 1),
    }[fit]  # fmt: skip
    plain = np.asarray(image.resize(expected[::-1], Image.Resampling.BICUBIC))
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy() * 255, plain, atol=1e-4)


def test_default_size_is_four_times_that_of_the_model(tmp_path: Path) -> None:
    write_images(tmp_path / "data", [(30, 41)])
    result, _ = run_here(encoder_of(), options(tmp_path / "data", tmp_path))
    assert result["images"][0]["input"] == [128, 128] and result["preprocessing"]["image_size"] == 128
    assert result["preprocessing"]["fit"] == "square" and 4 * ModelConfig().image_size == 896


def test_global_average_pooling_is_uniform(tmp_path: Path) -> None:
    write_images(tmp_path / "data", [(30, 41)])
    result, folder = run_here(
        encoder_of("resnet", pool="gap"), options(tmp_path / "data", tmp_path, heads="each", image_size=40)
    )
    attention = np.load(folder / "0_a0_head0.npy")
    assert attention.shape == (10, 10) and (attention == attention[0, 0]).all()
    assert result["entropy"] == pytest.approx(100) and result["mask_area"] == pytest.approx(60)
    assert result["attention"]["of"] == "global average pooling: uniform by definition"


@pytest.mark.parametrize("pool", ["simpool", "cls"])
def test_each_head_has_its_files(tmp_path: Path, pool: str) -> None:
    write_images(tmp_path / "data", [(50, 50), (40, 60)])
    encoder = encoder_of("vit", pool=pool, num_heads=2)
    result, folder = run_here(encoder, options(tmp_path / "data", tmp_path, heads="each", fit="native"))
    endings = [f"_head{head}{end}" for head in (0, 1) for end in (".npy", "_heat.png", "_mask.png", "_overlay.png")]
    names = sorted(f"{stem}{end}" for stem in ("0_a0", "1_a1") for end in (*endings, ".json"))
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "made_by.json"])
    assert [len(record["maps"]) for record in result["images"]] == [2, 2] and result["counts"] == {"images": 2, "maps": 4}
    with Image.open(tmp_path / "attention.png") as drawn:
        assert drawn.size == sheet_size(2, 5, groups=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_batch_nor_neighbours_matter(tmp_path: Path, family: str) -> None:
    write_images(tmp_path / "data", [(40, 40), (33, 60), (64, 20), (41, 41), (50, 37)])
    encoder = encoder_of(family, gamma=1.25, min_over="batch").train()
    alone, _ = run_here(encoder, options(tmp_path / "data", tmp_path / "alone", image_size=48, batch_size=1))
    run_here(encoder, options(tmp_path / "data", tmp_path / "together", image_size=48, batch_size=4))
    assert encoder.training and len(alone["images"]) == 5
    for number in range(5):
        one, other = (np.load(tmp_path / f"{folder}/attention/{number}_a{number}.npy") for folder in ("alone", "together"))
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-7)


def in_two_processes(data: str, out: str) -> dict:
    """The folder is made by whoever comes first."""
    distributed.setup("cpu")
    return evaluate(encoder_of(), options(Path(data), Path(out), image_size=32, sheet_images=2))


def test_two_processes_share_the_images(tmp_path: Path) -> None:
    write_images(tmp_path / "data", [(40, 40), (33, 60), (64, 20)])
    alone, _ = run_here(encoder_of(), options(tmp_path / "data", tmp_path / "one", image_size=32, sheet_images=2))
    first, second = values(
        run_processes(in_two_processes, str(tmp_path / "data"), str(tmp_path / "two"), environments=group(2))
    )
    assert first == second and [each["name"] for each in first["images"]] == ["a0.png", "a1.png", "a2.png"]
    assert first["entropy"] == pytest.approx(alone["entropy"], rel=1e-5) and first["counts"] == alone["counts"]
    one, two = (sorted(path.name for path in (tmp_path / name / "attention").iterdir()) for name in ("one", "two"))
    assert one == two and len(one) == 3 * 5 + 1
    with Image.open(tmp_path / "one/attention.png") as a, Image.open(tmp_path / "two/attention.png") as b:
        assert a.size == b.size == sheet_size(1, 6, groups=2)


# -- where images come from, and mistakes


def test_one_file_a_folder_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "data/val/x", [(20, 20)] * 5)
    (tmp_path / "list.txt").write_text("data/val/x/a3.png\n")

    def names(data: str, **more: object) -> list[str]:
        images = find_any_images(AttentionConfig(data=data, **more))
        assert images.read(0).size == (20, 20)
        return [images.name(index) for index in range(len(images))]

    assert names(str(tmp_path / "data/val/x/a2.png")) == ["a2.png"]
    assert len(names(str(tmp_path / "data"))) == 5 and names(str(tmp_path / "list.txt")) == ["data/val/x/a3.png"]
    assert names(str(tmp_path / "data"), val="val")[0] == "x/a0.png"
    assert names(str(tmp_path / "data/val"), subset_per_class=2) == ["x/a0.png", "x/a1.png"]
    monkeypatch.chdir(tmp_path / "data/val/x")
    assert names("a2.png") == ["a2.png"]


def test_images_are_spread_evenly_and_keep_their_numbers(tmp_path: Path) -> None:
    write_images(tmp_path / "data", [(20, 20)] * 11)
    result, folder = run_here(encoder_of(), options(tmp_path / "data", tmp_path, image_size=32, max_images=3, sheet_images=1))
    assert [each["files"] for each in result["images"]] == ["00_a0", "05_a4", "10_a9"]  # a10.png is the third in sorted order
    assert len(list(folder.glob("*_heat.png"))) == 3


@pytest.mark.parametrize(
    ("shape", "family", "seen", "grid"),
    [
        ((1, 1), "vit", [16, 16], [1, 1]),
        ((1, 60), "vit", [16, 60], [1, 3]),
        ((1, 60), "convnext", [4, 60], [1, 15]),
        ((5, 60), "convnext", [5, 60], [1, 15]),
        ((1, 1), "resnet", [1, 1], [1, 1]),
        ((60, 3), "resnet", [60, 3], [15, 1]),
    ],
)
def test_images_thinner_than_a_cell(
    tmp_path: Path, shape: tuple[int, int], family: str, seen: list[int], grid: list[int]
) -> None:
    write_images(tmp_path / "data", [shape, (30, 30)])
    encoder = encoder_of(family)
    result, folder = run_here(encoder, options(tmp_path / "data", tmp_path, fit="native"))
    first = result["images"][0]
    assert (first["input"], first["grid"], first["image"]) == (seen, grid, {"height": shape[0], "width": shape[1]})
    assert np.load(folder / "0_a0.npy").sum() == pytest.approx(1, abs=1e-5)
    boxes = [box["box"] for box in first["maps"][0]["boxes"]]
    assert all(0 <= box[0] < box[2] <= shape[1] + 1e-9 and 0 <= box[1] < box[3] <= shape[0] + 1e-9 for box in boxes)


def test_a_single_pixel_is_an_image_when_it_is_resized(tmp_path: Path) -> None:
    write_images(tmp_path / "data", [(1, 1)])
    result, folder = run_here(encoder_of(), options(tmp_path / "data/a0.png", tmp_path, image_size=16))
    assert np.load(folder / "0_a0.npy").tolist() == [[1]] and result["entropy"] == 100
    assert result["images"][0]["maps"][0]["boxes"] == [{"box": [0, 0, 1, 1], "cells": 1, "mass": 100}]


def test_attention_that_is_not_finite(tmp_path: Path) -> None:
    write_images(tmp_path / "data", [(20, 20)])
    Image.new("RGB", (20, 20)).save(tmp_path / "data/a1.png")
    encoder = encoder_of()
    with torch.no_grad():  # of black images alone: their pixels are below the mean of ImageNet
        encoder.trunk.patch_embed.proj.register_forward_hook(
            lambda _, images, out: out / (images[0].amax((1, 2, 3)) > 0)[:, None, None, None]
        )
    with pytest.raises(ValueError, match=r"attention of a1\.png is not finite"):
        run_here(encoder, options(tmp_path / "data", tmp_path))


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data is given"):
        find_any_images(AttentionConfig())
    with pytest.raises(FileNotFoundError, match=r"nothing\.jpg"):
        find_any_images(AttentionConfig(data=str(tmp_path / "nothing.jpg")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--resize", "20"), "unknown option resize"),
        (("--train", "x"), "unknown option train"),
        (("--fit", "native", "--image_size", "64"), "fit native keeps the size"),
        (("--fit", "crop"), "fit is crop: allowed is one of square, shorter, longer, native"),
        (("--mass", "1"), "mass is 1.0"),
        (("--mass", "0"), "mass is 0.0"),
        (("--max_images", "0"), ": allowed is 1 to"),
        (("--sheet_images", "0"), ": allowed is 1 to"),
        (("--heads", "all"), "mean, each"),
    ],
)
def test_impossible_options(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        config.parse(AttentionConfig, list(arguments))


# -- the command


@pytest.mark.parametrize("family", FAMILIES)
def test_the_command(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its files, record, and the words that it prints; once as its script, in a process of its own and elsewhere."""
    write_images(tmp_path / "data", [(427, 488), (40, 31)])
    weights = write_checkpoint(tmp_path / "run", encoder_of(family))
    more = ["--checkpoint", str(weights), "--data", str(tmp_path / "data"), "--fit", "longer", "--image_size", "96"]
    more += ["--workers", "0", "--device", "cpu"]
    if family == "vit":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "eval/visualize_attention.py"), *more]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        assert cli.main(["attention", *more]) == 0
        printed = capsys.readouterr().out
    assert "2 images, 2 maps" in printed and "entropy" in printed
    results = tmp_path / "run/results"
    record = json.loads((results / "attention.json").read_text())
    assert record["config"]["fit"] == "longer" and record["preprocessing"]["image_size"] == 96
    assert record["model"]["arch"] == FAMILIES[family]["arch"] and len(record["model"]["sha256"]) == 64
    grid = {"vit": [5, 6], "resnet": [21, 24], "convnext": [21, 24]}[family]
    assert record["images"][0]["grid"] == grid and record["images"][0]["input"] == [84, 96]
    attention = np.load(results / "attention/0_a0.npy")
    assert list(attention.shape) == grid and attention.sum() == pytest.approx(1, abs=1e-6)
    assert pixels_of(results / "attention/0_a0_overlay.png").shape == (84, 96, 3)
    assert pixels_of(results / "attention/0_a0_heat.png").shape[:2] == tuple(record["images"][0]["seen"])
    assert pixels_of(results / "attention.png").shape[1::-1] == sheet_size(1, 6, groups=2)


def test_untrained_weights_have_their_own_files(tmp_path: Path) -> None:
    write_images(tmp_path / "data", [(20, 20)])
    weights = write_checkpoint(tmp_path / "run", encoder_of())
    for which in ("teacher", "untrained"):
        main(AttentionConfig(checkpoint=str(weights), data=str(tmp_path / "data"), which=which, device="cpu", workers=0))
    results = tmp_path / "run/results"
    assert {path.name for path in results.iterdir()} == {
        f"attention{ending}{kind}" for ending in ("", "_untrained") for kind in ("", ".json", ".png")
    }
    one, other = (np.load(results / f"{name}/0_a0.npy") for name in ("attention", "attention_untrained"))
    assert not np.allclose(one, other)


def test_smooth_pictures(tmp_path: Path) -> None:
    """Both pictures of the attention."""
    (image,) = write_images(tmp_path / "data", [(70, 56)])
    _, folder = run_here(encoder_of(), options(tmp_path / "data", tmp_path, fit="native", smooth=True))
    attention = torch.from_numpy(np.load(folder / "0_a0.npy"))
    assert (pixels_of(folder / "0_a0_heat.png") == to_bytes(heat(attention, (64, 48), smooth=True))).all()
    seen = torch.from_numpy(image / 255).permute(2, 0, 1).float()
    drawn = to_bytes(overlay(seen, attention, seen=(64, 48), smooth=True)).astype(int)
    assert np.abs(pixels_of(folder / "0_a0_overlay.png") - drawn).max() <= 1


def test_the_mask_holds_the_mass_of_the_options(tmp_path: Path) -> None:
    write_images(tmp_path / "data", [(80, 80)])
    result, folder = run_here(encoder_of(), options(tmp_path / "data", tmp_path, fit="native", mass=0.95))
    attention = np.load(folder / "0_a0.npy")
    assert result["mask_area"] == 100 * mass_mask(attention, 0.95).mean() > 100 * mass_mask(attention).mean()


def test_a_used_folder_is_not_mixed_with_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same run writes the same files again; other options, or files of unknown origin, are refused."""
    folder = tmp_path / "attention"
    made_by = {"config": {"mass": 0.6, "workers": 1}, "weights": "a", "images": "b"}
    attention_module._take(folder, made_by)
    (folder / "0_a.json").write_text("{}")
    attention_module._take(folder, made_by | {"config": {"mass": 0.6, "workers": 2}})
    for other in ({"config": {"mass": 0.5, "workers": 1}}, {"weights": "x"}, {"images": "x"}):
        with pytest.raises(ValueError, match=r"holds pictures of another run .* remove .*, or give another --out"):
            attention_module._take(folder, made_by | other)
    (folder / "made_by.json").unlink()
    with pytest.raises(ValueError, match="holds pictures of another run"):
        attention_module._take(folder, made_by)
