"""How much of the attention falls on the object: its share of the mass inside the true mask over the mask's share of the area.

1 is what uniform attention gets, 1 / area the best there is (all of the attention inside). The attention of a cell counts as
spread evenly over the part of the image that the cell sees: the shares are exact for any mask and grid; neither is resampled.
The image is resized and centre cropped before the encoder sees it; what is cropped away counts neither as object nor as area.

A data set with masks holds, beside {train,val}/<class>/<name>.*, a file masks/{train,val}/<class>/<name>.png of the image's
size, 0 outside the object and anything else inside.

h, w: cells of the attention; H, W: pixels of the image.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.models.convnext import ConvNeXt
from torch import nn

from dino_simpool import distributed
from dino_simpool.config import MasksConfig
from dino_simpool.data import EvalTransform, class_folder, index_loader
from dino_simpool.eval import run
from dino_simpool.features.encode import evaluation_mode, preprocessing
from dino_simpool.models.encoder import Encoder

Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels"""


def main(cfg: MasksConfig) -> None:
    """The command `dino-simpool masks`."""
    run("masks", evaluate, cfg)


def evaluate(encoder: Encoder, cfg: MasksConfig) -> dict[str, object]:
    """attention_in_mask and mask_area, in % and means over images, and `ratio`, the first over the second (uniform: 1).

    encoder: on the device where it shall run.   Images whose object is cropped away altogether are left out and counted.
    ValueError if a mask is missing or does not fit, or if no image is left.
    """
    if not cfg.data:
        raise ValueError("no data is given: say --data DIR, a folder with val/ and masks/val/")
    settings = preprocessing(encoder.config, image_size=cfg.image_size, resize=cfg.resize)
    images = class_folder(str(Path(cfg.data) / cfg.val))
    images = images.decoded(max_pixels=cfg.max_pixels, exif_orientation=False)  # masks are of the pixels as they are stored
    chosen = evenly(len(images), cfg.max_images)
    positions = np.arange(distributed.rank(), len(chosen), distributed.world_size())
    device = next(encoder.parameters()).device
    loader = index_loader(
        images, EvalTransform(**settings), chosen[positions], batch_size=cfg.batch_size, workers=cfg.workers, device=device
    )
    rows = []
    with evaluation_mode(encoder), torch.inference_mode():
        for batch, indices in loader:
            with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
                attention = encoder.attention(batch.to(device, non_blocking=True))
            for index, cells in zip(indices.tolist(), attention.cpu().double().numpy(), strict=True):
                mask = read_mask(mask_path(cfg.data, cfg.val, images.name(index)), images.path(index), images.read_bytes(index))
                box = seen_box(encoder, mask.shape, resize=settings["resize"], crop=settings["image_size"])
                rows.append(shares(cells, cell_coverage(mask, box, grid=cells.shape)))
    own = torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)
    measured = distributed.gather_by_index(own, torch.from_numpy(positions), len(chosen))
    measured = measured[measured[:, 1] > 0]
    if not len(measured):
        raise ValueError(
            f"no mask of {images.root} has a pixel left after the centre crop: check the masks, or give a smaller --resize"
        )
    inside, area = measured.mean(0).tolist()
    counts = {"images": len(measured), "without object": len(chosen) - len(measured)}
    shares_in_percent = {"attention_in_mask": 100 * inside, "mask_area": 100 * area, "ratio": inside / area}
    return shares_in_percent | {"split": cfg.val, "preprocessing": settings, "counts": counts}


def evenly(total: int, count: int) -> np.ndarray:
    """At most `count` of the indices 0..total-1, evenly spread from the first to the last: int64, ascending, each once."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))


def mask_path(data: str | Path, split: str, image: str | Path) -> Path:
    """Where the mask of an image lies whose path is relative to data/split."""
    return Path(data) / "masks" / split / Path(image).with_suffix(".png")


def read_mask(path: Path, image: str | Path, content: bytes | None = None) -> np.ndarray:
    """The mask (H, W) as bool. ValueError if the file is missing or its size is not that of `image`.

    content: of the image file, if that may lie in an archive.
    """
    if not path.is_file():
        raise ValueError(f"{image} has no mask {path}: give a data set with masks/<split>/<class>/<name>.png for each image")
    with Image.open(path) as mask, Image.open(image if content is None else io.BytesIO(content)) as original:
        if mask.size != original.size:
            raise ValueError(
                f"mask {path} has {mask.width} x {mask.height} pixels, its image {original.width} x {original.height}: "
                "they must be equal"
            )
        return np.asarray(mask.convert("L")) > 0


def seen_size(encoder: Encoder, size: int) -> int:
    """Of `size` pixels down or across an input, those that its map covers, from the first on.

    A ViT drops what is left beyond its last whole patch, and so does a ConvNeXt, which shrinks its maps without padding. A
    ResNet pads and sees everything.
    """
    trunk = encoder.trunk
    if hasattr(trunk, "patch_embed"):
        return size // encoder.config.patch_size * encoder.config.patch_size
    if not isinstance(trunk, ConvNeXt):
        return size
    cells, stride = size, 1
    for layer in trunk.stem:
        if isinstance(layer, nn.Conv2d):
            assert not isinstance(layer.padding, str)
            cells = (cells + 2 * layer.padding[0] - layer.kernel_size[0]) // layer.stride[0] + 1
            stride *= layer.stride[0]
    halvings = len(trunk.stages) - 1
    return min(size, (cells >> halvings) * (stride << halvings))


def seen_box(encoder: Encoder, shape: tuple[int, int], *, resize: int, crop: int) -> Box:
    """The part of an image that the encoder sees after data.EvalTransform(crop, resize=resize), in pixels of the image.

    shape: (H, W) of the image. What is dropped (see `seen_size`) lies at the right and at the bottom.
    """
    seen = seen_size(encoder, crop)
    ends = []
    for side in (shape[1], shape[0]):
        resized = resize * side // min(shape)
        start = round((resized - crop) / 2)
        ends.append((start * side / resized, (start + seen) * side / resized))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


def cell_coverage(mask: np.ndarray, box: Box, *, grid: tuple[int, int]) -> np.ndarray:
    """The share of each cell that the mask covers, (h, w) in 0..1, with `grid` = (h, w) equal cells laid over `box`.

    mask: (H, W) bool.   box: in its pixels; what lies outside the mask counts as uncovered.
    """
    left, top, right, bottom = box
    rows = _overlap(grid[0], top, bottom, mask.shape[0])
    columns = _overlap(grid[1], left, right, mask.shape[1])
    return rows @ mask.astype(np.float64) @ columns.T


def shares(attention: np.ndarray, coverage: np.ndarray) -> tuple[float, float]:
    """The share of the attention inside the mask and the mask's share of the area, both in 0..1.

    attention: (h, w), not negative.   coverage: (h, w) from cell_coverage.
    """
    return float((attention * coverage).sum() / attention.sum()), float(coverage.mean())


def _overlap(cells: int, low: float, high: float, pixels: int) -> np.ndarray:
    """How much of each of the equal cells between low and high lies in each pixel: (cells, pixels), in 0..1."""
    edges = np.linspace(low, high, cells + 1)
    pixel = np.arange(pixels)
    length = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return length.clip(min=0) / ((high - low) / cells)
