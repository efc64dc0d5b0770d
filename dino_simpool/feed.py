"""The last metre of the data: batches onto the device, and how long the training waited for them."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dino_simpool import distributed
from dino_simpool.bad_files import BadFiles


class Feed:
    """Hands out batches on the device, and knows how long the run waited for them."""

    def __init__(
        self, loader: Iterable[tuple[list[Tensor], Tensor, Sequence[str]]], device: torch.device, bad_files: BadFiles
    ) -> None:
        self._batches, self._device = iter(loader), device
        self._images, self._waited = 0, 0.0
        now = (time.monotonic(), 0, 0.0)
        self._since = {"window": now, "epoch": now}
        self.views: list[Tensor] = []
        self.indices: list[int] = []
        self.bad_files = bad_files
        self.warned = False

    def batches(self, count: int) -> Iterator[list[Tensor]]:
        """The next `count` batches, each a list of V tensors (b, 3, S, S)."""
        self.indices = []
        for _ in range(count):
            started = time.monotonic()
            views, indices, problems = next(self._batches)
            self.views = [v.to(self._device, non_blocking=True, memory_format=torch.channels_last) for v in views]
            self._waited += time.monotonic() - started
            self._images += len(indices) * distributed.world_size()
            self.indices += indices.tolist()
            self.bad_files.note(indices.tolist(), problems)
            yield self.views

    def timings(self, row: str) -> dict[str, float]:
        """Images per second, share of the time spent waiting, and peak memory, since the last call for this row."""
        started, images, waited = self._since[row]
        now = time.monotonic()
        self._since[row] = (now, self._images, self._waited)
        seconds = max(now - started, 1e-9)
        on_cuda = self._device.type == "cuda"
        peak = (
            torch.cuda.max_memory_allocated()
            if on_cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        )
        return {
            "images_per_second": (self._images - images) / seconds,
            "data_wait_percent": 100 * (self._waited - waited) / seconds,
            "max_memory_mb": peak / 2**20,
            "seconds": seconds,
            "time": time.time(),
        }
