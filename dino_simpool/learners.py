"""What the training loop asks of a learner, and the one place where learners are chosen.

A learner is what a run trains: networks, loss, optimizer and schedules. The loop (train.py) feeds
it batches, logs what it returns, saves its state, and evaluates its encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dino_simpool.config import TrainConfig
from dino_simpool.data import ImageSet
from dino_simpool.data.feed import Batch
from dino_simpool.dino.learner import build_dino
from dino_simpool.dino.plan import Plan
from dino_simpool.models.encoder import Encoder


class Learner(Protocol):
    """What the loop asks for. `dino.learner.DinoLearner` is one."""

    metrics: ClassVar[tuple[str, ...]]
    """Names of what `step` returns, in this order. "bad_step" is among them."""
    shown: ClassVar[str]
    """The field of a log line that the progress bar shows."""
    steps: int
    """Optimizer steps done."""
    norms: tuple[list[str], Tensor]
    """Of the last step: names of parameters, (n,) L2 norms of their gradients before clipping."""
    plan: Plan
    """Length and schedules of the run; the fields of `plan.values(step)` are logged."""

    @property
    def encoder(self) -> Encoder:
        """The encoder that is evaluated and exported."""

    @property
    def network(self) -> nn.Module:
        """What the optimizer changes. It is not saved once a weight of it is not finite."""

    def describe(self) -> str:
        """One line about the networks, for the start of a run."""

    def step(self, batches: Iterable[Batch], values: Any) -> dict[str, Tensor]:
        """One optimizer step on the batches of run.accumulate passes.

        values: `plan.values(steps)`. Returns the metrics of this process, scalars without gradient.
        A step whose loss or gradients are not finite in any process counts, and changes nothing
        else: its "bad_step" is 1 in a process that has found it, otherwise 0. The device is not
        waited for.
        """

    def watch(self, means: dict[str, float]) -> tuple[dict[str, float], list[str]]:
        """Fields of a log line, and warnings.

        means: of the metrics over all processes and the steps since the last line.
        """

    def epoch_fields(self, means: dict[str, float], values: Sequence[Any]) -> dict[str, float]:
        """Fields of an epoch's line, from the metrics' means and the schedules of its steps."""

    def state(self) -> dict[str, Any]:
        """Everything that a step changes, as tensors and plain values.

        It has "step", and for `load_encoder` the evaluated encoder in "teacher", as encoder.*.
        """

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state, strictly. ValueError if it does not fit."""


def build_learner(cfg: TrainConfig, images: ImageSet, device: torch.device) -> Learner:
    """The learner of a run on these images, at step 0. ValueError for options that do not fit."""
    return build_dino(cfg, len(images), device)
