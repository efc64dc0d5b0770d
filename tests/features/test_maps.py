"""Attention maps by batch, and what is measured on them: by independent loops, by hand and by brute force."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_attention import encoder_of, write_images
from test_masks import MODEL

from dino_simpool.config import ModelConfig
from dino_simpool.data import EvalTransform, ImageSet, find_images
from dino_simpool.features.encode import Forward
from dino_simpool.features.maps import (
    attention_maps,
    attention_of,
    cell_coverage,
    connected_parts,
    entropy,
    mass_mask,
    part_boxes,
    seen_box,
    seen_size,
    shares,
)
from dino_simpool.models.encoder import build_encoder

TRANSFORM = EvalTransform(32, resize=36, mean=(0.5,) * 3, std=(0.25,) * 3)

# -- the maps of a set of images


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    write_images(tmp_path / "data", [(40, 40), (33, 60), (64, 36), (41, 41), (50, 37)])
    return find_images(str(tmp_path / "data"))


def with_size(image: Image.Image) -> tuple[torch.Tensor, int]:
    """A transform that returns something beside the image."""
    return TRANSFORM(image), image.width


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_maps_come_in_order_whatever_the_batch(images: ImageSet, per_head: bool, workers: int) -> None:
    """As one image at a time gives them, of an encoder in training mode, which stays in it."""
    encoder = encoder_of(num_heads=2, drop_path=0.5)
    order = [4, 0, 3, 1]
    with torch.no_grad():
        expected = torch.cat([encoder.attention(TRANSFORM(images.read(i))[None], per_head=per_head) for i in order])
    encoder.train()
    for batch_size in (1, 3):
        forward = Forward(with_size, batch_size, workers)
        found = list(attention_maps(encoder, images, order, forward, per_head=per_head))
        assert encoder.training and all(module.training for module in encoder.modules())
        assert [len(numbers) for _, _, numbers in found] == ([1] * 4 if batch_size == 1 else [3, 1])
        assert torch.cat([numbers for _, _, numbers in found]).tolist() == order
        maps = torch.cat([maps for maps, _, _ in found])
        assert maps.dtype == torch.float32 and not maps.requires_grad and not maps.is_inference()
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-7)
        pixels, widths = (torch.cat([batch[part] for _, batch, _ in found]) for part in (0, 1))
        assert torch.equal(pixels, torch.stack([TRANSFORM(images.read(i)) for i in order]))
        assert widths.tolist() == [images.read(i).width for i in order]
    plain = next(attention_maps(encoder, images, order, Forward(TRANSFORM, 4, 0), per_head=per_head))
    torch.testing.assert_close(plain[0], expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(plain[1], pixels)


def test_bf16_rounds_the_products_only(images: ImageSet) -> None:
    encoder = encoder_of()
    exact, rounded = (
        next(attention_maps(encoder, images, range(5), Forward(TRANSFORM, 5, 0, name)))[0] for name in ("fp32", "bf16")
    )
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    np.testing.assert_allclose(rounded.sum((1, 2)).numpy(), 1, atol=1e-5)
    torch.testing.assert_close(exact, rounded, rtol=0.2, atol=0.01)


def test_errors_name_the_image(images: ImageSet) -> None:
    encoder = encoder_of()
    with pytest.raises(ValueError, match=r"^a2\.png: images of 8 x 8 pixels are smaller than a patch"):
        small = EvalTransform(8, resize=8, mean=(0.5,) * 3, std=(0.25,) * 3)
        list(attention_maps(encoder, images, [2, 1], Forward(small, 2, 0)))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        encoder.pool.q.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"the attention of first is not finite"):
        attention_of(encoder, pixels, names=["first", "second"])
    encoder = encoder_of()
    pixels[1, 0, 0, 0] = math.inf
    with pytest.raises(ValueError, match=r"the attention of second is not finite"):
        attention_of(encoder, pixels, names=["first", "second"])


# -- what a map covers


@pytest.mark.parametrize(
    ("family", "more", "stride"),
    [
        ("vit", {}, 16),
        ("resnet", {}, 4),
        ("resnet", {"stem": "standard", "depth": (1, 1, 1, 1)}, 32),
        ("convnext", {}, 4),
        ("convnext", {"stem": "standard", "depth": (1, 1, 1, 1)}, 32),
        ("convnext", {"arch": "convnext_atto_ols", "stem": "standard", "depth": (1, 1, 1, 1)}, 32),
    ],
)
def test_cells_cover_what_is_seen(family: str, more: dict, stride: int) -> None:
    """The cells that come out, times their stride, but no more than there is."""
    encoder = encoder_of(family, **more)
    for size in (64, 75, 95, 96, 127, 130):
        cells = encoder.attention(torch.zeros(1, 3, size, 64)).shape[1]
        assert seen_size(encoder, size) == min(size, cells * stride)


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
    ("size", "resize", "crop"),
    [((40, 30), 20, 16), ((30, 41), 18, 16), ((16, 16), 16, 16), ((12, 50), 24, 12), ((23, 19), 19, 16)],
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


# -- masks


@pytest.mark.parametrize(
    ("attention", "kept"),
    [
        ([0.4, 0.3, 0.2, 0.1], [0, 1]),
        ([0.7, 0.1, 0.1, 0.1], [0]),
        ([0.1, 0.1, 0.1, 0.7], [3]),
        ([4.0, 3.0, 2.0, 1.0], [0, 1]),  # any sum
        ([1.0, 0.0, 0.0], [0]),
        ([1.0], [0]),
        ([0.25] * 4, [1, 2, 3]),  # of equal ones the first goes first
        ([0.1] * 10, [4, 5, 6, 7, 8, 9]),  # exactly 60 %: not one more
    ],
)
def test_mask_by_hand(attention: list[float], kept: list[int]) -> None:
    for dtype in (np.float32, np.float64):
        assert np.flatnonzero(mass_mask(np.array([attention], dtype), 0.6)).tolist() == kept


@pytest.mark.parametrize("mass", [0.1, 0.3, 0.5, 0.6, 0.9])
def test_mask_of_a_uniform_map_has_the_exact_number_of_cells(mass: float) -> None:
    """Sums of equal shares are where rounding would add or lose a cell; 3136 are the cells of the paper."""
    for count in (*range(1, 120), 784, 3136):
        mask = mass_mask(np.full((1, count), np.float32(1 / count)), mass)[0]
        kept = math.ceil(Fraction(str(mass)) * count)
        assert mask.sum() == kept and mask[count - kept :].all(), count


def test_mask_equals_the_definition_in_exact_numbers() -> None:
    """The smallest set of largest values with at least the mass, over all sizes of the set, with ties on purpose."""
    rng = np.random.default_rng(0)
    for case in range(200):
        attention = rng.integers(1, 8 if case % 2 else 1000, (rng.integers(1, 5), rng.integers(1, 6)))
        mass = Fraction(int(rng.integers(1, 20)), 20)
        flat = [int(each) for each in attention.ravel()]
        largest_first = sorted(range(len(flat)), key=lambda cell: (-flat[cell], -cell))
        count = next(n for n in range(1, len(flat) + 1) if sum(flat[c] for c in largest_first[:n]) >= mass * sum(flat))
        mask = mass_mask(attention.astype(np.float64), float(mass))
        assert set(np.flatnonzero(mask)) == set(largest_first[:count])


def test_entropy() -> None:
    assert entropy(np.full((3, 5), 0.2)) == pytest.approx(100)
    assert entropy(np.array([[0.0, 1.0], [0.0, 0.0]])) == 0
    assert entropy(np.array([[0.5, 0.5, 0, 0]])) == pytest.approx(50)
    assert entropy(np.ones((1, 1))) == 100


# -- parts and boxes


def test_parts_by_hand() -> None:
    mask = np.array([[1, 0, 0, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 1], [1, 1, 0, 0, 0]], bool)
    parts = [{tuple(cell) for cell in part.tolist()} for part in connected_parts(mask)]
    # corners do not connect; of equal parts the upper one is first
    assert parts == [{(0, 3), (0, 4), (1, 4), (2, 4)}, {(0, 0), (1, 0)}, {(3, 0), (3, 1)}, {(1, 2)}]
    assert connected_parts(np.zeros((2, 2), bool)) == []


def test_parts_equal_spreading_labels() -> None:
    for seed in range(20):
        mask = np.random.default_rng(seed).random((7, 9)) < 0.6
        labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
        for _ in range(mask.size):  # every cell takes the highest label beside it
            padded = np.pad(labels, 1)
            around = np.stack([labels, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
            labels = np.where(mask, around.max(0), 0)
        expected = {frozenset(map(tuple, np.argwhere(labels == label).tolist())) for label in set(labels[mask].tolist())}
        parts = connected_parts(mask)
        assert {frozenset(map(tuple, part.tolist())) for part in parts} == expected
        assert [len(part) for part in parts] == sorted(map(len, expected), reverse=True)


def grown_parts(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """The connected parts by growing each from its first cell, largest first, then first from the top."""
    left = set(map(tuple, np.argwhere(mask).tolist()))
    parts = []
    for first in sorted(left):
        if first not in left:
            continue
        left.remove(first)
        part = [first]
        for row, column in part:  # it grows while it is read
            around = {(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)} & left
            left -= around
            part += around
        parts.append(set(part))
    return sorted(parts, key=len, reverse=True)


def test_parts_equal_growing_and_keep_their_order() -> None:
    """On thousands of maps of all densities and shapes: the same cells, in the same order of parts."""
    rng = np.random.default_rng(0)
    for case in range(3000):
        shape = tuple(rng.integers(1, (4, 10, 24)[case % 3], 2))
        mask = rng.random(shape) < rng.random() if case % 2 else mass_mask(rng.random(shape) ** 4, rng.uniform(0.05, 0.95))
        parts = connected_parts(mask)
        assert all(len(part) == len(np.unique(part, axis=0)) for part in parts)
        assert [set(map(tuple, part.tolist())) for part in parts] == grown_parts(mask)


def test_boxes_by_hand() -> None:
    attention = np.array([[0.3, 0.3, 0.0], [0.0, 0.0, 0.0], [0.0, 0.1, 0.3]])
    found = part_boxes(attention, attention > 0.2, (0, 0, 60, 30))
    assert [each["box"] for each in found] == [[0, 0, 40, 10], [40, 20, 60, 30]]
    assert [each["cells"] for each in found] == [2, 1] and [each["mass"] for each in found] == pytest.approx([60, 30])
    assert part_boxes(attention, attention > 0.2, (10, 5, 13, 8))[1]["box"] == [12, 7, 13, 8]
