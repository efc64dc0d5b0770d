"""The pictures of the page: attention over held-out images, before and after training, and crops.

A panel is an SVG in pixels of the picture that the encoder saw: the picture in grey, the attention as colour above it, the
outline of the true mask. Colour stands for attention relative to uniform attention, on one scale for all panels, so that before
and after can be compared; a scale of its own for each image would show structure in noise.

h, w: cells of the attention; S: side of the picture.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_simpool.augment import MultiCrop
from dino_simpool.config import EvalConfig, TrainConfig
from dino_simpool.data import EvalTransform, find_images, read_or_replace
from dino_simpool.eval import preprocessing
from dino_simpool.eval.masks import Box, cell_coverage, evenly, mask_path, read_mask, seen_box, shares
from dino_simpool.model import Encoder
from dino_simpool.pictures import unnormalize

RAMP = np.array([[255, 221, 87, 0], [252, 141, 50, 150], [214, 40, 57, 215], [140, 12, 74, 240]], np.float64)
"""Colour and opacity (RGBA) from no attention to the top of the scale."""
OUTLINE_CELLS = 64
"""A mask is drawn on a grid of this many cells a side at most."""


def attention_cards(
    encoders: dict[str, Encoder], data: str, *, split: str, num_images: int, device: torch.device
) -> tuple[str, float]:
    """HTML of num_images held-out images with the attention of each encoder, and the top of the colour scale.

    encoders: label -> encoder, all of one shape.   data: folder with `split`/ (or with the images themselves), and perhaps
    masks/`split`/.   FileNotFoundError or ValueError if there are no images.
    """
    one = next(iter(encoders.values()))
    settings = preprocessing(one, EvalConfig())
    side = settings["image_size"]
    images = find_images(str(Path(data) / split) if (Path(data) / split).is_dir() else data)
    chosen = evenly(len(images), num_images).tolist()
    transform = EvalTransform(**settings)
    pixels = torch.stack([transform(images.read(index)) for index in chosen])
    with torch.inference_mode():
        maps = {label: encoder.to(device).attention(pixels.to(device)).cpu().double() for label, encoder in encoders.items()}
    relative = {label: attention * attention[0].numel() for label, attention in maps.items()}
    top = max(2.0, torch.cat([attention.flatten() for attention in relative.values()]).quantile(0.99).item())
    shown = unnormalize(pixels, transform.mean, transform.std)
    cards = []
    for row, index in enumerate(chosen):
        path, name = Path(str(images.paths[index])), f"held-out-{row}"
        mask_file = mask_path(data, split, path)
        truth = None
        if mask_file.is_file():
            mask = read_mask(mask_file, images.path(index))
            truth = mask, seen_box(one, mask.shape, resize=settings["resize"], crop=side)
        figures = [figure(panel(side, picture_layer(shown[row], name)), path.parent.name or path.name)]
        for label, attention in relative.items():
            lines, said = _compare(attention[row].numpy(), truth, side)
            grey = f'<use href="#{name}" style="filter:grayscale(1)"/>'
            figures.append(figure(panel(side, grey, heat_layer(attention[row] / top, side), lines), f"{label} {said}"))
        cards.append(f'<div class="card panels">{"".join(figures)}</div>')
    return f'<div class="cards">{"".join(cards)}</div>', top


def _compare(attention: np.ndarray, truth: tuple[np.ndarray, Box] | None, side: int) -> tuple[str, str]:
    """The outline of the true mask, and the density of the attention (h, w) inside it; both empty without a mask."""
    if truth is None:
        return "", ""
    cells = min(OUTLINE_CELLS, side)
    lines = outline(cell_coverage(*truth, grid=(cells, cells)) >= 0.5, side)
    height, width = attention.shape
    inside, area = shares(attention, cell_coverage(*truth, grid=(height, width)))
    return lines, f"{inside / area:.2f}×" if area else "(object cropped away)"


def crop_cards(cfg: TrainConfig, *, num_images: int) -> str:
    """HTML of training images with the boxes of their crops, and of the views that the run made of them in its first epoch."""
    roots = (cfg.data.root,) if isinstance(cfg.data.root, str) else cfg.data.root
    images = find_images([root for root in roots if root], subset_per_class=cfg.data.subset_per_class).decoded(
        max_pixels=cfg.data.max_pixels, exif_orientation=cfg.data.exif_orientation
    )
    augment = MultiCrop(**dataclasses.asdict(cfg.crops), mean=cfg.model.mean, std=cfg.model.std)
    cards = []
    for index in evenly(len(images), num_images).tolist():
        image, _ = read_or_replace(images.read, index, total=len(images), seed=cfg.run.seed, epoch=0)  # as in the training
        boxes = augment.draw(image.height, image.width, seed=cfg.run.seed, epoch=0, index=index).box
        figures = []
        for view, pixels in enumerate(augment(image, seed=cfg.run.seed, epoch=0, index=index)):
            layer = picture_layer(unnormalize(pixels, augment.mean, augment.std), f"view-{index}-{view}")
            label, width = (f"global {view + 1}", 92) if view < 2 else (f"local {view - 1}", 60)
            figures.append(figure(panel(pixels.shape[-1], layer), label, width=width))
        original = figure(_original(image, boxes), "image and boxes")
        cards.append(f'<div class="card crops">{original}<div class="views">{"".join(figures)}</div></div>')
    return f'<div class="cards wide">{"".join(cards)}</div>'


def _original(image: Image.Image, boxes: np.ndarray) -> str:
    """A training image, made small, with the boxes (V, 4) of its crops: top, left, height, width in its own pixels."""
    small = image.copy()
    small.thumbnail((256, 256))
    layers = [
        f'<image href="{data_uri(np.asarray(small))}" width="{image.width}" height="{image.height}"{_sharp(image.width)}/>'
    ]
    for view, (top, left, height, width) in enumerate(boxes.tolist()):
        place = f'x="{left}" y="{top}" width="{width}" height="{height}"'
        colour = "var(--s1)" if view < 2 else "var(--s2)"
        layers.append(f'<rect {place} fill="none" stroke="{colour}" stroke-width="2" vector-effect="non-scaling-stroke"/>')
    return _svg(image.width, image.height, "".join(layers))


def panel(side: int, *layers: str) -> str:
    """An SVG of side x side units with layers on each other."""
    return _svg(side, side, "".join(layers))


def figure(content: str, caption: str, *, width: int | None = None) -> str:
    """A panel with a line of text under it; width: on the page, in pixels."""
    style = f' style="width:{width}px"' if width else ""
    return f"<figure{style}>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def picture_layer(image: Tensor, name: str) -> str:
    """A picture (3, S, S) in 0..1, to be used again by its name on the page."""
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    side = pixels.shape[0]
    return f'<image id="{name}" href="{data_uri(pixels)}" width="{side}" height="{side}"{_sharp(side)}/>'


def heat_layer(strength: Tensor, side: int) -> str:
    """Attention (h, w) as colour: 0 is transparent, 1 (and above) the end of the ramp; smooth between the centres of cells."""
    height, width = strength.shape
    smooth = F.interpolate(strength[None, None], (6 * height, 6 * width), mode="bilinear", align_corners=False)[0, 0]
    place = smooth.clamp(0, 1).double().numpy() * (len(RAMP) - 1)
    low = np.floor(place).astype(int).clip(max=len(RAMP) - 2)
    rgba = RAMP[low] + (place - low)[..., None] * (RAMP[low + 1] - RAMP[low])
    return (
        f'<image href="{data_uri(rgba.round().astype(np.uint8))}" width="{side}" height="{side}" preserveAspectRatio="none"/>'
    )


def ramp_css() -> str:
    """The colour scale as a CSS gradient."""
    colours = ", ".join(f"rgba({r:.0f},{g:.0f},{b:.0f},{a / 255:.2f})" for r, g, b, a in RAMP)
    return f"linear-gradient(90deg, {colours})"


def outline(mask: np.ndarray, side: int) -> str:
    """The border of a mask (n, n) bool along the edges of its cells, in a panel of side x side units."""
    padded = np.pad(mask, 1)
    unit = side / len(mask)
    across = [f"M{x * unit:g} {y * unit:g}h{unit:g}" for y, x in np.argwhere(padded[1:] != padded[:-1]) - (0, 1)]
    down = [f"M{x * unit:g} {y * unit:g}v{unit:g}" for y, x in np.argwhere(padded[:, 1:] != padded[:, :-1]) - (1, 0)]
    path = f'<path d="{"".join(across + down)}" fill="none" vector-effect="non-scaling-stroke" stroke-linecap="square"'
    return f'{path} stroke="#000" stroke-width="3" opacity=".6"/>{path} stroke="#fff" stroke-width="1.5"/>'


def data_uri(pixels: np.ndarray) -> str:
    """A picture (H, W, 3 or 4) uint8 as a PNG inside a URI."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _svg(width: int, height: int, content: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}">{content}</svg>'


def _sharp(side: int) -> str:
    """Small pictures are shown with their pixels, not blurred."""
    return ' style="image-rendering:pixelated"' if side <= 64 else ""
