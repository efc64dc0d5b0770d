"""The options of the attention maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_simpool.config.evaluate import EvalConfig


@dataclass(frozen=True)
class AttentionConfig(EvalConfig):
    """Where the encoder looks, on any images: maps, pictures, masks and boxes."""

    data: str = ""
    """One image, a folder of any nesting, or a text file with one path a line."""
    val: str = ""
    """Folder inside data to take the images from. Empty: data itself."""
    max_images: int = 100
    """Images to show, evenly spread over the data."""
    fit: Literal["square", "shorter", "longer", "native"] = "square"
    """What has the length image_size: square, both sides, whatever the shape of the image (paper); shorter or longer, that side
    of the image, which keeps its shape (to 64:1 with shorter); native: images stay as they are. A side below one cell is made
    one cell long; a ViT drops the pixels beyond its last whole patch."""
    image_size: int | None = None
    """Length in pixels, see fit. null: four times that of the model, which is 896 for 224 as in the paper."""
    heads: Literal["mean", "each"] = "mean"
    """The mean over the attention heads (of the class token: those of the last block; of SimPool: model.num_heads), or each."""
    mass: float = 0.6
    """A mask is the fewest cells that hold this share of the attention, 0 to 1 (paper: 0.6)."""
    smooth: bool = False
    """Draw attention bicubic between the centres of the cells; false: every cell as a square, as published."""
    sheet_images: int = 24
    """Of these images, so many are put on the contact sheet."""
    batch_size: int = 4
    """Images in one forward pass of one process if fit makes them equal in size; otherwise they pass one by one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resize is not None or self.train != "train":
            raise ValueError("attention neither crops nor learns: leave out resize and train, and see fit and image_size")
        if self.fit == "native" and self.image_size is not None:
            raise ValueError("fit native keeps the size of every image: leave out image_size, or choose another fit")
        if min(self.max_images, self.sheet_images) < 1:
            raise ValueError("max_images and sheet_images must be 1 or more")
        if not 0 < self.mass < 1:
            raise ValueError(f"mass is {self.mass}: give a share of the attention above 0 and below 1")
