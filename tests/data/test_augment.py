"""The multi-crop recipe: each operation against torchvision and golden arrays, each distribution
against the published one."""

from __future__ import annotations

import dataclasses
import functools
import io
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

from dino_simpool.config import IMAGENET_MEAN, IMAGENET_STD, CropsConfig, DecodingSettings
from dino_simpool.data.augment import CROP_NUMBERS, MultiCrop, ViewDraw, crop_box, pixels, shrunk, to_tensor, uniforms
from dino_simpool.data.augment.draw import NUM_UNIFORMS, blur_kernel
from dino_simpool.data.decode import BrokenImage, EncodedImage

NUM_DRAWS = 10_000
SMALL = CropsConfig(global_size=32, local_size=20)


def recipe(crops: CropsConfig) -> MultiCrop:
    return MultiCrop(**dataclasses.asdict(crops), mean=IMAGENET_MEAN, std=IMAGENET_STD)


def picture(height: int, width: int, *, seed: int = 0) -> Image.Image:
    """Smooth colors with noise on top, so errors of resizing, hue and blur show."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    smooth = np.stack([np.sin(3 * x + y), np.cos(2 * y - x), np.sin(5 * x * y)], -1) * 100 + 128
    return Image.fromarray((smooth + random.normal(0, 30, smooth.shape)).clip(0, 255).astype(np.uint8))


def one_view(**changes) -> ViewDraw:
    """A draw of one view that leaves a 24 x 24 image unchanged, apart from `changes`."""
    nothing = {"box": [0, 0, 24, 24], "flip": False, "jitter": False, "factors": [1.0, 1.0, 1.0, 0.0], "order": [0, 1, 2, 3],
               "grayscale": False, "sigma": 0.0, "solarize": False}  # fmt: skip
    return ViewDraw(**{name: np.array([value]) for name, value in (nothing | changes).items()})


def stored(image: Image.Image, kind: str = "PNG", **options) -> EncodedImage:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return EncodedImage(file.getvalue(), name="x")


def assert_near(ours: np.ndarray, theirs: np.ndarray | Image.Image, levels: float, *, mean: float = math.inf) -> None:
    """At most this many of 255 levels apart, and this many on average."""
    distance = np.abs(np.asarray(ours).astype(float) - np.asarray(theirs).astype(float))
    assert distance.max() <= levels and distance.mean() <= mean, (distance.max(), distance.mean())


# -- random numbers


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x64 with 10 rounds, as in Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3
    (SC 2011)."""
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
    images = np.stack([uniforms(0, 0, i, rows=2, columns=NUM_UNIFORMS).ravel() for i in range(NUM_DRAWS)])
    epochs = np.stack([uniforms(0, e, 0, rows=1, columns=5).ravel() for e in range(NUM_DRAWS)])
    seeds = np.stack([uniforms(s, 0, 0, rows=1, columns=5).ravel() for s in range(NUM_DRAWS)])
    table = np.concatenate([images, np.roll(images[:, :5], 1, 0), epochs, seeds], 1)
    table = table[1:]  # image 0, epoch 0 and seed 0 are the same draw
    correlation = np.corrcoef(table, rowvar=False) - np.eye(table.shape[1])
    assert np.abs(correlation).max() < 5.5 / math.sqrt(len(table))


# -- distributions, against the published transforms or in closed form


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance of two empirical distribution functions.

    Scaled: 1.95 is exceeded once in 1,000.
    """
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
    numbers = uniforms(5, 0, 0, rows=NUM_DRAWS, columns=CROP_NUMBERS).tolist()
    ours = np.array([crop_box(height, width, scale=scale, numbers=row) for row in numbers])
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] > 0).all() and (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
    assert_same_boxes(ours, published_boxes(height, width, scale), height, width)


@pytest.mark.parametrize("size, box", [
    ((30, 30), [0, 0, 30, 30]), ((10, 100), [0, 43, 10, 13]), ((100, 10), [43, 0, 13, 10]), ((1, 1), [0, 0, 1, 1]),
])  # fmt: skip
def test_after_ten_failures_the_largest_center_crop_is_taken(size, box):
    # Twice the image's area never fits.
    numbers = uniforms(0, 0, 0, rows=1, columns=CROP_NUMBERS)[0].tolist()
    assert crop_box(*size, scale=(2.0, 2.0), numbers=numbers) == tuple(box)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3)])
def test_tiny_images_give_views(size):
    for index in range(20):
        for on_device in (False, True):
            crop = dataclasses.replace(recipe(SMALL), on_device=on_device)
            views = crop.finish([part[None] for part in crop(stored(picture(*size)), seed=0, epoch=0, index=index)])
            assert [view.shape[-1] for view in views] == [32] * 2 + [20] * 6 and all(v.isfinite().all() for v in views)


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


def test_views_stay_those_of_earlier_versions():
    """Each random quantity from its own column of the numbers, and from its low end up: runs repeat across versions."""
    recipe = MultiCrop(**dataclasses.asdict(SMALL), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    draw = recipe.draw(40, 50, seed=1, epoch=2, index=3)
    numbers = uniforms(1, 2, 3, rows=len(recipe.sizes), columns=CROP_NUMBERS + 14)
    sigma, blurred = 0.1 + 1.9 * numbers[:, -1], draw.sigma > 0
    assert blurred.any() and np.allclose(draw.sigma[blurred], sigma[blurred], rtol=1e-6)
    turned = np.array((0.6, 0.6, 0.8, -0.1)) + np.array((0.8, 0.8, 0.4, 0.2)) * numbers[:, -9:-5]
    assert np.allclose(draw.factors, turned, rtol=1e-5, atol=1e-6)
    assert (draw.order == numbers[:, -5:-1].argsort(1)).all() and (draw.flip == (numbers[:, CROP_NUMBERS] < 0.5)).all()


def test_probabilities_follow_the_options():
    never = dataclasses.replace(SMALL, flip=0.0, jitter_probability=0.0, grayscale=0.0, blur=(0.0,) * 3, solarize=(0.0,) * 3)
    draw = recipe(never).draw(30, 30, seed=0, epoch=0, index=0)
    assert not (draw.flip | draw.jitter | draw.grayscale | draw.solarize | (draw.sigma > 0)).any()
    always = dataclasses.replace(SMALL, flip=1.0, jitter_probability=1.0, grayscale=1.0, blur=(1.0,) * 3, solarize=(1.0,) * 3)
    draw = recipe(always).draw(30, 30, seed=0, epoch=0, index=0)
    assert (draw.flip & draw.jitter & draw.grayscale & draw.solarize & (draw.sigma > 0)).all()


# -- pixels, against Pillow and torchvision's operations on its images (bounds: see pixels.py)

THEIRS = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)
LEVELS = (1, 1, 2, 12)
"""The largest difference of each jitter operation from Pillow's."""


def test_golden_operations():
    with np.load(Path(__file__).parents[1] / "golden" / "open_aug.npz") as arrays:
        golden = {name.removeprefix("aug/"): arrays[name] for name in arrays.files}
    meta = json.loads(str(golden["meta"]))
    image = golden["in/img"]
    for name, function, levels in zip(("brightness", "contrast", "saturation", "hue"), pixels.ADJUST, LEVELS, strict=True):
        for factor in meta[name]:
            assert_near(function(image.copy(), factor), golden[f"out/{name}_{factor}"], levels, mean=1)
    for number, (*box, size) in enumerate(meta["crops"]):
        assert_near(pixels.resized_crop(image, tuple(box), size), golden[f"out/crop{number}"], 1)
    assert_near(pixels.adjust_saturation(image, 0.0), golden["out/grayscale"], 1)
    assert_near(pixels.solarize(image), golden["out/solarize"], 0)
    for sigma in meta["blur_radii"]:
        inside = np.s_[6:-6, 6:-6]
        assert_near(pixels.gaussian_blur(image, sigma)[inside], golden[f"out/blur_{sigma}"][inside], 3)
    ours = to_tensor([Image.fromarray(image)], mean=meta["mean"], std=meta["std"])[0].numpy()
    np.testing.assert_allclose(ours, golden["out/to_tensor_normalize"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(24, 24), (1, 1), (3, 17), (224, 224)])
def test_jitter_is_near_torchvision_on_pil_images(size):
    image, random = picture(*size), np.random.default_rng(0)
    for ours, published, spread, levels in zip(pixels.ADJUST, THEIRS, (1.0, 1.0, 1.0, 0.5), LEVELS, strict=True):
        for shift in (-spread, 0.0, spread, *random.uniform(-spread, spread, 5)):
            factor = float(shift) if published is reference.adjust_hue else 1 + float(shift)
            assert_near(ours(np.array(image), factor), published(image, factor), levels, mean=1.5)


def test_jitter_of_flat_images_is_near_torchvision():
    for color in ((0, 0, 0), (255, 255, 255), (255, 0, 0), (1, 2, 3)):
        image = Image.new("RGB", (5, 4), color)
        assert_near(pixels.adjust_contrast(np.array(image), 0.6), reference.adjust_contrast(image, 0.6), 1)
        assert_near(pixels.adjust_hue(np.array(image), -0.1), reference.adjust_hue(image, -0.1), 6)


def test_crop_equals_torchvision():
    """Also where Pillow runs the vertical pass first, which shows at the edges of such an image."""
    image, random = picture(90, 120), np.random.default_rng(0)
    down_first = 0
    for size in (20, 32, 96):
        for _ in range(30):
            height, width = int(random.integers(1, 91)), int(random.integers(1, 121))
            box = (int(random.integers(0, 91 - height)), int(random.integers(0, 121 - width)), height, width)
            down_first += height > size and height - size > 2 * (width - size)
            theirs = reference.resized_crop(image, *box, [size, size], transforms.InterpolationMode.BICUBIC)
            assert_near(pixels.resized_crop(np.asarray(image), box, size), theirs, 2, mean=0.02)  # it is half noise
    assert down_first >= 10


def test_crop_of_black_and_white_noise_is_within_two_levels():
    noise = np.random.default_rng(0).integers(0, 2, (300, 200, 3), np.uint8) * 255
    for height, width, size in ((300, 200, 96), (200, 200, 224), (97, 95, 96), (150, 121, 96), (150, 123, 96), (60, 200, 96)):
        theirs = reference.resized_crop(
            Image.fromarray(noise), 0, 0, height, width, [size] * 2, transforms.InterpolationMode.BICUBIC
        )
        assert_near(pixels.resized_crop(noise, (0, 0, height, width), size), theirs, 2)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_jitter_is_applied_in_the_drawn_order(order):
    image, factors = picture(24, 24), [1.4, 0.6, 1.2, 0.1]
    expected, others = image, image
    for operation in order:
        expected = THEIRS[operation](expected, factors[operation])
    for operation in order[::-1]:
        others = THEIRS[operation](others, factors[operation])
    ours = pixels.apply_colors(np.array(image), one_view(jitter=True, factors=factors, order=order), 0)
    assert_near(ours, expected, 16, mean=2)
    distance = [np.abs(ours.astype(int) - np.asarray(other)).mean() for other in (expected, others)]
    assert distance[0] < 0.7 * distance[1], "the reverse order is another image"


def test_operations_follow_each_other_as_published():
    image = picture(60, 50)
    draw = one_view(box=[10, 5, 40, 30], flip=True, jitter=True, factors=[0.7, 1.3, 0.9, -0.05], order=[3, 1, 0, 2],
                    grayscale=True, sigma=1.3, solarize=True)  # fmt: skip
    expected = reference.resized_crop(image, 10, 5, 40, 30, [24, 24], transforms.InterpolationMode.BICUBIC)
    expected = reference.adjust_hue(reference.hflip(expected), -0.05)
    expected = reference.adjust_brightness(reference.adjust_contrast(expected, 1.3), 0.7)
    expected = reference.rgb_to_grayscale(reference.adjust_saturation(expected, 0.9), num_output_channels=3)
    expected = reference.solarize(expected.filter(ImageFilter.GaussianBlur(radius=1.3)), 128)
    ours = pixels.apply_colors(pixels.resized_crop(np.asarray(image), (10, 5, 40, 30), 24), draw, 0)
    assert_near(ours[3:-3, 3:-3], np.asarray(expected)[3:-3, 3:-3], 6, mean=1.5)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.7, 2.0])
def test_blur_is_that_of_pillow(sigma):
    image = picture(64, 48)
    ours, theirs = pixels.gaussian_blur(np.asarray(image), sigma), image.filter(ImageFilter.GaussianBlur(sigma))
    assert_near(ours[6:-6, 6:-6], np.asarray(theirs)[6:-6, 6:-6], 3, mean=1)
    assert_near(ours, theirs, 40)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.0, 1.5, 2.0, 5.0])
def test_the_blur_has_the_requested_variance(sigma):
    kernel = blur_kernel(sigma)
    place = np.arange(len(kernel)) - len(kernel) // 2
    assert kernel.sum() == pytest.approx(1) and np.allclose(kernel, kernel[::-1]) and (kernel >= 0).all()
    assert (kernel * place**2).sum() == pytest.approx(sigma**2)


def test_solarize_inverts_from_128_on():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, 2)
    np.testing.assert_array_equal(pixels.solarize(levels), np.where(levels >= 128, 255 - levels, levels))


def test_to_tensor_equals_torchvision():
    images = [picture(20, 30, seed=seed) for seed in range(3)]
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    ours = to_tensor(images, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    torch.testing.assert_close(ours, torch.stack([theirs(image) for image in images]), rtol=0, atol=1e-5)


# -- the whole


def test_views_are_the_drawn_ones_in_order():
    image, crop = picture(60, 50), recipe(SMALL)
    views = crop(stored(image), seed=4, epoch=5, index=6)
    assert [tuple(view.shape) for view in views] == [(32, 32, 3)] * 2 + [(20, 20, 3)] * 6
    draw = crop.draw(60, 50, seed=4, epoch=5, index=6)
    finished = crop.finish([view[None] for view in views])
    normalize = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    for number, (view, done, size) in enumerate(zip(views, finished, crop.sizes, strict=True)):
        expected = pixels.resized_crop(np.asarray(image), tuple(draw.box[number].tolist()), size)
        expected = torch.from_numpy(pixels.apply_colors(expected, draw, number))
        assert torch.equal(view, expected)
        assert done.is_contiguous(memory_format=torch.channels_last) and done.shape == (1, 3, size, size)
        torch.testing.assert_close(done[0], normalize(expected.permute(2, 0, 1) / 255), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_batch_is_finished_as_its_images_are_alone(on_device):
    crop = dataclasses.replace(recipe(SMALL), on_device=on_device)
    items = [crop(stored(picture(40 + i, 50, seed=i)), seed=0, epoch=0, index=i) for i in range(3)]
    together = crop.finish([torch.stack(parts) for parts in zip(*items, strict=True)])
    for i, item in enumerate(items):
        for ours, alone in zip(together, crop.finish([part[None] for part in item]), strict=True):
            torch.testing.assert_close(ours[i], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("on_device", [False, True])
def test_no_local_views(on_device):
    crop = dataclasses.replace(recipe(dataclasses.replace(SMALL, num_local=0)), on_device=on_device)
    parts = crop(stored(picture(32, 32)), seed=0, epoch=0, index=0)
    assert [tuple(view.shape) for view in crop.finish([part[None] for part in parts])] == [(1, 3, 32, 32)] * 2


@pytest.mark.parametrize("on_device", [False, True])
def test_the_image_and_global_random_states_stay_unchanged(on_device):
    image, crop = np.asarray(picture(40, 40)), dataclasses.replace(recipe(SMALL), on_device=on_device)
    before, states = image.copy(), (torch.get_rng_state(), np.random.get_state()[1].copy())
    for index in range(20):
        crop.views(image, crop.draw(40, 40, seed=0, epoch=0, index=index))
    whole = one_view(box=[0, 0, 40, 40], flip=True, jitter=True, solarize=True)
    pixels.apply_colors(pixels.resized_crop(image, (0, 0, 40, 40), 40), whole, 0)  # nothing to resize, but still a copy
    np.testing.assert_array_equal(image, before)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()


def test_survives_pickling():
    crop, file = recipe(SMALL), stored(picture(40, 40))
    ours = crop(file, seed=0, epoch=0, index=0)
    theirs = pickle.loads(pickle.dumps(crop))(file, seed=0, epoch=0, index=0)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- decoding


@pytest.mark.parametrize("options", [{}, {"quality": 95, "subsampling": 0}, {"progressive": True}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(37, 53), (1, 1), (16, 16)])
def test_jpeg_files_are_decoded_to_the_pixels_of_pillow(mode, size, options):
    file = stored(picture(*size).convert(mode), "JPEG", **options)
    assert file.jpeg_size == size
    np.testing.assert_array_equal(file.pixels(), np.asarray(Image.open(io.BytesIO(file.file)).convert("RGB")))
    for shrink in (2, 4, 8):
        assert file.pixels(shrink=shrink).shape == (-(-size[0] // shrink), -(-size[1] // shrink), 3)


def test_files_that_only_pillow_reads():
    """A PNG, a CMYK JPEG, a JPEG that is too large, and one to be rotated: none counts as a plain
    JPEG."""
    image = picture(20, 30)
    assert stored(image).jpeg_size is None and stored(image.convert("CMYK"), "JPEG").jpeg_size is None
    plain = stored(image, "JPEG")
    assert dataclasses.replace(plain, decoding=DecodingSettings(max_pixels=20 * 30 - 1)).jpeg_size is None
    with pytest.raises(BrokenImage, match="max_pixels 599"):
        dataclasses.replace(plain, decoding=DecodingSettings(max_pixels=20 * 30 - 1)).pixels()
    tag = Image.Exif()
    tag[0x0112] = 6
    turned = dataclasses.replace(stored(image, "JPEG", exif=tag), decoding=DecodingSettings(exif_orientation=True))
    assert turned.pixels().shape == (30, 20, 3)
    assert dataclasses.replace(turned, decoding=DecodingSettings()).pixels().shape == (20, 30, 3)


def test_a_jpeg_with_a_wrong_byte_is_decoded_by_pillow_and_a_truncated_one_is_broken():
    file = stored(picture(64, 64), "JPEG").file
    stray = file[:-2] + b"\x00" + file[-2:]  # one byte too many before the end, as cameras write
    np.testing.assert_array_equal(EncodedImage(stray).pixels(), np.asarray(Image.open(io.BytesIO(stray)).convert("RGB")))
    with pytest.raises(BrokenImage, match="cut"):
        EncodedImage(file[: len(file) // 2], name="cut").pixels()


def test_a_jpeg_is_shrunk_only_if_every_crop_allows_it():
    crop = recipe(SMALL)  # views of 32 and 20 pixels, margin 2
    sides = [[64, 64], [64, 64], *[[40, 40]] * 6]

    def shrink(scale: int, **change) -> int:
        box = np.array([[0, 0, *np.array(side) * scale] for side in sides])
        for view, side in change.items():
            box[int(view[1:]), 3] = side
        return crop.shrink(dataclasses.replace(crop.draw(9, 9, seed=0, epoch=0, index=0), box=box))

    assert [shrink(scale) for scale in (1, 2, 3, 4, 7, 8, 30)] == [1, 2, 2, 4, 4, 8, 8]
    assert shrink(2, v0=127) == 1 and shrink(4, v5=159) == 2
    assert dataclasses.replace(crop, shrink_margin=None).shrink(crop.draw(9000, 9000, seed=0, epoch=0, index=0)) == 1


def test_shrunk_boxes_stay_inside_and_keep_their_place():
    for shrink in (2, 4, 8):
        for height, width in ((1001, 777), (1000, 776)):
            for index in range(50):
                for box in recipe(SMALL).draw(height, width, seed=0, epoch=0, index=index).box.tolist():
                    top, left, tall, wide = shrunk(box, shrink)
                    assert top >= 0 and left >= 0 and top + tall <= -(-height // shrink) and left + wide <= -(-width // shrink)
                    ends = np.array([top, left, top + tall, left + wide]) * shrink
                    assert np.abs(ends - (box[0], box[1], box[0] + box[2], box[1] + box[3])).max() <= shrink / 2


def test_views_of_a_shrunk_jpeg_are_those_of_the_whole():
    """The stated tolerance: 1 level on average in each view, with crop edges on pixels of the small
    image."""
    crop, seen = dataclasses.replace(recipe(SMALL), on_device=True), set()
    for (height, width), index in itertools.product(((1000, 1320), (500, 660), (240, 330)), range(8)):
        large = picture(height // 8, width // 8).resize((width, height), Image.Resampling.BICUBIC)
        file, key = stored(large, "JPEG", quality=92), {"seed": 0, "epoch": 0, "index": index}
        draw = crop.draw(height, width, **key)
        shrink = crop.shrink(draw)
        box = np.array([[side * shrink for side in shrunk(box, shrink)] for box in draw.box.tolist()])
        whole = crop.views(file.pixels(), dataclasses.replace(draw, box=box))
        for ours, theirs in zip(crop(file, **key)[:-1], whole[:-1], strict=True):
            assert torch.equal(ours, theirs) == (shrink == 1)
            assert_near(ours.numpy(), theirs.numpy(), 12, mean=1)
        seen.add(shrink)
    assert seen == {1, 2, 4, 8}
