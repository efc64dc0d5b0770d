"""The embedded data set: ten kinds of objects on clutter, drawn from a seed.

Each image has a class, a box and a mask. The set lets training, evaluation and attention maps be
tried on any machine without a download. The images resemble those of real categories: an object
with the outline and inner structure of its class, in varied pose, size, place, palette and light,
in front of fragments that belong to no class. Self-distillation learns what two crops of one image
share. So everything that distinguishes single images (colors, light, fragments) is either removed
by the augmentation or drawn from one distribution for all images, and no color, brightness or area
belongs to a class. Needs only numpy and Pillow.

Letters: S side of the image in pixels; x, y object coordinates (the object reaches to about 1); r,
a the same in polar form.
"""

from __future__ import annotations

import colorsys
import contextlib
import functools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dino_simpool.config import SyntheticConfig
from dino_simpool.files import full_disk_named

Field = np.ndarray
Region = Callable[[Field, Field, Field, Field], Field]
"""Which points belong to a region: (x, y, r, a) -> bool, all of one shape."""
Structure = Callable[[Field, Field, Field, Field, float], Field]
"""The same with a phase (0 to 2 pi) that shifts the pattern."""

FIRST_VAL_NUMBER = 1_000_000
"""Images of val are numbered from here, so train and val have no image in common."""
AREA = (0.12, 0.24)
"""Range of the fraction of the image that an object covers."""
ROTATION = 0.5
"""Largest rotation of an object in either direction, in radians."""
DARK, LIGHT = 0.2, 0.8
"""Brightness of the two colors of an object, in either order, and of the fragments."""
FRAGMENTS = 6
"""Pieces of clutter in each image."""
GRID_STEP = 0.04
FORMAT = 1
"""Increased when the same settings would give other pixels."""


def _star(x: Field, y: Field, r: Field, a: Field) -> Field:
    turn = np.abs((a / (2 * np.pi) * 5 + 0.5) % 1 - 0.5) * (2 * np.pi / 5)  # angle from the nearest tip
    return r * (np.cos(turn) + 1.1 * np.sin(turn)) < 1


def _fish(x: Field, y: Field, r: Field, a: Field) -> Field:
    return ((x - 0.22) ** 2 / 0.62 + y**2 / 0.3 < 1) | ((x < -0.3) & (x > -1) & (np.abs(y) < 0.12 - 0.6 * (x + 0.3)))


def _zigzag(x: Field) -> Field:
    return np.abs(9 * x / np.pi % 2 - 1)


SHAPES: dict[str, tuple[Region, Structure]] = {
    # name: (outline, structure). The second color is painted where the structure is true. This is
    # about half of the object, so the two colors average to the ground and only the pattern shows
    # the class. It is fine enough to be seen in every local crop.
    "chessboard": (lambda x, y, r, a: np.maximum(np.abs(x), np.abs(y)) < 0.8,
                   lambda x, y, r, a, p: np.sin(10 * x + p) * np.sin(10 * y + p) > 0),
    "crescent": (lambda x, y, r, a: (r < 1) & (np.hypot(x - 0.6, y) > 0.65),
                 lambda x, y, r, a, p: (np.sin(12 * x + p) > 0) & (np.sin(12 * y + p) > 0)),
    "cross": (lambda x, y, r, a: (np.minimum(np.abs(x), np.abs(y)) < 0.38) & (np.maximum(np.abs(x), np.abs(y)) < 1),
              lambda x, y, r, a, p: np.sin(12 * (y + 0.35 * _zigzag(x)) + p) > 0),
    "fish": (_fish, lambda x, y, r, a, p: np.sin(12 * x + p) > 0),
    "flower": (lambda x, y, r, a: r < 0.8 + 0.22 * np.cos(5 * a), lambda x, y, r, a, p: np.sin(14 * r + p) > 0),
    "gear": (lambda x, y, r, a: r < 0.82 + 0.18 * (np.cos(9 * a) > 0), lambda x, y, r, a, p: np.sin(11 * a + p) > 0),
    "ladder": (lambda x, y, r, a: (np.abs(x) < 0.5) & (np.abs(y) < 1.05), lambda x, y, r, a, p: np.sin(7 * y + p) > 0),
    "leaf": (lambda x, y, r, a: (np.hypot(x, y - 0.55) < 1.1) & (np.hypot(x, y + 0.55) < 1.1),
             lambda x, y, r, a, p: np.sin(12 * (x - np.abs(y)) + p) > 0),
    "spiral": (lambda x, y, r, a: r < 0.95, lambda x, y, r, a, p: np.sin(2 * a + 14 * r + p) > 0),
    "star": (_star, lambda x, y, r, a, p: np.sin(5 * a + p) > 0),
}  # fmt: skip
"""The classes, sorted like class folders."""


@functools.cache
def _outline_points(class_id: int) -> np.ndarray:
    """(n, 2): points of a grid with steps of GRID_STEP inside the outline of a class."""
    x, y = np.meshgrid(*[np.arange(-1.3, 1.3, GRID_STEP)] * 2)
    outline, _ = list(SHAPES.values())[class_id]
    inside = outline(x, y, np.hypot(x, y), np.arctan2(y, x))
    return np.stack([x[inside], y[inside]], axis=1)


def _color(rng: np.random.Generator, value: float) -> tuple[float, ...]:
    """A color of any hue, RGB in 0..255, with a brightness of about `value` (0..1)."""
    hue, saturation, shift = rng.uniform((0, 0, -0.1), (1, 0.3, 0.1))
    return tuple(255 * c for c in colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + shift)))


def _clutter(rng: np.random.Generator, side: int) -> np.ndarray:
    """Background (side, side, 3) in 0..255: strokes, arcs, corners, splinters on uneven ground."""
    noise = rng.normal(0, 1, (10, 10))
    noise = np.clip(128 + 20 * (noise - noise.mean()) / noise.std(), 0, 255).astype(np.uint8)
    canvas = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).convert("RGB")
    draw = ImageDraw.Draw(canvas)
    for _ in range(FRAGMENTS):
        color = tuple(int(c) for c in _color(rng, DARK if rng.uniform() < 0.5 else LIGHT))
        x, y, length, angle, slant = rng.uniform((0, 0, 0.05, 0, 0.3), (1, 1, 0.13, 2 * math.pi, 1)) * (side, side, side, 1, 1)
        width = max(1, round(side * rng.uniform(0.02, 0.05)))
        dx, dy = length * math.cos(angle), length * math.sin(angle)
        start, end, third = (x + dx, y + dy), (x - dx, y - dy), (x + slant * dy, y - slant * dx)
        match rng.integers(4):
            case 0:
                draw.line([start, end], color, width)
            case 1:
                draw.line([start, (x, y), third], color, width)
            case 2:
                draw.polygon([start, end, third], color)
            case _:
                turn = math.degrees(angle)
                draw.arc([x - length, y - length, x + length, y + length], turn, turn + 150, color, width)
    return np.array(canvas, np.float32)


def _pose(rng: np.random.Generator, class_id: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(2, 2) matrix from object coordinates to pixels, (2,) origin. The whole object is inside."""
    points = _outline_points(class_id)
    angle, shear, stretch = rng.uniform((-ROTATION, -0.15, -0.1), (ROTATION, 0.15, 0.1))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    mirror = -1 if rng.uniform() < 0.5 else 1
    matrix = turn @ np.array([[1, shear], [0, 1]]) @ np.diag([mirror * math.exp(stretch), math.exp(-stretch)])
    matrix *= side * math.sqrt(rng.uniform(*AREA) / (len(points) * GRID_STEP**2))
    reach = points @ matrix.T
    low, high = reach.min(0), reach.max(0)
    fit = min(1.0, 0.96 * side / (high - low).max())  # a long object that would not fit is drawn smaller
    matrix, low, high = fit * matrix, fit * low, fit * high
    slack = 0.96 * side - (high - low)
    return matrix, 0.02 * side - low + rng.uniform(0, 1, 2) * slack


def draw_image(seed: int, class_id: int, number: int, *, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image `number` of class `class_id`: rgb (S, S, 3) uint8 and the object's mask (S, S) bool.

    The same arguments give the same image. ValueError if an argument is out of range.
    """
    if not 0 <= class_id < len(SHAPES) or min(seed, number) < 0 or size < 16:
        raise ValueError(
            f"seed {seed}, class {class_id}, number {number}, size {size}: give a class from 0 to "
            f"{len(SHAPES) - 1}, a seed and a number of 0 or more, and a size of 16 or more"
        )
    rng = np.random.default_rng((seed, class_id, number))
    side = 2 * size  # drawn at twice the size and averaged, for smooth edges
    image = _clutter(rng, side)
    matrix, origin = _pose(rng, class_id, side)
    row, column = np.mgrid[:side, :side].astype(np.float32) + np.float32(0.5)
    inverse = np.linalg.inv(matrix).astype(np.float32)
    dx, dy = column - np.float32(origin[0]), row - np.float32(origin[1])
    x, y = inverse[0, 0] * dx + inverse[0, 1] * dy, inverse[1, 0] * dx + inverse[1, 1] * dy
    r, a = np.hypot(x, y), np.arctan2(y, x)
    outline, structure = list(SHAPES.values())[class_id]
    body = outline(x, y, r, a)
    first, second = (DARK, LIGHT) if rng.uniform() < 0.5 else (LIGHT, DARK)
    image[body] = _color(rng, first)
    image[body & structure(x, y, r, a, rng.uniform(0, 2 * math.pi))] = _color(rng, second)
    angle, slope, exposure = rng.uniform((0, 0, 0.8), (2 * math.pi, 0.2, 1.2))
    across = column[0] / side - 0.5
    image *= exposure * (1 + slope * (math.cos(angle) * across + math.sin(angle) * across[:, None]))[..., None]
    image = _halve(image) + rng.normal(0, 5, (size, size, 3))
    return np.clip(image, 0, 255).round().astype(np.uint8), _halve(body) >= 0.5


def _halve(field: np.ndarray) -> np.ndarray:
    """(2 S, 2 S, ...) -> (S, S, ...), the mean of each 2 x 2 block."""
    return (field[::2, ::2] + np.float32(0) + field[1::2, ::2] + field[::2, 1::2] + field[1::2, 1::2]) / 4


def write_dataset(
    folder: str | Path, *, seed: int = 0, classes: int = 10, train_per_class: int = 300, val_per_class: int = 60, size: int = 40
) -> None:
    """Write {train,val}/<class>/<name>.png, masks/ of the same form, and annotations.json.

    The annotations are the class and box of each image. A box is (x0, y0, x1, y1) in pixels, x1 and
    y1 exclusive. The folder gets its name only when it is complete. One that already holds the set
    with the same settings is kept, with a message. ValueError if it holds anything else, or for
    settings out of range.
    """
    folder = Path(folder)
    if not 1 <= classes <= len(SHAPES) or not 0 < train_per_class <= FIRST_VAL_NUMBER or val_per_class < 0:
        raise ValueError(
            f"classes {classes}, train_per_class {train_per_class}, val_per_class {val_per_class}: give 1 to "
            f"{len(SHAPES)} classes, 1 to {FIRST_VAL_NUMBER} images of each to train and 0 or more to evaluate"
        )
    counts = {"classes": classes, "train_per_class": train_per_class, "val_per_class": val_per_class}
    settings = {"format": FORMAT, "seed": seed, **counts, "size": size}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        held = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            held = json.loads((folder / "annotations.json").read_text())["settings"]
        if held != settings:
            raise ValueError(f"{folder} is not empty and does not hold the set {settings}: give another folder or remove it")
        print(f"{folder} already holds this set: nothing was drawn", file=sys.stderr)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
        tree = Path(unfinished) / "set"
        images = []
        with full_disk_named(folder):
            for split, first, count in (("train", 0, train_per_class), ("val", FIRST_VAL_NUMBER, val_per_class)):
                for class_id in range(classes):
                    images += _write_class(tree, split, class_id, range(first, first + count), seed=seed, size=size)
            record = {"settings": settings, "classes": list(SHAPES)[:classes], "images": images}
            (tree / "annotations.json").write_text(json.dumps(record, indent=1))
        os.replace(tree, folder)


def _write_class(tree: Path, split: str, class_id: int, numbers: range, *, seed: int, size: int) -> list[dict[str, object]]:
    name = list(SHAPES)[class_id]
    for parent in (tree, tree / "masks"):
        (parent / split / name).mkdir(parents=True)
    records: list[dict[str, object]] = []
    for number in numbers:
        rgb, mask = draw_image(seed, class_id, number, size=size)
        path = f"{split}/{name}/{name}_{number - numbers.start:04d}.png"
        Image.fromarray(rgb).save(tree / path, compress_level=1)
        Image.fromarray(mask).save(tree / "masks" / path)
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        box = [int(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
        records.append({"image": path, "mask": f"masks/{path}", "split": split, "class": name, "box": box})
    return records


def main(cfg: SyntheticConfig) -> None:
    """The command synthetic."""
    if not cfg.out:
        raise ValueError("no folder is given: use `dino-simpool synthetic DIR`")
    write_dataset(cfg.out, seed=cfg.seed, train_per_class=cfg.train_per_class, val_per_class=cfg.val_per_class, size=cfg.size)
