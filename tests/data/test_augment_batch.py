"""The batched color operations: each against a plain loop in float64, and all against the CPU path."""

from __future__ import annotations

import colorsys
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from test_augment import SMALL, one_view, picture, recipe, stored
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dino_simpool.data.augment import ViewDraw, batch, pixels
from dino_simpool.data.augment.draw import blur_kernel

GRAY = np.array([0.299, 0.587, 0.114])


def by_loop(image: np.ndarray, draw: ViewDraw) -> np.ndarray:
    """The operations on one view (S, S, 3) in float64 without rounding, mostly pixel by pixel."""
    x = image.astype(np.float64)
    if draw.flip[0]:
        x = x[:, ::-1]
    for operation in draw.order[0] if draw.jitter[0] else ():
        factor = float(draw.factors[0, operation])
        if operation == 3:
            turn = int(factor * 255) / 256
            turned = [colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in x.reshape(-1, 3)]
            x = np.array([colorsys.hsv_to_rgb((h + turn) % 1, s, v) for h, s, v in turned]).reshape(x.shape) * 255
        else:
            other = [0.0, np.floor((x @ GRAY).mean() + 0.5), (x @ GRAY)[..., None]][operation]
            x = np.clip(factor * x + (1 - factor) * other, 0, 255)
    if draw.grayscale[0]:
        x = np.repeat((x @ GRAY)[..., None], 3, 2)
    if draw.sigma[0]:
        kernel = blur_kernel(float(draw.sigma[0]))
        radius = len(kernel) // 2
        padded = np.pad(x, ((radius, radius), (radius, radius), (0, 0)), mode="edge")
        size = len(x)
        rows = sum(w * padded[i : i + size] for i, w in enumerate(kernel))
        x = sum(w * rows[:, i : i + size] for i, w in enumerate(kernel))
    return np.where(x >= 128, 255 - x, x) if draw.solarize[0] else x


def in_batch(images: list[np.ndarray], draws: list[ViewDraw]) -> np.ndarray:
    views = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    parameters = torch.cat([batch.pack(draw, radius=6) for draw in draws])
    return batch.apply_colors(views, parameters).permute(0, 2, 3, 1).numpy()


CHANGES = [
    {},
    {"flip": True},
    {"grayscale": True},
    {"solarize": True},
    {"sigma": 0.3},
    {"sigma": 2.0},
    *({"jitter": True, "factors": [1.4, 0.6, 1.2, -0.1], "order": order} for order in itertools.permutations(range(4))),
    {"jitter": True, "factors": [0.6, 1.4, 0.8, 0.1], "flip": True, "grayscale": True, "sigma": 1.2, "solarize": True},
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_operations_equal_a_plain_loop(number):
    image, draw = np.asarray(picture(24, 24, seed=number)), one_view(**CHANGES[number])
    np.testing.assert_allclose(in_batch([image], [draw])[0], by_loop(image, draw), rtol=0, atol=0.02)


def test_each_view_of_a_batch_has_its_own_parameters():
    images = [np.asarray(picture(24, 24, seed=seed)) for seed in range(len(CHANGES))]
    draws = [one_view(**change) for change in CHANGES]
    for ours, image, draw in zip(in_batch(images, draws), images, draws, strict=True):
        np.testing.assert_allclose(ours, in_batch([image], [draw])[0], rtol=0, atol=1e-3)
        np.testing.assert_allclose(ours, by_loop(image, draw), rtol=0, atol=0.02)


@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), (255, 0, 0), (7, 7, 7)])
def test_flat_images(color):
    image = np.full((8, 8, 3), color, np.uint8)
    draw = one_view(jitter=True, factors=[1.3, 0.7, 0.8, 0.1], sigma=1.0)
    np.testing.assert_allclose(in_batch([image], [draw])[0], by_loop(image, draw), rtol=0, atol=0.02)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_views_smaller_than_the_blur(size):
    image, draw = np.asarray(picture(size, size)), one_view(sigma=2.0)
    np.testing.assert_allclose(in_batch([image], [draw])[0], by_loop(image, draw), rtol=0, atol=0.01)


def test_a_view_without_operations_is_unchanged_to_the_last_bit():
    image = np.asarray(picture(24, 24))
    np.testing.assert_array_equal(in_batch([image], [one_view()])[0], image)


def test_what_is_drawn_is_the_same_for_both_places():
    cpu = recipe(SMALL)
    device = dataclasses.replace(cpu, on_device=True)
    for index in range(50):
        key = {"seed": 3, "epoch": 7, "index": index}
        a, b = cpu.draw(40, 30, **key), device.draw(40, 30, **key)
        for field in dataclasses.fields(ViewDraw):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
        packed = device(stored(picture(40, 30)), **key)[-1]
        assert torch.equal(packed, batch.pack(a, radius=device.blur_radius))


def test_both_places_make_nearly_the_same_views():
    """The CPU rounds after each operation: 2 levels mostly, more where an 8-bit hue was rotated."""
    cpu = recipe(dataclasses.replace(SMALL, global_size=64, local_size=40))
    device = dataclasses.replace(cpu, on_device=True)
    spread = 255 * torch.tensor(cpu.std).view(3, 1, 1)
    largest, means = [], []
    for index in range(20):
        image, key = np.asarray(picture(90, 120, seed=index)), {"seed": 0, "epoch": 0, "index": index}
        draw = cpu.draw(90, 120, **key)
        views = [crop.finish([part[None] for part in crop.views(image, draw)]) for crop in (cpu, device)]
        for view, (a, b) in enumerate(zip(*views, strict=True)):
            distance = ((a - b) * spread).abs()
            means.append(distance.mean().item())
            largest.append((distance.max().item(), bool(draw.jitter[view])))
    assert max(value for value, jitter in largest if not jitter) <= 1.01
    assert max(value for value, jitter in largest) <= 16 and np.mean(means) < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finished_views_have_the_wanted_type_and_layout(dtype):
    crop = dataclasses.replace(recipe(SMALL), on_device=True)
    parts = [part[None] for part in crop(stored(picture(40, 40)), seed=0, epoch=0, index=0)]
    for view in crop.finish(parts, dtype=dtype):
        assert view.dtype == dtype and view.is_contiguous(memory_format=torch.channels_last)


def test_operations_are_compiled_once_and_give_the_same(monkeypatch):
    """Calling torch.compile for each batch takes as long as a small batch on a GPU."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append((function, options)) or function)
    batch.compiled_colors.cache_clear()
    crop = dataclasses.replace(recipe(SMALL), on_device=True)
    parts = [part[None] for part in crop(stored(picture(40, 40)), seed=0, epoch=0, index=0)]
    plain = crop.finish(parts)
    for _ in range(3):
        assert all(map(torch.equal, crop.finish(parts, compiled=True), plain))
    assert asked == [(batch.apply_colors, {"dynamic": False})]
    batch.compiled_colors.cache_clear()


def test_normalization_follows_its_arguments():
    """The cache does not mix up calls: other numbers, other widths, and the first ones again."""
    views = torch.arange(2 * 3 * 4 * 3, dtype=torch.uint8).reshape(2, 3, 4, 3)
    cases = [((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (0.2, 0.3, 0.4)), ((0.5, 0.4, 0.3), (1.0, 1.0, 1.0))]
    for mean, std in cases + cases[:1]:
        for x in (views, views[:, :, :2]):
            expected = (x.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
            ours = batch.normalize(x, mean=mean, std=std, dtype=torch.float32)
            torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("cached", [False, True])
def test_normalization_of_fake_tensors_does_not_reach_real_ones(cached):
    views, settings = torch.arange(72, dtype=torch.uint8).reshape(2, 3, 4, 3), {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    batch._along_rows.cache_clear()
    expected = batch.normalize(views, **settings, dtype=torch.float32)
    if not cached:
        batch._along_rows.cache_clear()
    with FakeTensorMode() as mode:
        fake = batch.normalize(mode.from_tensor(views), **settings, dtype=torch.float32)
    assert isinstance(fake, FakeTensor) and batch._along_rows.cache_info().currsize == cached
    assert torch.equal(batch.normalize(views, **settings, dtype=torch.float32), expected)


def test_the_widest_blur_sets_the_width_of_the_parameters():
    assert recipe(SMALL).blur_radius == 6
    wide = dataclasses.replace(recipe(dataclasses.replace(SMALL, blur_sigma=(4.0, 5.0), blur=(1.0,) * 3)), on_device=True)
    image = np.asarray(picture(60, 60))
    draw = wide.draw(60, 60, seed=0, epoch=0, index=0)
    assert wide.blur_radius == len(blur_kernel(5.0)) // 2
    ours = wide.finish([part[None] for part in wide.views(image, draw)])
    theirs = dataclasses.replace(wide, on_device=False)
    theirs = theirs.finish([part[None] for part in theirs.views(image, draw)])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.2)
    assert dataclasses.replace(recipe(SMALL), blur_sigma=(0.0, 0.0)).blur_radius == 0


def test_pixels_and_batch_number_the_operations_alike():
    assert [function.__name__ for function in pixels.ADJUST] == [f"adjust_{name}" for name in batch.JITTER]
