"""The multi-crop recipe: each operation against torchvision and golden arrays, each distribution against the published one."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import functional as reference

from dino_simpool import augment
from dino_simpool.augment import MultiCrop, ViewDraw, apply_view, crop_boxes, to_tensor, uniforms
from dino_simpool.config import IMAGENET_MEAN, IMAGENET_STD, CropsConfig

NUM_DRAWS = 10_000
SMALL = CropsConfig(global_size=32, local_size=20)


def recipe(crops: CropsConfig) -> MultiCrop:
    return MultiCrop(**dataclasses.asdict(crops), mean=IMAGENET_MEAN, std=IMAGENET_STD)


def picture(height: int, width: int, *, seed: int = 0) -> Image.Image:
    """Smooth colours with noise on top, so that resizing, hue and blur all have something to get wrong."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    smooth = np.stack([np.sin(3 * x + y), np.cos(2 * y - x), np.sin(5 * x * y)], -1) * 100 + 128
    return Image.fromarray((smooth + random.normal(0, 30, smooth.shape)).clip(0, 255).astype(np.uint8))


def one_view(**changes) -> ViewDraw:
    """A draw of one view that leaves a 24 x 24 image as it is, but for the changes."""
    nothing = {"box": [0, 0, 24, 24], "flip": False, "jitter": False, "factors": [1.0, 1.0, 1.0, 0.0], "order": [0, 1, 2, 3],
               "grayscale": False, "sigma": 0.0, "solarize": False}  # fmt: skip
    return ViewDraw(**{name: np.array([value]) for name, value in (nothing | changes).items()})


def same(ours: Image.Image, theirs: Image.Image) -> None:
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


# -- random numbers


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x64 with 10 rounds, as in Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011)."""
    mask = 2**64 - 1
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [(second >> 64) ^ counter[1] ^ key[0], second & mask, (first >> 64) ^ counter[3] ^ key[1], first & mask]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return counter


@pytest.mark.parametrize("seed, epoch, index", [(0, 0, 0), (3, 7, 1_281_166), (-1, 299, 5), (2**63, 0, 1)])
def test_uniforms_follow_from_seed_epoch_and_index_by_the_published_generator(seed, epoch, index):
    # numpy's Philox steps its counter before each block of four.
    words = [word for block in range(1, 4) for word in philox([block, 0, index, epoch], [seed % 2**64, 0])]
    expected = np.array([word >> 11 for word in words]) / 2**53
    np.testing.assert_array_equal(uniforms(seed, epoch, index, rows=3, columns=4), expected.reshape(3, 4))


def test_a_view_does_not_depend_on_the_number_of_views_nor_on_earlier_calls():
    few, many = recipe(dataclasses.replace(SMALL, num_local=1)), recipe(SMALL)
    many.draw(40, 30, seed=9, epoch=9, index=9)
    a, b = few.draw(40, 30, seed=1, epoch=2, index=3), many.draw(40, 30, seed=1, epoch=2, index=3)
    for field in dataclasses.fields(ViewDraw):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name)[:3])


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"index": 1}])
def test_seed_epoch_and_index_each_change_everything(change):
    key = {"seed": 0, "epoch": 0, "index": 0}
    a, b = (recipe(SMALL).draw(100, 100, **k) for k in (key, key | change))
    assert not (a.factors == b.factors).any() and not (a.box == b.box).all(1).any()


def test_columns_views_images_and_epochs_are_uncorrelated():
    images = np.stack([uniforms(0, 0, i, rows=2, columns=augment.NUM_UNIFORMS).ravel() for i in range(NUM_DRAWS)])
    epochs = np.stack([uniforms(0, e, 0, rows=1, columns=5).ravel() for e in range(NUM_DRAWS)])
    seeds = np.stack([uniforms(s, 0, 0, rows=1, columns=5).ravel() for s in range(NUM_DRAWS)])
    table = np.concatenate([images, np.roll(images[:, :5], 1, 0), epochs, seeds], 1)
    table = table[1:]  # image 0, epoch 0 and seed 0 are one and the same draw
    correlation = np.corrcoef(table, rowvar=False) - np.eye(table.shape[1])
    assert np.abs(correlation).max() < 5.5 / math.sqrt(len(table))


# -- distributions, against the published transforms or in closed form


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance of two empirical distribution functions, scaled so that 1.95 is exceeded once in 1,000."""
    points = np.sort(np.concatenate([a, b]))
    ranks = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
    return float(np.abs(ranks[0] - ranks[1]).max() * math.sqrt(len(a) * len(b) / (len(a) + len(b))))


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    assert values.min() >= low and values.max() <= high
    grid = (np.arange(100_000) + 0.5) / 100_000 * (high - low) + low
    assert kolmogorov_smirnov(values, grid) < 1.95


def assert_rate(flags: np.ndarray, probability: float) -> None:
    spread = math.sqrt(len(flags) * probability * (1 - probability))
    assert abs(flags.sum() - len(flags) * probability) <= 3.3 * spread


@pytest.fixture(scope="module")
def draws() -> ViewDraw:
    """Fields of shape (NUM_DRAWS, 3, ...): the views are global 1, global 2, local."""
    crop = recipe(dataclasses.replace(SMALL, num_local=1))
    found = [crop.draw(375, 500, seed=0, epoch=0, index=i) for i in range(NUM_DRAWS)]
    return ViewDraw(**{f.name: np.stack([getattr(d, f.name) for d in found]) for f in dataclasses.fields(ViewDraw)})


@functools.cache
def published_boxes(height: int, width: int, scale: tuple[float, float]) -> np.ndarray:
    torch.manual_seed(0)
    image = Image.new("L", (width, height))
    get_params = transforms.RandomResizedCrop.get_params
    return np.array([get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(NUM_DRAWS)])


def assert_same_boxes(ours: np.ndarray, theirs: np.ndarray, height: int, width: int) -> None:
    def features(box: np.ndarray) -> np.ndarray:
        top, left, h, w = box.astype(np.float64).T
        free = np.stack([top / np.maximum(height - h, 1), left / np.maximum(width - w, 1)])
        return np.concatenate([[top, left, h, w, h * w, h / w, top + h / 2, left + w / 2], free])

    for a, b in zip(features(ours), features(theirs), strict=True):
        assert kolmogorov_smirnov(a, b) < 1.95


@pytest.mark.parametrize("view, scale", [(0, SMALL.global_scale), (1, SMALL.global_scale), (2, SMALL.local_scale)])
def test_boxes_are_distributed_as_published(draws, view, scale):
    assert_same_boxes(draws.box[:, view], published_boxes(375, 500, scale), 375, 500)


@pytest.mark.parametrize("height, width, scale", [
    (32, 32, (0.25, 1.0)), (32, 32, (0.05, 0.25)), (100, 28, (0.25, 1.0)), (60, 400, (0.14, 1.0)), (7, 9, (0.05, 0.14)),
])  # fmt: skip
def test_boxes_of_small_and_long_images_are_distributed_as_published(height, width, scale):
    numbers = uniforms(5, 0, 0, rows=NUM_DRAWS, columns=22)
    low, high = (np.full(NUM_DRAWS, share) for share in scale)
    ours = crop_boxes(height, width, low=low, high=high, numbers=numbers)
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] > 0).all() and (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
    assert_same_boxes(ours, published_boxes(height, width, scale), height, width)


@pytest.mark.parametrize("size, box", [
    ((30, 30), [0, 0, 30, 30]), ((10, 100), [0, 43, 10, 13]), ((100, 10), [43, 0, 13, 10]), ((1, 1), [0, 0, 1, 1]),
])  # fmt: skip
def test_after_ten_failures_the_largest_centre_crop_is_taken(size, box):
    # Twice the image's area never fits.
    found = crop_boxes(*size, low=np.array([2.0]), high=np.array([2.0]), numbers=uniforms(0, 0, 0, rows=1, columns=22))
    assert found.tolist() == [box]


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3)])
def test_tiny_images_give_views(size):
    for index in range(20):
        views = recipe(SMALL)(picture(*size), seed=0, epoch=0, index=index)
        assert all(torch.isfinite(view).all() for view in views)


def test_rates_are_the_published_ones(draws):
    for view in range(3):
        assert_rate(draws.flip[:, view], 0.5)
        assert_rate(draws.jitter[:, view], 0.8)
        assert_rate(draws.grayscale[:, view], 0.2)
        assert_rate(draws.sigma[:, view] > 0, (1.0, 0.1, 0.5)[view])
        assert_rate(draws.solarize[:, view], (0.0, 0.2, 0.0)[view])


def test_factors_sigma_and_order_are_uniform(draws):
    for view in range(3):
        for factor, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
            assert_uniform(draws.factors[:, view, factor], low, high)
        sigma = draws.sigma[:, view]
        assert_uniform(sigma[sigma > 0], 0.1, 2.0)
        orders, counts = np.unique(draws.order[:, view], axis=0, return_counts=True)
        assert orders.tolist() == [list(order) for order in itertools.permutations(range(4))]
        expected = NUM_DRAWS / 24
        assert ((counts - expected) ** 2 / expected).sum() < 49.7  # chi-square, 23 degrees of freedom, once in 1,000


def test_probabilities_follow_the_options():
    never = dataclasses.replace(SMALL, flip=0.0, jitter_probability=0.0, grayscale=0.0, blur=(0.0,) * 3, solarize=(0.0,) * 3)
    draw = recipe(never).draw(30, 30, seed=0, epoch=0, index=0)
    assert not (draw.flip | draw.jitter | draw.grayscale | draw.solarize | (draw.sigma > 0)).any()
    always = dataclasses.replace(SMALL, flip=1.0, jitter_probability=1.0, grayscale=1.0, blur=(1.0,) * 3, solarize=(1.0,) * 3)
    draw = recipe(always).draw(30, 30, seed=0, epoch=0, index=0)
    assert (draw.flip & draw.jitter & draw.grayscale & draw.solarize & (draw.sigma > 0)).all()


# -- pixels


def test_golden_operations():
    with np.load(Path(__file__).parent / "golden" / "open_aug.npz") as arrays:
        golden = {name.removeprefix("aug/"): arrays[name] for name in arrays.files}
    meta = json.loads(str(golden["meta"]))
    image = Image.fromarray(golden["in/img"])

    for name, function in zip(("brightness", "contrast", "saturation", "hue"), augment.JITTER, strict=True):
        for factor in meta[name]:
            np.testing.assert_array_equal(np.asarray(function(image, factor)), golden[f"out/{name}_{factor}"])
    for number, (*box, size) in enumerate(meta["crops"]):
        view = np.asarray(apply_view(image, one_view(box=box), 0, size=size))
        assert np.abs(view.astype(int) - golden[f"out/crop{number}"]).max() <= 1

    # Views are square and this image is 40 x 48: its left part is compared, away from the cut as far as the blur reaches.
    def left(**change) -> np.ndarray:
        return np.asarray(apply_view(image, one_view(box=[0, 0, 40, 40], **change), 0, size=40))

    np.testing.assert_array_equal(left(grayscale=True), golden["out/grayscale"][:, :40])
    np.testing.assert_array_equal(left(solarize=True), golden["out/solarize"][:, :40])
    np.testing.assert_array_equal(left(flip=True), golden["out/hflip"][:, 8:])
    for sigma in meta["blur_radii"]:
        np.testing.assert_array_equal(left(sigma=sigma)[:, :30], golden[f"out/blur_{sigma}"][:, :30])
    ours = to_tensor([image], mean=meta["mean"], std=meta["std"])[0].numpy()
    np.testing.assert_allclose(ours, golden["out/to_tensor_normalize"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(24, 24), (1, 1), (3, 17), (224, 224)])
def test_jitter_equals_torchvision_on_pil_images(size):
    image, random = picture(*size), np.random.default_rng(0)
    theirs = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)
    for ours, published, spread in zip(augment.JITTER, theirs, (1.0, 1.0, 1.0, 0.5), strict=True):
        for shift in (-spread, 0.0, spread, *random.uniform(-spread, spread, 5)):
            factor = float(shift) if published is reference.adjust_hue else 1 + float(shift)
            same(ours(image, factor), published(image, factor))


def test_jitter_of_flat_images_equals_torchvision():
    for color in ((0, 0, 0), (255, 255, 255), (255, 0, 0), (1, 2, 3)):
        image = Image.new("RGB", (5, 4), color)
        same(augment.adjust_contrast(image, 0.6), reference.adjust_contrast(image, 0.6))
        same(augment.adjust_hue(image, -0.1), reference.adjust_hue(image, -0.1))


def test_crop_equals_torchvision():
    image, random = picture(90, 120), np.random.default_rng(0)
    for size in (20, 32, 96):
        for _ in range(10):
            height, width = random.integers(1, 90), random.integers(1, 120)
            box = [int(random.integers(0, 91 - height)), int(random.integers(0, 121 - width)), int(height), int(width)]
            ours = apply_view(image, one_view(box=box), 0, size=size)
            same(ours, reference.resized_crop(image, *box, [size, size], transforms.InterpolationMode.BICUBIC))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_jitter_is_applied_in_the_drawn_order(order):
    image, factors = picture(24, 24), [1.4, 0.6, 1.2, 0.1]
    expected = image
    theirs = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)
    for operation in order:
        expected = theirs[operation](expected, factors[operation])
    same(apply_view(image, one_view(jitter=True, factors=factors, order=order), 0, size=24), expected)


def test_operations_follow_each_other_as_published():
    image = picture(60, 50)
    draw = one_view(box=[10, 5, 40, 30], flip=True, jitter=True, factors=[0.7, 1.3, 0.9, -0.05], order=[3, 1, 0, 2],
                    grayscale=True, sigma=1.3, solarize=True)  # fmt: skip
    expected = reference.resized_crop(image, 10, 5, 40, 30, [24, 24], transforms.InterpolationMode.BICUBIC)
    expected = reference.adjust_hue(reference.hflip(expected), -0.05)
    expected = reference.adjust_brightness(reference.adjust_contrast(expected, 1.3), 0.7)
    expected = reference.rgb_to_grayscale(reference.adjust_saturation(expected, 0.9), num_output_channels=3)
    expected = reference.solarize(expected.filter(ImageFilter.GaussianBlur(radius=1.3)), 128)
    same(apply_view(image, draw, 0, size=24), expected)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_sigma_is_the_standard_deviation_of_the_blur(sigma):
    image = Image.fromarray(np.where(np.arange(24) == 12, 255, 0).astype(np.uint8)[None].repeat(24, 0)).convert("RGB")
    line = np.asarray(apply_view(image, one_view(sigma=sigma), 0, size=24))[12, :, 0].astype(np.float64)
    measured = math.sqrt((line * (np.arange(24) - 12) ** 2).sum() / line.sum())
    assert measured == pytest.approx(sigma, rel=0.08)  # three box blurs, in 8 bits


def test_to_tensor_equals_torchvision():
    images = [picture(17, 13, seed=seed) for seed in range(3)]
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    ours = to_tensor(images, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    torch.testing.assert_close(ours, torch.stack([theirs(image) for image in images]), rtol=0, atol=1e-5)


# -- the whole


def test_views_are_the_drawn_ones_in_order():
    image, crop = picture(60, 50), recipe(SMALL)
    views = crop(image, seed=4, epoch=5, index=6)
    assert [tuple(view.shape) for view in views] == [(3, 32, 32)] * 2 + [(3, 20, 20)] * 6
    draw = crop.draw(60, 50, seed=4, epoch=5, index=6)
    for number, (view, size) in enumerate(zip(views, crop.sizes, strict=True)):
        expected = to_tensor([apply_view(image, draw, number, size=size)], mean=IMAGENET_MEAN, std=IMAGENET_STD)[0]
        assert torch.equal(view, expected)


def test_no_local_views():
    views = recipe(dataclasses.replace(SMALL, num_local=0))(picture(32, 32), seed=0, epoch=0, index=0)
    assert [tuple(view.shape) for view in views] == [(3, 32, 32)] * 2


def test_the_image_is_left_alone_and_global_random_states_too():
    image = picture(40, 40)
    before, states = np.asarray(image).copy(), (torch.get_rng_state(), np.random.get_state()[1].copy())
    recipe(SMALL)(image, seed=0, epoch=0, index=0)
    np.testing.assert_array_equal(np.asarray(image), before)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()


def test_survives_pickling():
    crop = recipe(SMALL)
    image = picture(40, 40)
    ours = crop(image, seed=0, epoch=0, index=0)
    theirs = pickle.loads(pickle.dumps(crop))(image, seed=0, epoch=0, index=0)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
