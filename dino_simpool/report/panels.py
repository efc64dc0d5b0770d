"""The pictures of the page: attention over held-out images, before and after training, and crops.

A panel is an SVG in pixels of the picture that the encoder saw: the picture in gray, the attention
in color above it, and the outline of the true mask, or, without a mask, of the cells with 60 % of
the attention. Color stands for attention relative to uniform attention, on one scale for all
panels, so that before and after can be compared; a separate scale for each image would show
structure in noise.

h, w: cells of the attention; S: side of the picture; seen: pixels of that side which the cells
cover.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_simpool.config import TrainConfig
from dino_simpool.data import EvalTransform, evenly, find_images, folder_or_archive, read_or_replace
from dino_simpool.data.augment import MultiCrop
from dino_simpool.eval.masks import mask_path, read_mask
from dino_simpool.features.encode import Forward, preprocessing
from dino_simpool.features.maps import Box, attention_maps, cell_coverage, mass_mask, seen_box, seen_size, shares
from dino_simpool.models.encoder import Encoder
from dino_simpool.pictures import enlarge, paint, to_bytes, unnormalize

RAMP = [(255, 221, 87, 0), (252, 141, 50, 150), (214, 40, 57, 215), (140, 12, 74, 240)]
"""Color and opacity (RGBA) from no attention to the top of the scale."""
OUTLINE_CELLS = 64
"""A mask is drawn on a grid of at most this many cells per side."""


def attention_cards(
    encoders: dict[str, Encoder], data: str, *, split: str, num_images: int, device: torch.device
) -> tuple[str, float]:
    """HTML of held-out images with the attention of each encoder, and the top of the color scale.

    encoders: label -> encoder, all of the same architecture.   data: folder with `split`/ (or with
    the images themselves), and optionally masks/`split`/.   FileNotFoundError or ValueError if
    there are no images.
    """
    one = next(iter(encoders.values()))
    settings = preprocessing(one.config)
    side = settings["image_size"]
    seen = seen_size(one, side)
    held_out = folder_or_archive(str(Path(data) / split))
    images = find_images(held_out if Path(held_out).exists() else data)
    chosen = evenly(len(images), num_images).tolist()
    transform = EvalTransform(**settings)
    relative, pixels = {}, torch.empty(0)
    for label, encoder in encoders.items():
        batches = list(attention_maps(encoder.to(device), images, chosen, Forward(transform, 16, 0)))
        maps, pixels = (torch.cat([batch[part] for batch in batches]) for part in (0, 1))
        relative[label] = maps.double() * maps[0].numel()
    top = max(2.0, torch.cat([attention.flatten() for attention in relative.values()]).quantile(0.99).item())
    shown = unnormalize(pixels, transform.mean, transform.std)
    cards = []
    for row, index in enumerate(chosen):
        path, name = Path(images.name(index)), f"held-out-{row}"
        mask_file = mask_path(data, split, path)
        truth = None
        if mask_file.is_file():
            mask = read_mask(mask_file, images, index)
            truth = mask, seen_box(one, mask.shape, resize=settings["resize"], crop=side)
        figures = [figure(panel(side, picture_layer(shown[row], name)), path.parent.name or path.name)]
        for label, attention in relative.items():
            lines, said = _compare(attention[row].numpy(), truth, seen)
            gray = f'<use href="#{name}" style="filter:grayscale(1)"/>'
            figures.append(figure(panel(side, gray, heat_layer(attention[row] / top, seen), lines), f"{label} {said}"))
        cards.append(f'<div class="card panels">{"".join(figures)}</div>')
    return f'<div class="cards">{"".join(cards)}</div>', top


def _compare(attention: np.ndarray, truth: tuple[np.ndarray, Box] | None, seen: int) -> tuple[str, str]:
    """Outline of the true mask and density of attention (h, w) in it, or outline of most attention."""
    if truth is None:
        return outline(mass_mask(attention), seen), ""
    cells = min(OUTLINE_CELLS, seen)
    lines = outline(cell_coverage(*truth, grid=(cells, cells)) >= 0.5, seen)
    height, width = attention.shape
    inside, area = shares(attention, cell_coverage(*truth, grid=(height, width)))
    return lines, f"{inside / area:.2f}×" if area else "(object cropped away)"


def crop_cards(cfg: TrainConfig, *, num_images: int) -> str:
    """HTML of training images with the boxes of their crops and their views of the first epoch."""
    roots = (cfg.data.root,) if isinstance(cfg.data.root, str) else cfg.data.root
    images = find_images([root for root in roots if root], subset_per_class=cfg.data.subset_per_class).with_decoding(
        max_pixels=cfg.data.max_pixels, exif_orientation=cfg.data.exif_orientation
    )
    augment = MultiCrop(**dataclasses.asdict(cfg.crops), mean=cfg.model.mean, std=cfg.model.std)
    cards = []
    for index in evenly(len(images), num_images).tolist():
        image, _ = read_or_replace(images.read, index, total=len(images), seed=cfg.run.seed, epoch=0)  # as in training
        draw = augment.draw(image.height, image.width, seed=cfg.run.seed, epoch=0, index=index)
        figures = []
        for view, pixels in enumerate(augment.views(np.asarray(image), draw)):
            layer = picture_layer(pixels.permute(2, 0, 1) / 255, f"view-{index}-{view}")
            label, width = (f"global {view + 1}", 92) if view < 2 else (f"local {view - 1}", 60)
            figures.append(figure(panel(len(pixels), layer), label, width=width))
        original = figure(_original(image, draw.box), "image and boxes")
        cards.append(f'<div class="card crops">{original}<div class="views">{"".join(figures)}</div></div>')
    return f'<div class="cards wide">{"".join(cards)}</div>'


def _original(image: Image.Image, boxes: np.ndarray) -> str:
    """A training image, made smaller, with its crop boxes (V, 4): top, left, height, width (pixels)."""
    small = image.copy()
    small.thumbnail((256, 256))
    layers = [
        f'<image href="{data_uri(np.asarray(small))}" width="{image.width}" height="{image.height}"{_sharp(image.width)}/>'
    ]
    for view, (top, left, height, width) in enumerate(boxes.tolist()):
        place = f'x="{left}" y="{top}" width="{width}" height="{height}"'
        color = "var(--s1)" if view < 2 else "var(--s2)"
        layers.append(f'<rect {place} fill="none" stroke="{color}" stroke-width="2" vector-effect="non-scaling-stroke"/>')
    return _svg(image.width, image.height, "".join(layers))


def panel(side: int, *layers: str) -> str:
    """An SVG of side x side units with layers on top of each other."""
    return _svg(side, side, "".join(layers))


def figure(content: str, caption: str, *, width: int | None = None) -> str:
    """A panel with a line of text under it.   width: on the page, in pixels."""
    style = f' style="width:{width}px"' if width else ""
    return f"<figure{style}>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def picture_layer(image: Tensor, name: str) -> str:
    """A picture (3, S, S) in 0..1, with a name for using it again on the page."""
    pixels = to_bytes(image)
    side = pixels.shape[0]
    return f'<image id="{name}" href="{data_uri(pixels)}" width="{side}" height="{side}"{_sharp(side)}/>'


def heat_layer(strength: Tensor, seen: int) -> str:
    """Attention (h, w) as smooth color: 0 is transparent, 1 and above the end of the ramp."""
    height, width = strength.shape
    rgba = paint(enlarge(strength, (6 * height, 6 * width), smooth=True), RAMP)
    return f'<image href="{data_uri(to_bytes(rgba))}" width="{seen}" height="{seen}" preserveAspectRatio="none"/>'


def ramp_css() -> str:
    """The color scale as a CSS gradient."""
    colors = ", ".join(f"rgba({r:.0f},{g:.0f},{b:.0f},{a / 255:.2f})" for r, g, b, a in RAMP)
    return f"linear-gradient(90deg, {colors})"


def outline(mask: np.ndarray, seen: int) -> str:
    """The border of a mask (n, n) bool, which covers seen x seen units, along the edges of cells."""
    padded = np.pad(mask, 1)
    unit = seen / len(mask)
    across = [f"M{x * unit:g} {y * unit:g}h{unit:g}" for y, x in np.argwhere(padded[1:] != padded[:-1]) - (0, 1)]
    down = [f"M{x * unit:g} {y * unit:g}v{unit:g}" for y, x in np.argwhere(padded[:, 1:] != padded[:, :-1]) - (1, 0)]
    path = f'<path d="{"".join(across + down)}" fill="none" vector-effect="non-scaling-stroke" stroke-linecap="square"'
    return f'{path} stroke="#000" stroke-width="3" opacity=".6"/>{path} stroke="#fff" stroke-width="1.5"/>'


def data_uri(pixels: np.ndarray) -> str:
    """A picture (H, W, 3 or 4) uint8 as a data URI with a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _svg(width: int, height: int, content: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}">{content}</svg>'


def _sharp(side: int) -> str:
    """Style that shows the pixels of small pictures instead of blurring them."""
    return ' style="image-rendering:pixelated"' if side <= 64 else ""
