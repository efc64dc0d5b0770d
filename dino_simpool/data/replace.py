"""Replaces broken images in training.

The replacement is a function of the position alone. The position keeps its random numbers (crops,
colors, ...), and so does every other image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from dino_simpool.data.decode import BrokenImage

T = TypeVar("T")

MAX_ATTEMPTS = 100
"""Images to try in place of a broken one. If all fail, the files are not the problem."""


def read_or_replace(read: Callable[[int], T], index: int, *, total: int, seed: int, epoch: int) -> tuple[T, str]:
    """(read(index), ""), or (read of another image, what is wrong with this one) if it is broken.

    read: takes an image number, 0 to total - 1.   A broken replacement is skipped silently, because
    it has its own turn. BrokenImage if MAX_ATTEMPTS others are broken too.
    """
    try:
        return read(index), ""
    except BrokenImage as error:
        broken = error
    if total == 1:
        raise broken
    for attempt in range(MAX_ATTEMPTS):
        try:
            return read(replacement(index, total=total, seed=seed, epoch=epoch, attempt=attempt)), broken.reason
        except BrokenImage:
            continue
    raise BrokenImage(broken.name, f"{broken.reason}; {MAX_ATTEMPTS} others drawn in its place are broken too") from broken


def replacement(index: int, *, total: int, seed: int, epoch: int, attempt: int) -> int:
    """The number of another image, uniform over the total - 1 others: a pure function (Philox)."""
    # The second word of the key is 0 for the augmentation: its numbers are independent of these.
    key, counter = np.array([seed % 2**64, 1], np.uint64), np.array([0, attempt, index, epoch], np.uint64)
    return (index + 1 + int(np.random.Philox(key=key, counter=counter).random_raw()) % (total - 1)) % total
