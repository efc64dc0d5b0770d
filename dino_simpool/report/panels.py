"""The pictures of the page: attention over held-out images, before and after training, and what the augmentation makes of images.

A panel is an SVG in pixels of the picture that the encoder saw: the picture in grey, the attention as colour above it, the outline of
the true mask. Colour stands for attention relative to uniform attention, on one scale for all panels, so that before and after can
be compared; a scale of its own for each image would show structure in noise. h, w: cells of the attention; S: side of the picture.
"""
from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_simpool.augment import MultiCrop
from dino_simpool.config import EvalConfig, TrainConfig
from dino_simpool.data import EvalTransform, find_images, read_rgb
from dino_simpool.eval import preprocessing
from dino_simpool.eval.masks import cell_coverage, evenly, mask_path, read_mask, seen_box, shares
from dino_simpool.model import Encoder
from dino_simpool.pictures import unnormalize

RAMP = np.array([[255, 221, 87, 0], [252, 141, 50, 150], [214, 40, 57, 215], [140, 12, 74, 240]], np.float64)
"""Colour and opacity (RGBA) from no attention to the top of the scale."""
OUTLINE_CELLS = 64
"""A mask is drawn on a grid of this many cells a side at most."""


def attention_cards(encoders: dict[str, Encoder], data: str, *, split: str, num_images: int, device: torch.device) -> tuple[str, float]:
    """HTML of num_images held-out images with the attention of each encoder, and the top of the colour scale.

    encoders: name -> encoder, all of one shape.   data: folder with `split`/ (or with the images themselves), and masks/`split`/.
    """
    settings = preprocessing(next(iter(encoders.values())), EvalConfig())
    folder = Path(data) / split if (Path(data) / split).is_dir() else Path(data)
    images = find_images(str(folder))
    chosen = evenly(len(images), num_images)
    transform = EvalTransform(**settings)
    pixels = torch.stack([transform(read_rgb(images.path(i))) for i in chosen])
    maps = {}
    with torch.inference_mode():
        for name, encoder in encoders.items():
            maps[name] = encoder.to(device).attention(pixels.to(device)).float().cpu()
    relative = {name: attention * attention[0].numel() for name, attention in maps.items()}
    top = max(2.0, torch.quantile(torch.cat([x.flatten() for x in relative.values()]), 0.99).item())
    shown = unnormalize(pixels, transform.mean, transform.std)
    cards = []
    for row, index in enumerate(chosen):
        picture, parent = picture_layer(shown[row], f"held-out-{row}"), Path(str(images.paths[index])).parent.name
        mask = mask_path(data, split, images.paths[index])
        coverage: dict[tuple[int, int], np.ndarray] = {}
        if mask.is_file():
            truth = read_mask(mask, images.path(index))
            box = seen_box(next(iter(encoders.values())), truth.shape, resize=settings["resize"], crop=settings["image_size"])
            side = min(OUTLINE_CELLS, settings["image_size"])
            coverage = {grid: cell_coverage(truth, box, grid=grid) for grid in ((side, side), tuple(maps[next(iter(maps))].shape[1:]))}
        drawn = outline(coverage[side, side] >= 0.5, settings["image_size"]) if coverage else ""
        figures = [figure(panel(settings["image_size"], picture), parent or Path(str(images.paths[index])).name)]
        for name, attention in relative.items():
            layers = [f'<use href="#held-out-{row}" style="filter:grayscale(1)"/>', heat_layer(attention[row] / top, settings["image_size"]), drawn]
            figures.append(figure(panel(settings["image_size"], *layers), _caption(name, maps[name][row], coverage)))
        cards.append(f'<div class="card panels">{"".join(figures)}</div>')
    return f'<div class="cards">{"".join(cards)}</div>', top


def _caption(name: str, attention: Tensor, coverage: dict[tuple[int, int], np.ndarray]) -> str:
    """The encoder's name, and how dense its attention is inside the mask."""
    grid = tuple(attention.shape)
    if grid not in coverage:
        return name
    inside, area = shares(attention.double().numpy(), coverage[grid])
    return f"{name}: {inside / area:.2f}\u00d7" if area else f"{name}: mask cropped away"


def crop_cards(cfg: TrainConfig, *, num_images: int) -> str:
    """HTML of training images with the boxes of their crops, and of the views that the run made of them in its first epoch."""
    roots = (cfg.data.root,) if isinstance(cfg.data.root, str) else cfg.data.root
    images = find_images([root for root in roots if root], subset_per_class=cfg.data.subset_per_class)
    augment = MultiCrop(**dataclasses.asdict(cfg.crops), mean=cfg.model.mean, std=cfg.model.std)
    cards = []
    for index in evenly(len(images), num_images).tolist():
        image = read_rgb(images.path(index))
        boxes = augment.draw(image.height, image.width, seed=cfg.run.seed, epoch=0, index=index).box
        views = augment(image, seed=cfg.run.seed, epoch=0, index=index)
        small = image.copy()
        small.thumbnail((256, 256))
        scale = small.width / image.width
        frames = "".join(
            f'<rect x="{left * scale:.1f}" y="{top * scale:.1f}" width="{width * scale:.1f}" height="{height * scale:.1f}" fill="none" '
            f'stroke="var(--s{1 if view < 2 else 2})" stroke-width="2" vector-effect="non-scaling-stroke"/>'
            for view, (top, left, height, width) in enumerate(boxes.tolist())
        )
        original = f'<image href="{data_uri(np.asarray(small))}" width="{small.width}" height="{small.height}"{_sharp(small.width)}/>'
        figures = [f'<figure style="width:132px">{_svg(small.width, small.height, original + frames)}<figcaption>image and crops</figcaption></figure>']
        for number, view in enumerate(views):
            name, width = (f"global {number + 1}", 92) if number < 2 else (f"local {number - 1}", 60)
            drawn = panel(view.shape[-1], picture_layer(unnormalize(view, augment.mean, augment.std), f"view-{index}-{number}"))
            figures.append(f'<figure style="width:{width}px">{drawn}<figcaption>{name}</figcaption></figure>')
        cards.append(f'<div class="card views">{"".join(figures)}</div>')
    return f'<div class="cards">{"".join(cards)}</div>'


def panel(side: int, *layers: str) -> str:
    """An SVG of side x side units with layers on each other."""
    return _svg(side, side, "".join(layers))


def figure(content: str, caption: str) -> str:
    """A panel with a line of text under it."""
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


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
    return f'<image href="{data_uri(rgba.round().astype(np.uint8))}" width="{side}" height="{side}" preserveAspectRatio="none"/>'


def ramp_css() -> str:
    """The colour scale as a CSS gradient."""
    return f"linear-gradient(90deg, {', '.join(f'rgba({r:.0f},{g:.0f},{b:.0f},{a / 255:.2f})' for r, g, b, a in RAMP)})"


def outline(mask: np.ndarray, side: int) -> str:
    """The border of a mask (n, n) bool along the edges of its cells, in a panel of side x side units."""
    inside = np.pad(mask, 1).astype(np.int8)
    unit = side / len(mask)
    across = [f"M{x * unit:g} {y * unit:g}h{unit:g}" for y, x in np.argwhere(np.diff(inside, axis=0)[:, 1:-1])]
    down = [f"M{x * unit:g} {y * unit:g}v{unit:g}" for y, x in np.argwhere(np.diff(inside, axis=1)[1:-1])]
    path = f'd="{"".join(across + down)}" fill="none" vector-effect="non-scaling-stroke" stroke-linecap="square"'
    return f'<path {path} stroke="#000" stroke-width="3" opacity=".6"/><path {path} stroke="#fff" stroke-width="1.5"/>'


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
