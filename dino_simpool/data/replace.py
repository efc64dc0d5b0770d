"""Which image takes the place of one that cannot be read: a function of the position alone, so that nothing else changes.

The place keeps what was drawn for it (its crops, colours, ...), and every other image keeps all of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from dino_simpool.data.decode import BrokenImage

T = TypeVar("T")

MAX_ATTEMPTS = 100
"""Images that are tried in the place of a broken one. If none of so many can be read, the files are not the problem."""


def read_or_replace(read: Callable[[int], T], index: int, *, total: int, seed: int, epoch: int) -> tuple[T, str]:
    """What `read` makes of an image, and ""; or of another image in its place, and why this one cannot be read.

    read: by image number, 0 to total - 1.   BrokenImage if MAX_ATTEMPTS others cannot be read either.
    A replacement that is broken, too, is passed over in silence: it has its own turn.
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
    raise BrokenImage(broken.name, f"{broken.reason}; nor can any of {MAX_ATTEMPTS} others drawn in its place") from broken


def replacement(index: int, *, total: int, seed: int, epoch: int, attempt: int) -> int:
    """The number of another image, drawn evenly from the total - 1 others: a pure function of its arguments (Philox 4x64)."""
    # The second word of the key keeps these numbers apart from those of the augmentation, which has 0 there.
    key, counter = np.array([seed % 2**64, 1], np.uint64), np.array([0, attempt, index, epoch], np.uint64)
    return (index + 1 + int(np.random.Philox(key=key, counter=counter).random_raw()) % (total - 1)) % total
