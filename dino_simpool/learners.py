"""What the training loop asks of a learner, and the one place where learners are chosen.

A learner is what a run trains: networks, loss, optimizer and schedules. The loop (train.py) feeds
it batches, logs what it returns, saves its state, and evaluates its encoder.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dino_simpool.checkpoint import load_encoder
from dino_simpool.config import TrainConfig, to_dict
from dino_simpool.data import ImageSet
from dino_simpool.data.feed import Batch
from dino_simpool.dino.learner import Start, build_dino
from dino_simpool.dino.model import DinoHead
from dino_simpool.dino.plan import Plan
from dino_simpool.logs import say
from dino_simpool.models.encoder import Encoder
from dino_simpool.models.foreign import PREFIX
from dino_simpool.models.weights import center_of, from_official, load_official, weights_sha256


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


def build_learner(cfg: TrainConfig, images: ImageSet, device: torch.device, start: Start | None = None) -> Learner:
    """The learner of a run on these images, at step 0. ValueError for options that do not fit.

    start: weights in place of random ones (`read_start`).
    """
    return build_dino(cfg, len(images), device, start)


FREE = {"drop_path", "resize", "min_over"}
"""Options of a model that may differ from those of run.init: they belong to a training or an
evaluation. So may the image_size of a CNN, of which no weight depends."""


def read_start(cfg: TrainConfig) -> tuple[Start, dict[str, Any]]:
    """The weights of run.init, and what is kept about them: checkpoint, sha256 of the encoder, its
    epochs, and whether the head is of the file. ValueError if it is not of this model.

    Student and teacher begin as the file's teacher, which is what was evaluated.
    """
    path = str(cfg.run.init)
    if path.startswith(PREFIX):
        raise ValueError(
            f"run.init {path} is timm's own model, which is not trained here: give a file of its weights, which is recognized "
            "if it is of a ViT, ResNet or ConvNeXt"
        )
    unsaid = ("gamma", "mean", "std") if cfg.model.heads is None else ("gamma", "mean", "std", "heads")
    encoder = load_encoder(path, answers={name: getattr(cfg.model, name) for name in unsaid})  # for files of others
    free = FREE if cfg.model.is_vit else FREE | {"image_size"}
    theirs, ours = to_dict(encoder.config), to_dict(cfg.model)
    different = {name: value for name, value in theirs.items() if value != ours[name]}
    if wrong := [name for name in different if name not in free]:
        options = " ".join(f"--model.{name} {shlex.quote(json.dumps(different[name]).strip(chr(34)))}" for name in wrong)
        lines = ", ".join(f"model.{name} {ours[name]}, there {different[name]}" for name in wrong)
        raise ValueError(f"run.init {path} is of another model ({lines}): give {options}")
    for name, value in different.items():
        say(f"run.init: model.{name} was {value} there, now {ours[name]}")
    head, center = _head_of(path)
    with torch.device("meta"):
        wanted = DinoHead(encoder.embed_dim, **dataclasses.asdict(cfg.head)).state_dict()
    about: dict[str, Any] = {"checkpoint": path, "sha256": weights_sha256(encoder), "epochs": encoder.epochs}
    if {name: x.shape for name, x in head.items()} != {name: x.shape for name, x in wanted.items()}:
        why = "has no head" if not head else "has a head of other size or layers"
        say(f"run.init {path}: starts from its encoder; it {why}, so that a new one learns first (optim.freeze_encoder)")
        return Start(encoder.state_dict()), about | {"head": "new"}
    lengths = head["last_layer.parametrizations.weight.original0"]
    if cfg.head.norm_last_layer and not bool((lengths == 1).all()):
        say(
            f"warning: prototypes of {path} have lengths {lengths.min():.3g} to {lengths.max():.3g}, which stay while "
            "head.norm_last_layer is true: false lets them learn, as where they are from"
        )
    fits = center is not None and center.shape == (1, cfg.head.out_dim)
    say(f"run.init {path}: starts from its encoder and head, at step 0; to resume a run, give its run.out instead")
    return Start(encoder.state_dict(), head, center if fits else None), about | {"head": "of the file"}


def _head_of(path: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """The teacher's head and the center of the loss in a file; empty and None without."""
    if path.endswith(".safetensors"):
        return {}, None
    content = load_official(path)
    if "teacher" not in content:
        return {}, None
    state = from_official(content)
    head = {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}
    return head, center_of(content)
