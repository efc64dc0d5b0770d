"""The share of attention on the object: by an independent loop, over images and processes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from dino_simpool import distributed
from dino_simpool.config import MasksConfig, ModelConfig
from dino_simpool.data import EvalTransform, ImageSet
from dino_simpool.eval.masks import evaluate, read_mask
from dino_simpool.features.maps import seen_box
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


def test_no_mask_starts_another_program(tmp_path, ghostscript):
    write_set(tmp_path, {"a/0": np.ones((9, 9), bool)})
    mask = tmp_path / "masks/val/a/0.png"
    mask.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UnidentifiedImageError, match=r"0\.png"):
        read_mask(mask, ImageSet(str(tmp_path / "val"), ["a/0.png"]), 0)
    assert not ghostscript.exists()


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
    assert read_mask(tmp_path / "mask.png", ImageSet(str(tmp_path), ["image.png"]), 0).tolist() == [[False, True]] * 2


def test_images_are_not_turned_since_their_masks_are_not(tmp_path):
    rng = np.random.default_rng(4)
    write_set(tmp_path, {f"a/{i}": rng.random((16, 24)) < 0.4 for i in range(2)})
    encoder = build_encoder(ModelConfig(**MODEL))
    cfg = MasksConfig(data=str(tmp_path), workers=0)
    expected = evaluate(encoder, cfg)
    for path in (tmp_path / "val" / "a").iterdir():
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = 6
            image.save(path, exif=exif)
    assert evaluate(encoder, cfg) == expected


def test_images_without_object_are_counted_among_the_chosen(tmp_path):
    write_set(tmp_path, {f"a/{i}": np.full((20, 20), i != 2) for i in range(5)})
    result = evaluate(build_encoder(ModelConfig(**MODEL)), MasksConfig(data=str(tmp_path), max_images=3, workers=0))
    assert result["counts"] == {"images": 2, "without object": 1}
