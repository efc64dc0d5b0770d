"""Moves batches to the device, finishes them there, and measures how long a run waits for them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

try:
    import resource
except ImportError:  # Windows: the memory in use is not measured
    resource = None  # type: ignore[assignment]

import torch
from torch import Tensor

from dino_simpool import distributed
from dino_simpool.config import TrainConfig
from dino_simpool.data.augment import MultiCrop
from dino_simpool.data.bad_files import BadFiles
from dino_simpool.data.loaders import TrainBatches, default_workers, train_loader

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The half precisions by name."""
Loaded = tuple[list[Tensor], Tensor, Sequence[str], Tensor]
"""An item of `train_loader`: tensors, image numbers, why each was replaced or "", images shown."""


@dataclass(frozen=True)
class Batch:
    """The images of one forward pass of one process, on the device."""

    views: list[Tensor]
    """V tensors (b, 3, S, S), the two global views first."""
    indices: Tensor
    """(b,) int64, the numbers of the images, on the CPU."""
    labels: Tensor | None = None
    """(b,) int64, the classes of the images, or None if they do not come from class folders."""


def colors_on_device(cfg: TrainConfig, device: torch.device) -> bool:
    """Whether flips, colors and blur are made on the device, and not in the loaders."""
    return cfg.data.augment_on == "device" or (cfg.data.augment_on == "auto" and device.type != "cpu")


def build_feed(
    cfg: TrainConfig, bad_files: BadFiles, *, batch_size: int, start_step: int, total_steps: int, device: torch.device
) -> Feed:
    """The batches of a run from a step on, for this process (TrainBatches has the arguments)."""
    on_device = colors_on_device(cfg, device)
    augment = MultiCrop(**asdict(cfg.crops), mean=cfg.model.mean, std=cfg.model.std, on_device=on_device)
    batches = TrainBatches(
        num_images=len(bad_files.images),
        seed=cfg.run.seed,
        batch_size=batch_size,
        accumulate=cfg.run.accumulate,
        start_step=start_step,
        total_steps=total_steps,
    )
    loader = train_loader(bad_files.images, augment, batches, workers=cfg.data.workers, device=device)
    half = HALF.get(cfg.run.precision) if on_device else None
    finish = partial(augment.finish, dtype=half or torch.float32, compiled=cfg.run.compile and on_device)
    return Feed(loader, device, finish, bad_files)


class Feed:
    """Hands out batches on the device, and measures how long the run waited for them.

    finish: makes the views of a batch, on the device (MultiCrop.finish). On CUDA the next batch is
    copied and finished on a stream of its own while the step computes.
    """

    def __init__(
        self, items: Iterable[Loaded], device: torch.device, finish: Callable[[list[Tensor]], list[Tensor]], bad_files: BadFiles
    ) -> None:
        self._loaded, self._device, self._finish = iter(items), device, finish
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[Batch, Sequence[str]] | None = None
        self._count, self._waited = 0, 0.0
        now = (time.monotonic(), 0, 0.0)
        self._since = {"window": now, "epoch": now}
        self.views: list[Tensor] = []
        self.indices: list[int] = []
        self.bad_files = bad_files
        self.warned = False

    def batches(self, count: int) -> Iterator[Batch]:
        """The next `count` batches."""
        self.indices = []
        for _ in range(count):
            loaded = self._ahead or self._load()
            assert loaded is not None, "the loader ends with the run"
            batch, problems = loaded
            if self._stream is not None:
                step = torch.cuda.current_stream(self._device)
                step.wait_stream(self._stream)
                for tensor in batch.views if batch.labels is None else [*batch.views, batch.labels]:
                    tensor.record_stream(step)  # keeps its memory until the step has read it
            indices = batch.indices.tolist()
            self._count += len(indices) * distributed.world_size()
            self.views, self.indices = batch.views, self.indices + indices
            self.bad_files.note(indices, problems)
            yield batch
            # The step has queued its work by now, and the device is busy.
            self._ahead = self._load() if self._stream is not None else None

    def _load(self) -> tuple[Batch, Sequence[str]] | None:
        """Wait for a batch, copy it to the device, finish its views there; None after the last."""
        started = time.monotonic()
        loaded = next(self._loaded, None)
        self._waited += time.monotonic() - started
        if loaded is None:
            return None
        parts, indices, problems, shown = loaded
        classes = self.bad_files.images.labels_of(shown.numpy())  # a replaced image has its own class
        labels = None if classes is None else torch.from_numpy(classes)
        with torch.cuda.stream(self._stream):  # does nothing without a stream
            views = self._finish([part.to(self._device, non_blocking=True) for part in parts])
            if labels is not None:  # pinned, because otherwise the copy waits for the device
                labels = (labels.pin_memory() if self._stream is not None else labels).to(self._device, non_blocking=True)
        return Batch(views, indices, labels), problems

    def advice(self, cfg: TrainConfig) -> str:
        """What to change when the run waits for images."""
        cores = default_workers()
        if cfg.data.workers is not None and cfg.data.workers < cores:
            return f"raise data.workers, which is {cfg.data.workers}; this process may use {cores} cores"
        if self._device.type != "cpu" and cfg.data.augment_on == "cpu":
            return "set data.augment_on device, which takes two thirds of the work from the loaders"
        return f"all {cores} cores are busy: use smaller images, a faster disk, or more cores per process"

    def timings(self, row: str) -> dict[str, float]:
        """Speed, waiting and peak memory since the last call for this row, "window" or "epoch".

        On CUDA the waiting time is an upper bound: the device is still busy when the wait begins.
        The memory is NaN where the system does not say it (Windows).
        """
        started, count, waited = self._since[row]
        now = time.monotonic()
        self._since[row] = (now, self._count, self._waited)
        seconds = max(now - started, 1e-9)
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        elif resource is not None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        else:
            peak = math.nan
        return {
            "images_per_second": (self._count - count) / seconds,
            "data_wait_percent": 100 * (self._waited - waited) / seconds,
            "max_memory_mb": peak / 2**20,
            "seconds": seconds,
            "time": time.time(),
        }
