"""The share of attention on the object, by hand, by an independent loop, and over images and processes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dino_simpool import distributed
from dino_simpool.config import MasksConfig, ModelConfig
from dino_simpool.data import EvalTransform
from dino_simpool.eval.masks import cell_coverage, evaluate, evenly, read_mask, seen_box, shares
from dino_simpool.models.encoder import build_encoder

MODEL = {"arch": "vit_tiny", "patch_size": 4, "width": 16, "heads": 2, "depth": 1, "image_size": 16}


def write_set(root, masks: dict[str, np.ndarray], seed: int = 0) -> None:
    """An image tree of one split `val`: name "class/number" -> mask (H, W), with random images of the same size."""
    rng = np.random.default_rng(seed)
    for name, mask in masks.items():
        for path, pixels in (
            (root / "val" / f"{name}.png", rng.integers(0, 256, (*mask.shape, 3), dtype=np.uint8)),
            (root / "masks/val" / f"{name}.png", mask.astype(np.uint8) * 255),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def test_by_hand():
    mask = np.zeros((4, 4), bool)
    mask[:2, :2] = True  # a quarter: the first of 2 x 2 cells
    coverage = cell_coverage(mask, (0, 0, 4, 4), grid=(2, 2))
    assert coverage.tolist() == [[1, 0], [0, 0]]
    assert shares(np.full((2, 2), 0.25), coverage) == (0.25, 0.25)  # uniform: ratio 1
    assert shares(np.array([[1.0, 0], [0, 0]]), coverage) == (1, 0.25)  # all inside: ratio 1 / area = 4
    assert shares(np.array([[0, 0.5], [0.5, 0]]), coverage) == (0, 0.25)  # all outside: 0
    assert shares(np.array([[2.0, 1], [1, 0]]), coverage) == (0.5, 0.25)  # the mass need not be 1


def test_cells_that_cut_pixels():
    mask = np.array([[True, False, False]])
    assert np.allclose(cell_coverage(mask, (0, 0, 3, 1), grid=(1, 2)), [[1 / 1.5, 0]], atol=1e-15)
    assert np.allclose(
        cell_coverage(mask, (0, 0, 3, 1), grid=(2, 6)), [[1, 1, 0, 0, 0, 0]] * 2, atol=1e-15
    )  # cells below a pixel
    assert np.allclose(cell_coverage(mask, (0.5, 0, 2.5, 1), grid=(1, 1)), [[0.25]], atol=1e-15)
    assert np.allclose(cell_coverage(mask, (-1, 0, 1, 2), grid=(1, 2)), [[0, 0.5]], atol=1e-15)  # beyond the image: nothing


@pytest.mark.parametrize(
    ("shape", "grid", "box"),
    [
        ((7, 5), (3, 2), (0, 0, 5, 7)),
        ((5, 9), (4, 4), (1.3, 0.2, 7.7, 4.9)),
        ((1, 1), (3, 5), (0, 0, 1, 1)),
        ((6, 6), (7, 11), (0.5, 0, 6, 5)),
    ],
)
def test_coverage_equals_a_loop_over_cells_and_pixels(shape, grid, box):
    mask = np.random.default_rng(0).random(shape) < 0.5
    left, top, right, bottom = box
    height, width = (bottom - top) / grid[0], (right - left) / grid[1]
    expected = np.zeros(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            for y, x in zip(*np.nonzero(mask), strict=True):
                down = min(top + (i + 1) * height, y + 1) - max(top + i * height, y)
                across = min(left + (j + 1) * width, x + 1) - max(left + j * width, x)
                expected[i, j] += max(down, 0) * max(across, 0) / (height * width)
    coverage = cell_coverage(mask, box, grid=grid)
    np.testing.assert_allclose(coverage, expected, atol=1e-12)
    inside, area = shares(np.full(grid, 1 / (grid[0] * grid[1])), coverage)
    assert inside == pytest.approx(area, rel=1e-12)  # uniform attention: 1, for any mask and grid


@pytest.mark.parametrize(
    ("size", "resize", "crop"), [((40, 30), 20, 16), ((30, 41), 18, 16), ((16, 16), 16, 16), ((12, 50), 24, 12)]
)
def test_seen_box_is_what_the_transform_keeps(size, resize, crop):
    """A ramp image holds its own coordinates: their means over the crop must be the centre of the box."""
    width, height = size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(width) * 4, np.arange(height)[:, None] * 4
    encoder = build_encoder(ModelConfig(**MODEL | {"image_size": crop}))
    seen = EvalTransform(crop, resize=resize, mean=(0, 0, 0), std=(1 / 255,) * 3)(Image.fromarray(ramp)) / 4 + 0.5
    left, top, right, bottom = seen_box(encoder, (height, width), resize=resize, crop=crop)
    assert seen[0].mean().item() == pytest.approx((left + right) / 2, abs=0.2)
    assert seen[1].mean().item() == pytest.approx((top + bottom) / 2, abs=0.2)
    assert right - left == pytest.approx(crop * min(size) / resize, rel=0.05)


def test_vit_sees_whole_patches_only():
    encoder = build_encoder(ModelConfig(**MODEL))
    assert seen_box(encoder, (18, 18), resize=18, crop=18) == (0, 0, 16, 16)
    cnn = build_encoder(ModelConfig(arch="resnet18", width=8, stem="small", depth=(1, 1)))
    assert seen_box(cnn, (18, 18), resize=18, crop=18) == (0, 0, 18, 18)


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (1, 10, [0]),
        (5, 5, [0, 1, 2, 3, 4]),
        (5, 9, [0, 1, 2, 3, 4]),
        (9, 3, [0, 4, 8]),
        (7, 1, [0]),
    ],
)
def test_evenly(total, count, expected):
    assert evenly(total, count).tolist() == expected


def test_evaluate_equals_a_loop_and_leaves_the_encoder_as_it_was(tmp_path):
    rng = np.random.default_rng(1)
    masks = {f"{'ab'[i % 2]}/{i}": rng.random(shape) < 0.3 for i, shape in enumerate([(20, 20), (16, 24), (24, 16), (33, 20)])}
    masks["b/empty"] = np.zeros((20, 20), bool)
    masks["a/cropped"] = np.zeros((40, 20), bool)
    masks["a/cropped"][0] = True  # the only object pixels are cropped away
    write_set(tmp_path, masks)
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(**MODEL, drop_path=0.5)).train()
    result = evaluate(encoder, MasksConfig(data=str(tmp_path), resize=18, batch_size=2, workers=0))
    assert encoder.training and all(module.training for module in encoder.modules())
    assert result["counts"] == {"images": 4, "without object": 2}
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "masks").symlink_to(tmp_path / "masks")
    shutil.make_archive(str(packed / "val"), "tar", tmp_path / "val")
    assert evaluate(encoder, MasksConfig(data=str(packed), resize=18, batch_size=2, workers=0)) == result

    encoder.eval()
    transform = EvalTransform(16, resize=18, mean=encoder.config.mean, std=encoder.config.std)
    inside, area = [], []
    for name, mask in masks.items():
        picture = transform(Image.open(tmp_path / "val" / f"{name}.png").convert("RGB"))
        attention = encoder.attention(picture[None])[0].detach().double().numpy()
        assert attention.shape == (4, 4)
        box = seen_box(encoder, mask.shape, resize=18, crop=16)
        fine = 40  # each cell as 40 x 40 samples: an independent, approximate area
        y = (np.arange(4 * fine) + 0.5) / (4 * fine) * (box[3] - box[1]) + box[1]
        x = (np.arange(4 * fine) + 0.5) / (4 * fine) * (box[2] - box[0]) + box[0]
        hit = mask[np.floor(y).astype(int)[:, None], np.floor(x).astype(int)]
        if hit.any():
            inside.append((np.kron(attention, np.ones((fine, fine))) * hit).sum() / fine**2)
            area.append(hit.mean())
    assert result["attention_in_mask"] == pytest.approx(100 * np.mean(inside), abs=0.5)
    assert result["mask_area"] == pytest.approx(100 * np.mean(area), abs=0.5)
    assert result["ratio"] == pytest.approx(result["attention_in_mask"] / result["mask_area"], rel=1e-12)


def test_global_average_pooling_has_ratio_one(tmp_path):
    rng = np.random.default_rng(2)
    write_set(tmp_path, {f"a/{i}": rng.random((17 + i, 23)) < 0.4 for i in range(5)})
    encoder = build_encoder(ModelConfig(**MODEL, pool="gap"))
    result = evaluate(encoder, MasksConfig(data=str(tmp_path), max_images=3, workers=0))
    assert result["ratio"] == pytest.approx(1, rel=1e-6) and result["counts"]["images"] == 3


@pytest.mark.parametrize("count", [1, 5])
def test_processes_share_the_images(tmp_path, monkeypatch, count):
    rng = np.random.default_rng(3)
    write_set(tmp_path, {f"a/{i}": rng.random((20, 20)) < 0.4 for i in range(count)})
    encoder = build_encoder(ModelConfig(**MODEL))
    cfg = MasksConfig(data=str(tmp_path), batch_size=3, workers=0)
    alone = evaluate(encoder, cfg)
    parts: list = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)

    def collect(rows, indices, total):
        parts.append((rows, indices))
        if len(parts) == 2:
            gathered = torch.full((total, 2), torch.nan, dtype=torch.float64)
            for part, places in parts:
                gathered[places] = part
            return gathered
        return torch.ones(total, 2)

    monkeypatch.setattr(distributed, "gather_by_index", collect)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        together = evaluate(encoder, cfg)
    assert together["counts"] == alone["counts"] and together["ratio"] == pytest.approx(alone["ratio"], rel=1e-5)


def test_bad_masks(tmp_path):
    write_set(tmp_path, {"a/0": np.zeros((20, 20), bool)})
    encoder = build_encoder(ModelConfig(**MODEL))
    cfg = MasksConfig(data=str(tmp_path), workers=0)
    with pytest.raises(ValueError, match=r"no mask .* has a pixel left"):
        evaluate(encoder, cfg)
    mask = tmp_path / "masks/val/a/0.png"
    Image.new("L", (20, 21), 255).save(mask)
    with pytest.raises(ValueError, match="20 x 21 pixels, its image 20 x 20"):
        evaluate(encoder, cfg)
    mask.unlink()
    with pytest.raises(ValueError, match="has no mask"):
        evaluate(encoder, cfg)


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_any_value_above_zero_is_object(tmp_path, mode):
    values = np.array([[0, 1], [0, 1]], np.uint8)
    mask = Image.fromarray(values * (255 if mode == "1" else 1)).convert(mode)
    if mode == "P":
        mask.putpalette([0, 0, 0, 7, 0, 9])
    mask.save(tmp_path / "mask.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "image.png")
    assert read_mask(tmp_path / "mask.png", tmp_path / "image.png").tolist() == [[False, True]] * 2
