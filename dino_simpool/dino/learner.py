"""The learner and one step of it: what DINO does to a batch of views.

Source: the iteration of facebookresearch/dino main_dino.py (also of SimPool's release), in its order: rates, teacher, student,
loss, backward, clipping, frozen prototypes, optimiser, moving average.
V views, b images of one pass, K prototypes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino_simpool import distributed
from dino_simpool.config import TrainConfig
from dino_simpool.dino.loss import DinoLoss
from dino_simpool.dino.model import DinoHead, DinoModel, make_teacher
from dino_simpool.dino.monitor import Monitor
from dino_simpool.dino.optim import build_optimizer, clip_gradients, drop_last_layer_gradients, ema_update, set_hyperparameters
from dino_simpool.dino.plan import StepValues
from dino_simpool.models.encoder import build_encoder
from dino_simpool.models.weights import load_strict

METRICS = ("loss", "entropy", "kl", "grad_norm")


class NonFiniteLoss(FloatingPointError):
    """The loss (found before the optimiser's step) or a weight (when saving) is not finite; all processes raise it at once."""


@dataclass
class Learner:
    """Everything that a step changes, and nothing else."""

    student: DinoModel
    teacher: DinoModel
    loss: DinoLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    monitor: Monitor
    sums: Tensor
    """(2, 1 + metrics): steps and summed METRICS since the last line of the log, and since the epoch began."""
    step: int = 0
    epoch_open: bool = False
    """All steps of the last epoch are done, but it is not yet evaluated and logged."""
    best: float = -1.0

    def state(self) -> dict[str, Any]:
        """As tensors and plain values."""
        parts = {
            name: getattr(self, name).state_dict() for name in ("student", "teacher", "loss", "optimizer", "scaler", "monitor")
        }
        return {**parts, "sums": self.sums.cpu(), "step": self.step, "epoch_open": self.epoch_open, "best": self.best}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a stored state, strictly."""
        for name in ("student", "teacher", "loss"):
            load_strict(getattr(self, name), state[name], source=f"the {name}")
        for name in ("optimizer", "monitor"):
            getattr(self, name).load_state_dict(state[name])
        if state["scaler"]:  # empty unless the precision was fp16
            self.scaler.load_state_dict(state["scaler"])
        self.sums.copy_(state["sums"])
        self.step, self.epoch_open, self.best = state["step"], state["epoch_open"], state["best"]

    def take_means(self, row: int) -> tuple[int, dict[str, float]]:
        """Steps and mean METRICS over all processes since the last call for that row of the sums, which starts anew."""
        steps, *sums = distributed.all_mean(self.sums[row]).tolist()
        self.sums[row] = 0
        return int(steps), {name: value / steps for name, value in zip(METRICS, sums, strict=True)}


def build_learner(cfg: TrainConfig, device: torch.device, *, warmup_steps: int = 0) -> Learner:
    """Student, teacher, loss and optimiser of a run at step 0. warmup_steps: of the learning rate, for the monitor."""
    torch.manual_seed(cfg.run.seed)
    encoder = build_encoder(cfg.model)
    head = DinoHead(
        encoder.embed_dim,
        cfg.head.out_dim,
        hidden_dim=cfg.head.hidden_dim,
        bottleneck_dim=cfg.head.bottleneck_dim,
        layers=cfg.head.layers,
        batch_norm=cfg.head.batch_norm,
        norm_last_layer=cfg.head.norm_last_layer,
    )
    # Convolutions are faster with the channels last (1.3 times in a CPU step of a small ResNet); transformers do not care.
    student = DinoModel(encoder, head).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher = make_teacher(student, cfg.teacher.drop_path)
    for model in (student, teacher):
        distributed.synchronize_batch_norm(model, device)
        if cfg.run.compile:
            compile_blocks(model)
    loss = DinoLoss(
        cfg.head.out_dim,
        student_temp=cfg.loss.student_temperature,
        center_momentum=cfg.loss.center_momentum,
    ).to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.run.precision == "fp16")
    exact = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(2, 1 + len(METRICS), dtype=exact, device=device)
    return Learner(student, teacher, loss, build_optimizer(cfg.optim, student), scaler, Monitor(warmup_steps), sums)


def compile_blocks(model: DinoModel) -> None:
    """torch.compile each block of the trunk in place: few small graphs for both crop sizes, and parameters keep their names."""
    blocks = [m for m in model.encoder.trunk.modules() if isinstance(m, (Block, BasicBlock, Bottleneck, ConvNeXtBlock))]
    if not blocks:
        raise ValueError(f"run.compile does not know the blocks of {model.encoder.config.arch}: set run.compile false")
    # Blocks share their code, so each one's crop sizes and stochastic depth count against a limit of 8, past which torch would
    # go on uncompiled with a line in its log.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16 * len(blocks))
    for block in blocks:
        block.compile()


def train_step(
    learner: Learner,
    batches: Iterable[list[Tensor]],
    values: StepValues,
    *,
    forward: nn.Module,
    accumulate: int = 1,
    clip: float = 0.0,
    precision: str = "fp32",
    requests: Sequence[bool] = (),
) -> tuple[Tensor, Tensor, list[bool]]:
    """One step of the optimiser.

    batches: `accumulate` lists of V tensors (b, 3, S, S), the two global views first. forward: the student, or what wraps it.
    requests: what this process asks for (to stop, to save). Returns the METRICS of this process, (4,); the teacher's unit
    features of the last batch, (2, b, bottleneck); and for each request whether any process made it.
    NonFiniteLoss leaves the weights as they were.
    """
    device, exact = learner.sums.device, learner.sums.dtype
    set_hyperparameters(learner.optimizer, values.lr, values.weight_decay)
    learner.optimizer.zero_grad(set_to_none=True)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    summed = torch.zeros(3, dtype=exact, device=device)
    center = torch.zeros_like(learner.loss.center)
    for number, views in enumerate(batches):
        last = number == accumulate - 1
        with forward.no_sync() if isinstance(forward, DistributedDataParallel) and not last else contextlib.nullcontext():
            with torch.autocast(device.type, half, enabled=half is not None):
                with torch.no_grad():
                    teacher_features = learner.teacher(views[:2])
                student_features = forward(views)
            with torch.no_grad():
                teacher_logits = learner.teacher.head.last_layer(teacher_features)
                center += teacher_logits.mean((0, 1)) / accumulate
            result = learner.loss.fused(
                student_features,
                learner.student.head.last_layer.weight,
                teacher_logits,
                values.teacher_temperature,
                update_center=False,
            )
            summed += torch.stack([result.loss, result.entropy, result.kl]).detach() / accumulate
            if last:  # sent to the host before the backward pass is queued, so that reading it does not wait for that pass
                flags, sent = _ask_all(summed[0], requests)
            learner.scaler.scale(result.loss / accumulate).backward()
    if sent is not None:
        sent.synchronize()
    not_finite, *granted = flags.bool().tolist()
    if not_finite:
        whose = f"loss is {float(summed[0])}" if not summed[0].isfinite() else "loss of another process is not finite"
        raise NonFiniteLoss(f"the {whose} in step {learner.step + 1}; the weights of the step before are kept")
    learner.loss.update_center(center)
    learner.scaler.unscale_(learner.optimizer)
    norms = clip_gradients(learner.student.parameters(), clip)
    if values.freeze_last_layer:
        drop_last_layer_gradients(learner.student)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    ema_update(learner.teacher, learner.student, values.momentum)
    learner.step += 1
    metrics = torch.cat([summed, norms.norm()[None].to(exact)])
    learner.sums += torch.cat([metrics.new_ones(1), metrics])
    return metrics, teacher_features, granted


def _ask_all(loss: Tensor, requests: Sequence[bool]) -> tuple[Tensor, torch.Event | None]:
    """On the way to the host: is any process's loss not finite, and has any process each request?"""
    asked = torch.tensor([float(request) for request in requests])
    if loss.device.type == "cuda":
        asked = asked.pin_memory()  # otherwise the copy waits for the device
    own = torch.cat([(~loss.isfinite()).float()[None], asked.to(loss.device, non_blocking=True)])
    flags = distributed.all_max(own).to("cpu", non_blocking=True)
    if loss.device.type == "cpu":
        return flags, None
    sent = torch.Event(loss.device)
    sent.record()
    return flags, sent
