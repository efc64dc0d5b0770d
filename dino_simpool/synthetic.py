"""The embedded data set: images of ten kinds of objects on clutter, made from a seed, with class, box and mask for each.

It exists so that training, evaluation and attention maps can be tried on any machine without a download, on images made like those
of real categories: an object of class-typical outline and inner structure, in any pose, size, place, palette and light, in front of
fragments that belong to no class. What two crops of one image share is what self-distillation learns. So whatever tells single
images apart (colours, light, fragments) is either removed by the augmentation or drawn from one distribution for all images, and
no colour, brightness or area belongs to a class. Only numpy and Pillow are needed.

Letters: S side of the image in pixels; x, y object coordinates (the object reaches to about 1), r, a the same in polar form.
"""
from __future__ import annotations

import colorsys
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

Field = np.ndarray
Region = Callable[[Field, Field, Field, Field], Field]
"""Which points belong to it: (x, y, r, a) -> bool, all of one shape."""

FIRST_VAL_NUMBER = 1_000_000
"""Images of val are numbered from here, so that no drawing is ever in train and val both."""
AREA = (0.2, 0.33)
"""Share of the image that an object is drawn to cover."""
FORMAT = 1
"""Raised when the same settings would give other pixels."""


def _star(x: Field, y: Field, r: Field, a: Field) -> Field:
    turn = np.abs((a / (2 * np.pi) * 5 + 0.5) % 1 - 0.5) * (2 * np.pi / 5)  # angle from the nearest tip
    return r * (np.cos(turn) + 1.1 * np.sin(turn)) < 1


def _fish(x: Field, y: Field, r: Field, a: Field) -> Field:
    return ((x - 0.22) ** 2 / 0.62 + y**2 / 0.3 < 1) | ((x < -0.3) & (x > -1) & (np.abs(y) < 0.12 - 0.6 * (x + 0.3)))


SHAPES: dict[str, tuple[Region, Region]] = {
    # name: (outline, inner structure, painted in the second colour where it holds)
    "chessboard": (
        lambda x, y, r, a: np.maximum(np.abs(x), np.abs(y)) < 0.8,
        lambda x, y, r, a: np.sin(7.0 * x) * np.sin(7.0 * y) > 0,
    ),
    "crescent": (
        lambda x, y, r, a: (r < 1) & (np.hypot(x - 0.6, y) > 0.65),
        lambda x, y, r, a: np.cos(9 * x + 1) * np.cos(9 * y) > 0.5,
    ),
    "cross": (
        lambda x, y, r, a: (np.minimum(np.abs(x), np.abs(y)) < 0.36) & (np.maximum(np.abs(x), np.abs(y)) < 1),
        lambda x, y, r, a: (np.minimum(np.abs(x), np.abs(y)) < 0.14) & (np.maximum(np.abs(x), np.abs(y)) < 0.8),
    ),
    "fish": (_fish, lambda x, y, r, a: (np.sin(11 * np.hypot(x - 1.2, y)) > 0.2) & (x < 0.5)),
    "flower": (
        lambda x, y, r, a: r < 0.78 + 0.24 * np.cos(6 * a),
        lambda x, y, r, a: (r < 0.28) | ((np.cos(6 * a) > 0.75) & (r > 0.45) & (r < 0.85)),
    ),
    "gear": (
        lambda x, y, r, a: r < 0.82 + 0.18 * (np.cos(9 * a) > 0),
        lambda x, y, r, a: (r > 0.3) & (r < 0.66) & (np.cos(4 * a) > -0.3),
    ),
    "ladder": (
        lambda x, y, r, a: (np.abs(x) < 0.5) & (np.abs(y) < 1.05),
        lambda x, y, r, a: (np.abs(x) < 0.3) & (np.sin(9.4 * y) > -0.25),
    ),
    "leaf": (
        lambda x, y, r, a: (np.hypot(x, y - 0.55) < 1.1) & (np.hypot(x, y + 0.55) < 1.1),
        lambda x, y, r, a: (np.abs(y) < 0.07) | (np.sin(11 * (x - np.abs(y))) > 0.55),
    ),
    "spiral": (
        lambda x, y, r, a: r < 0.95,
        lambda x, y, r, a: np.sin(a + 2 * np.pi * r / 0.42) > 0,
    ),
    "star": (_star, lambda x, y, r, a: np.sin(5 * a) > 0),
}
"""The classes, in the sorted order that class folders get."""


@functools.cache
def _outline_points(class_id: int) -> np.ndarray:
    """Grid points (n, 2) inside the outline of a class, moved and scaled to mean 0 and area 1."""
    step = 0.04
    x, y = np.meshgrid(*[np.arange(-1.3, 1.3, step)] * 2)
    inside = _region(SHAPES[list(SHAPES)[class_id]][0], x, y)
    return np.stack([x[inside], y[inside]], axis=1)


def _region(region: Region, x: Field, y: Field) -> Field:
    return region(x, y, np.hypot(x, y), np.arctan2(y, x))


def _colour(rng: np.random.Generator, value: float) -> np.ndarray:
    """A colour of any hue, RGB in 0..1, about as bright as `value`."""
    return np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.05, 0.45), np.clip(value + rng.uniform(-0.1, 0.1), 0, 1)))


def _clutter(rng: np.random.Generator, side: int) -> np.ndarray:
    """Background (side, side, 3) in 0..1: uneven ground under fragments of strokes, arcs and corners, alike in all images."""
    ground = np.full((side, side, 3), 0.0)
    for cells, strength in ((3, 0.5), (9, 0.5)):
        noise = (rng.uniform(0.35, 0.65, (cells, cells, 3)) * 255).astype(np.uint8)
        ground += strength * np.asarray(Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC), np.float64)
    canvas = Image.fromarray(ground.astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(26):
        colour = tuple(int(255 * c) for c in _colour(rng, rng.choice([0.25, 0.85])))
        centre, length, angle = rng.uniform(0, side, 2), side * rng.uniform(0.05, 0.13), rng.uniform(0, 2 * math.pi)
        width = max(1, round(side * rng.uniform(0.02, 0.05)))
        along = length * np.array([math.cos(angle), math.sin(angle)])
        across = along[::-1] * (1, -1) * rng.uniform(0.3, 1)
        kind = rng.integers(4)
        if kind == 0:
            draw.line([*(centre - along), *(centre + along)], fill=colour, width=width)
        elif kind == 1:
            draw.arc([*(centre - length), *(centre + length)], math.degrees(angle), math.degrees(angle) + 150, colour, width)
        elif kind == 2:
            draw.line([*(centre + along), *centre, *(centre + across)], fill=colour, width=width)
        else:
            draw.polygon([*(centre + along), *(centre - along), *(centre + across)], fill=colour)
    return np.asarray(canvas, np.float64) / 255


def _pose(rng: np.random.Generator, class_id: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (2, 2) from object coordinates to pixels and the place (2,) of the object's origin, all of it inside the image."""
    points = _outline_points(class_id)
    angle, stretch, shear = rng.uniform(-0.6, 0.6), math.exp(rng.uniform(-0.15, 0.15)), rng.uniform(-0.2, 0.2)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = turn @ np.array([[1, shear], [0, 1]]) @ np.diag([stretch, rng.choice([-1, 1]) / stretch])
    unit_area = len(points) * 0.04**2
    matrix *= side * math.sqrt(rng.uniform(*AREA) / unit_area)
    reach = points @ matrix.T
    low, high = reach.min(0), reach.max(0)
    matrix *= min(1.0, 0.96 * side / (high - low).max())
    reach = points @ matrix.T
    low, high = reach.min(0), reach.max(0)
    return matrix, (0.02 * side - low) + rng.beta(0.7, 0.7, 2) * (0.96 * side - (high - low))


def draw_image(seed: int, class_id: int, number: int, *, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image `number` of class `class_id`: rgb (S, S, 3) uint8 and the object's mask (S, S) bool, the same for the same arguments."""
    rng = np.random.default_rng((seed, class_id, number))
    outline, structure = list(SHAPES.values())[class_id]
    side = 2 * size  # drawn twice as large and averaged, so that edges are smooth
    image = _clutter(rng, side)
    matrix, origin = _pose(rng, class_id, side)
    column, row = np.meshgrid(*[np.arange(side) + 0.5] * 2)
    x, y = np.einsum("ij,jrc->irc", np.linalg.inv(matrix), np.stack([column - origin[0], row - origin[1]]))
    body = _region(outline, x, y)
    inner = body & _region(structure, x, y)
    values = rng.permutation([0.25, 0.85])
    image[body] = _colour(rng, values[0])
    image[inner] = _colour(rng, values[1])
    angle = rng.uniform(0, 2 * math.pi)
    light = rng.uniform(0.8, 1.15) * (1 + rng.uniform(0, 0.3) * (column * math.cos(angle) + row * math.sin(angle) - side / 2) / side)
    image *= light[..., None]
    image = image.reshape(size, 2, size, 2, 3).mean((1, 3)) + rng.normal(0, 0.02, (size, size, 3))
    mask = body.reshape(size, 2, size, 2).mean((1, 3)) >= 0.5
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), mask
