"""The pictures of the page: attention over held-out images, before and after training, and crops.

A panel is an SVG in pixels of the picture that the encoder saw: the picture in gray, the attention
in color above it, and the outline of the true mask, or, without a mask, of the cells with 60 % of
the attention. Color stands for attention relative to uniform attention, on one scale for all
panels, so that before and after can be compared; a separate scale for each image would show
structure in noise.

h, w: cells of the attention; S: side of the picture; seen: pixels of it that the cells cover.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_simpool.config import TrainConfig
from dino_simpool.data import EvalTransform, evenly, find_images, find_split, folder_or_archive, read_or_replace
from dino_simpool.data.augment import MultiCrop
from dino_simpool.data.value_range import with_range_of
from dino_simpool.eval.masks import mask_path, read_mask
from dino_simpool.features.encode import Forward, preprocessing
from dino_simpool.features.maps import Box, attention_maps, cell_coverage, mass_mask, seen_box, seen_size, shares
from dino_simpool.models.encoder import Encoder
from dino_simpool.pictures import enlarge, paint, to_bytes, unnormalize
from dino_simpool.report.page import escape

RAMP = [(255, 221, 87, 0), (252, 141, 50, 150), (214, 40, 57, 215), (140, 12, 74, 240)]
"""Color and opacity (RGBA) from no attention to the top of the scale."""
OUTLINE_CELLS = 64
"""A mask is drawn on a grid of at most this many cells per side."""


def attention_cards(encoders: dict[str, Encoder], data: str, *, num_images: int) -> str:
    """HTML of held-out images with the attention of each encoder.

    encoders: label -> encoder, all of the same architecture.   data: folder with val/ (or with the
    images themselves), and optionally masks/val/.   FileNotFoundError or ValueError if there are no
    images.
    """
    one = next(iter(encoders.values()))
    settings = preprocessing(one.config)
    side = settings["image_size"]
    seen = seen_size(one, side)
    # Beside train/, images are held out only in a folder of their own.
    parts = any(Path(folder_or_archive(str(Path(data) / name))).exists() for name in ("train", "val"))
    images = find_images(find_split(str(Path(data) / "val"), option="--data") if parts else data)
    chosen = evenly(len(images), num_images).tolist()
    transform = EvalTransform(**settings)
    relative, pixels = {}, torch.empty(0)
    for label, encoder in encoders.items():
        batches = list(attention_maps(encoder, images, chosen, Forward(transform, 16, 0)))
        maps, pixels = (torch.cat([batch[part] for batch in batches]) for part in (0, 1))
        relative[label] = maps.double() * maps[0].numel()
    top = max(2.0, torch.cat([attention.flatten() for attention in relative.values()]).quantile(0.99).item())
    shown = unnormalize(pixels, transform.mean, transform.std)
    cards = []
    for row, index in enumerate(chosen):
        path, name = Path(images.name(index)), f"held-out-{row}"
        mask_file, truth = mask_path(data, "val", path), None
        if mask_file.is_file():
            mask = read_mask(mask_file, images, index)
            truth = mask, seen_box(one, mask.shape, resize=settings["resize"], crop=side)
        picture = image_layer(to_bytes(shown[row]), side, side, name=name)
        figures = [figure(path.parent.name or path.name, (side, side), picture)]
        for label, attention in relative.items():
            lines, said = _compare(attention[row].numpy(), truth, seen)
            gray = f'<use href="#{name}" style="filter:grayscale(1)"/>'
            figures.append(figure(f"{label} {said}", (side, side), gray, heat_layer(attention[row] / top, seen), lines))
        cards.append(f'<div class="card panels">{"".join(figures)}</div>')
    scale = ", ".join(f"rgba({r},{g},{b},{a / 255:.2f})" for r, g, b, a in RAMP)
    note = (
        "What the pooling of the encoder weighs: the image, the attention before training, and after training. Color: 0× "
        f'<span class="scale" style="background:linear-gradient(90deg, {scale})"></span> {top:.1f}× uniform attention. '
        "Where the data have masks, the white line is the outline of the true object and the number is the density of "
        "attention on it (uniform: 1×). Without masks, the line encloses 60 % of the attention."
    )
    return f'<p class="soft">{note}</p><div class="cards">{"".join(cards)}</div>'


def _compare(attention: np.ndarray, truth: tuple[np.ndarray, Box] | None, seen: int) -> tuple[str, str]:
    """Outline of the true mask and density of attention in it, or outline of most attention."""
    if truth is None:
        return outline(mass_mask(attention), seen), ""
    cells = min(OUTLINE_CELLS, seen)
    lines = outline(cell_coverage(*truth, grid=(cells, cells)) >= 0.5, seen)
    height, width = attention.shape
    inside, area = shares(attention, cell_coverage(*truth, grid=(height, width)))
    return lines, f"{inside / area:.2f}×" if area else "(object cropped away)"


def crop_cards(cfg: TrainConfig, roots: list[str], *, num_images: int) -> str:
    """HTML of training images with the boxes of their crops and their views of the first epoch."""
    images = find_images(roots, cfg.data.excluded, subset_per_class=cfg.data.subset_per_class)
    images = images.with_decoding(with_range_of(images, cfg.data.decoding))
    augment = MultiCrop(**dataclasses.asdict(cfg.crops), mean=cfg.model.mean, std=cfg.model.std)
    cards = []
    for index in evenly(len(images), num_images).tolist():
        image, _ = read_or_replace(images.read, index, total=len(images), seed=cfg.run.seed, epoch=0)  # as in training
        draw = augment.draw(image.height, image.width, seed=cfg.run.seed, epoch=0, index=index)
        figures = []
        for view, pixels in enumerate(augment.views(np.asarray(image), draw)):
            side = len(pixels)
            label, width = (f"global {view + 1}", 92) if view < 2 else (f"local {view - 1}", 60)
            layer = image_layer(pixels.numpy(), side, side, name=f"view-{index}-{view}")
            figures.append(figure(label, (side, side), layer, width=width))
        small = image.copy()
        small.thumbnail((256, 256))
        layers = [image_layer(np.asarray(small), *image.size), *map(_box, range(len(draw.box)), draw.box.tolist())]
        original = figure("image and boxes", image.size, *layers)
        cards.append(f'<div class="card crops">{original}<div class="views">{"".join(figures)}</div></div>')
    note = "Views of training images in the first epoch. Boxes of global crops are blue, boxes of local crops orange."
    return f'<p class="soft">{note}</p><div class="cards wide">{"".join(cards)}</div>'


def _box(view: int, box: list[float]) -> str:
    """The crop box of a view: top, left, height, width in pixels of the image."""
    top, left, height, width = box
    place, color = f'x="{left}" y="{top}" width="{width}" height="{height}"', "var(--s1)" if view < 2 else "var(--s2)"
    return f'<rect {place} fill="none" stroke="{color}" stroke-width="2" vector-effect="non-scaling-stroke"/>'


def figure(caption: str, size: tuple[int, int], *layers: str, width: int | None = None) -> str:
    """A panel of width x height units, layers on top of each other, with a line of text under it.

    width: on the page, in pixels.
    """
    style, (across, down) = f' style="width:{width}px"' if width else "", size
    svg = f'<svg viewBox="0 0 {across} {down}">{"".join(layers)}</svg>'
    return f"<figure{style}>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def image_layer(pixels: np.ndarray, width: int, height: int, *, name: str = "", stretched: bool = False) -> str:
    """A picture (H, W, 3 or 4) uint8 as a PNG of this size on the panel. Small ones stay sharp.

    name: for using it again on the page.   stretched: fill the size, whatever the picture's shape.
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    link = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    style = ' preserveAspectRatio="none"' if stretched else ' style="image-rendering:pixelated"' if width <= 64 else ""
    named = f' id="{name}"' if name else ""
    return f'<image{named} href="{link}" width="{width}" height="{height}"{style}/>'


def heat_layer(strength: Tensor, seen: int) -> str:
    """Attention (h, w) as smooth color: 0 is transparent, 1 and above the end of the ramp."""
    height, width = strength.shape
    rgba = paint(enlarge(strength, (6 * height, 6 * width), smooth=True), RAMP)
    return image_layer(to_bytes(rgba), seen, seen, stretched=True)


def outline(mask: np.ndarray, seen: int) -> str:
    """The border of a mask (n, n) bool, over seen x seen units, along the edges of cells."""
    padded = np.pad(mask, 1)
    unit = seen / len(mask)
    across = [f"M{x * unit:g} {y * unit:g}h{unit:g}" for y, x in np.argwhere(padded[1:] != padded[:-1]) - (0, 1)]
    down = [f"M{x * unit:g} {y * unit:g}v{unit:g}" for y, x in np.argwhere(padded[:, 1:] != padded[:, :-1]) - (1, 0)]
    path = f'<path d="{"".join(across + down)}" fill="none" vector-effect="non-scaling-stroke" stroke-linecap="square"'
    return f'{path} stroke="#000" stroke-width="3" opacity=".6"/>{path} stroke="#fff" stroke-width="1.5"/>'
