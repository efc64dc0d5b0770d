"""The last metre of the data: batches onto the device, finished there, and how long the training waited for them."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from dino_simpool import distributed
from dino_simpool.config import TrainConfig
from dino_simpool.data import ImageSet, default_workers, train_loader
from dino_simpool.data.augment import MultiCrop
from dino_simpool.data.bad_files import BadFiles

Batch = tuple[list[Tensor], Tensor, Sequence[str]]
"""Tensors of the augmentation or views, image numbers (B,), and of each image why it was replaced, or ""."""


def colors_on_device(cfg: TrainConfig, device: torch.device) -> bool:
    """Whether flips, colours and blur are made on the device, and not in the loaders."""
    return cfg.data.augment_on == "device" or (cfg.data.augment_on == "auto" and device.type != "cpu")


def build_feed(
    cfg: TrainConfig,
    images: ImageSet,
    bad_files: BadFiles,
    *,
    batch_size: int,
    start_step: int,
    total_steps: int,
    device: torch.device,
) -> Feed:
    """The batches of a run from a step on, for this process.   batch_size: images of one process in one forward pass."""
    on_device = colors_on_device(cfg, device)
    augment = MultiCrop(**asdict(cfg.crops), mean=cfg.model.mean, std=cfg.model.std, on_device=on_device)
    loader = train_loader(
        images, augment, seed=cfg.run.seed, batch_size=batch_size, accumulate=cfg.run.accumulate, start_step=start_step,
        total_steps=total_steps, rank=distributed.rank(), world_size=distributed.world_size(), workers=cfg.data.workers,
        device=device,
    )  # fmt: skip
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.run.precision) if on_device else None
    finish = partial(augment.finish, dtype=half or torch.float32, compiled=cfg.run.compile and on_device)
    return Feed(loader, device, finish, bad_files)


class Feed:
    """Hands out batches on the device, and knows how long the run waited for them.

    finish: makes V views (b, 3, S, S) of the tensors of a batch, on the device (augment.MultiCrop.finish).   On CUDA the next
    batch is copied and finished on a stream of its own while the step computes.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        device: torch.device,
        finish: Callable[[list[Tensor]], list[Tensor]],
        bad_files: BadFiles,
    ) -> None:
        self._batches, self._device, self._finish = iter(loader), device, finish
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: Batch | None = None
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
            batch = self._ahead or self._load()
            assert batch is not None, "the loader ends with the run"
            self.views, indices, problems = batch
            self._wait_for_copies()
            self._images += len(indices) * distributed.world_size()
            self.indices += indices.tolist()
            self.bad_files.note(indices.tolist(), problems)
            yield self.views
            # Here the step has queued its work, and the device is busy.
            self._ahead = self._load() if self._stream is not None else None

    def _load(self) -> Batch | None:
        """Wait for a batch, copy it to the device, and finish its views there; None after the last."""
        started = time.monotonic()
        batch = next(self._batches, None)
        self._waited += time.monotonic() - started
        if batch is None:
            return None
        with torch.cuda.stream(self._stream):  # nothing without a stream
            return self._finish([part.to(self._device, non_blocking=True) for part in batch[0]]), *batch[1:]

    def _wait_for_copies(self) -> None:
        """Let the step begin when the views are there, and keep their memory from the next batch until it has read them."""
        if self._stream is not None:
            step = torch.cuda.current_stream(self._device)
            step.wait_stream(self._stream)
            for view in self.views:
                view.record_stream(step)

    def advice(self, cfg: TrainConfig) -> str:
        """What to turn when the run waits for images."""
        cores = default_workers()
        if cfg.data.workers is not None and cfg.data.workers < cores:
            return f"raise data.workers, which is {cfg.data.workers}; this process may use {cores} cores"
        if self._device.type != "cpu" and cfg.data.augment_on == "cpu":
            return "set data.augment_on device, which takes two thirds of the work from the loaders"
        return f"its {cores} cores are all at it: store smaller images or on a faster disk, or ask for more cores a process"

    def timings(self, row: str) -> dict[str, float]:
        """Images per second, share of the time spent waiting, and peak memory, since the last call for this row.

        On CUDA the share is an upper bound: the host begins to wait while the device is still busy with the step.
        """
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
