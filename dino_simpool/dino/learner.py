"""DINO as a learner: student, teacher, loss and optimizer, and one step of them on a batch of
views.

Source: the iteration of facebookresearch/dino main_dino.py (also of SimPool's release), in its
order: rates, teacher, student, loss, backward, clipping, frozen prototypes, optimizer, moving
average. Deviation: where that stops at a loss that is not finite, the step is left out here, as is
one whose gradients are not finite. All processes and the device know it from the norm of the
gradients, without waiting for each other or for the host.

V views, b images of one pass, K prototypes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import socket
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino_simpool import distributed
from dino_simpool.config import TrainConfig
from dino_simpool.data.feed import HALF, Batch
from dino_simpool.dino.capture import CapturedPass
from dino_simpool.dino.loss import DinoLoss
from dino_simpool.dino.model import DinoHead, DinoModel, make_teacher
from dino_simpool.dino.monitor import Monitor, effective_rank, feature_spread
from dino_simpool.dino.optim import (
    build_optimizer,
    clip_gradients,
    copies,
    drop_last_layer_gradients,
    ema_update,
    put_back,
    set_hyperparameters,
    step_if,
)
from dino_simpool.dino.plan import Plan, StepValues, make_plan
from dino_simpool.failures import UnequalGradients, first_difference
from dino_simpool.models.encoder import Encoder, build_encoder
from dino_simpool.models.stream import can_stream, run_block
from dino_simpool.models.weights import load_strict


@dataclass(frozen=True)
class Start:
    """Weights that student and teacher begin with, both the same."""

    encoder: dict[str, Tensor]
    head: dict[str, Tensor] | None = None
    """None: a new head."""
    center: Tensor | None = None
    """(1, K) center of the loss, that fits the head."""


@dataclass
class DinoLearner:
    """Everything that a step changes, and the options that it follows (see learners.Learner)."""

    student: DinoModel
    teacher: DinoModel
    loss: DinoLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    monitor: Monitor
    plan: Plan
    forward: nn.Module
    """The student, or what wraps it for several processes."""
    accumulate: int = 1
    clip: float = 0.0
    precision: str = "fp32"
    verify_every: int = 0
    steps: int = 0
    captured: CapturedPass | None = None
    """The pass as a CUDA graph, if there is one."""
    norms: tuple[list[str], Tensor] = dataclasses.field(default_factory=lambda: ([], torch.zeros(0)))
    features: Tensor | None = None
    """The teacher's unit features (2, b, bottleneck) of the last batch."""

    metrics: ClassVar[tuple[str, ...]] = ("loss", "entropy", "kl", "grad_norm", "skipped_steps", "bad_step")
    shown: ClassVar[str] = "loss_over_lnK"

    @property
    def encoder(self) -> Encoder:
        """The teacher's, as published."""
        return self.teacher.encoder

    @property
    def network(self) -> DinoModel:
        """The student."""
        return self.student

    def describe(self) -> str:
        """Architecture, pooling and numbers of parameters."""
        model = self.student.encoder.config
        encoder, head = (sum(p.numel() for p in part.parameters()) for part in (self.student.encoder, self.student.head))
        return f"{model.arch} with {model.pool}, {encoder:,} parameters, head {head:,} parameters"

    def step(self, batches: Iterable[Batch], values: StepValues) -> dict[str, Tensor]:
        """One step of the optimizer on `accumulate` batches; returns its metrics in high precision.

        They are 0 for a step that is left out. Its counts tell whether it was (skipped_steps), and
        whether that is bad (bad_step): in float16 it is not if only the gradients overflow.
        UnequalGradients leaves everything as it was.
        """
        if self.verify_every and (self.steps + 1) % self.verify_every == 0:
            batches = list(batches)
            self._verify(batches, values)
        of_encoders = [*self.student.encoder.buffers(), *self.teacher.encoder.buffers()]
        of_heads = [*self.student.head.buffers(), *self.teacher.head.buffers()]
        encoders_before, heads_before = copies(of_encoders), copies(of_heads)
        summed, batch_center = self._backward(batches, values)
        self.scaler.unscale_(self.optimizer)
        named = [(name, p) for name, p in self.student.named_parameters() if p.grad is not None]
        norms = clip_gradients((p for _, p in named), self.clip)
        self.norms = [name for name, _ in named], norms
        norm = norms.norm().to(summed.dtype)
        finite = norm.isfinite()
        put_back(of_encoders, encoders_before, unless=finite & (not values.freeze_encoder))
        put_back(of_heads, heads_before, unless=finite)
        if values.freeze_encoder:  # without gradients there are neither moments nor weight decay
            self.student.encoder.zero_grad(set_to_none=True)
        if values.freeze_last_layer:
            drop_last_layer_gradients(self.student)
        set_hyperparameters(self.optimizer, values.lr, values.weight_decay)
        step_if(finite, self.optimizer)
        self.scaler.update()
        before = copies([self.loss.center])
        self.loss.update_center(batch_center)
        put_back([self.loss.center], before, unless=finite)
        both: tuple[nn.Module, nn.Module] = self.teacher, self.student
        teacher, student = (self.teacher.head, self.student.head) if values.freeze_encoder else both
        ema_update(teacher, student, values.momentum, only_if=finite)
        self.steps += 1
        # Gradients that overflow in float16 are how the scaler finds its scale.
        bad = ~summed[0].isfinite() if self.scaler.is_enabled() else ~finite
        counts = torch.stack([~finite, bad]).to(summed.dtype)
        return dict(zip(self.metrics, [*torch.stack([*summed, norm]).where(finite, 0), *counts], strict=True))

    def _backward(self, batches: Iterable[Batch], values: StepValues, *, local: bool = False) -> tuple[Tensor, Tensor]:
        """Make the gradients of a step, over all processes unless `local`.

        Returns loss, entropy and KL divergence (3,) of this process in high precision, and the mean
        (1, K) of its teacher's logits. BatchNorm's statistics move.
        """
        center = self.loss.center
        self.optimizer.zero_grad(set_to_none=True)
        if self.captured:
            self.captured.clear_gradients()
        summed = torch.zeros(3, dtype=distributed.exact_dtype(center.device), device=center.device)
        batch_center = torch.zeros_like(center)
        for number, batch in enumerate(batches):
            with self._gradients_stay_here(local or number < self.accumulate - 1):
                terms, center_of_pass = (self.captured or self._pass)(batch.views, values.teacher_temperature)
                batch_center += center_of_pass / self.accumulate
                summed += terms / self.accumulate
        return summed, batch_center

    def _pass(self, views: Sequence[Tensor], teacher_temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        """Add the gradients of one pass; loss, entropy and KL divergence (3,), and the mean (K,) of
        the teacher's logits."""
        result, center = self._forward(views, teacher_temperature)
        # Times 1, or times NaN if it is not finite: then no gradient is, here and, by their sum, in
        # all processes.
        loss = result.loss * (1 + 0 * result.loss.detach())
        self.scaler.scale(loss / self.accumulate).backward()
        return torch.stack([result.loss, result.entropy, result.kl]).detach(), center

    def _verify(self, batches: Sequence[Batch], values: StepValues) -> None:
        """UnequalGradients, in all processes, if two computations of a step's gradients differ.

        Those of each process are compared before their sum, so that it is known whose differ.
        Nothing else than the gradients changes.
        """
        device = self.loss.center.device
        statistics = [*self.student.buffers(), *self.teacher.buffers()]
        before = copies(statistics)
        computed = []
        for _ in range(2):
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                self._backward(batches, values, local=True)
            computed.append({name: p.grad.clone() for name, p in self.student.named_parameters() if p.grad is not None})
            put_back(statistics, before, unless=torch.zeros((), dtype=torch.bool, device=device))
        name = first_difference(*computed)
        mine = f"process {distributed.rank()} on {socket.gethostname()}, {device}: first in {name}" if name else ""
        if found := [said for said in distributed.gather_objects(mine) if said]:
            raise UnequalGradients(
                f"the gradients of step {self.steps + 1}, computed twice from the same numbers, differ ({'; '.join(found)}): "
                "the weights of the step before are kept; test or replace the device and its memory"
            )

    def _forward(self, views: Sequence[Tensor], teacher_temperature: float | Tensor) -> tuple[Any, Tensor]:
        """The loss terms of one pass, and the mean (K,) of the teacher's logits."""
        half = HALF.get(self.precision)
        with torch.autocast(views[0].device.type, half, enabled=half is not None):
            with torch.no_grad():
                self.features = self.teacher(views[:2])
            student_features = self.forward(views)
        with torch.no_grad():
            teacher_logits = self.teacher.head.last_layer(self.features)
        prototypes = self.student.head.last_layer.weight
        result = self.loss.fused(student_features, prototypes, teacher_logits, teacher_temperature, update_center=False)
        return result, teacher_logits.mean((0, 1))

    def _gradients_stay_here(self, wanted: bool) -> contextlib.AbstractContextManager[object]:
        """A context without the sum over processes, which only the last pass of a step needs."""
        if wanted and isinstance(self.forward, DistributedDataParallel):
            return self.forward.no_sync()
        return contextlib.nullcontext()

    def watch(self, means: dict[str, float]) -> tuple[dict[str, float], list[str]]:
        """Fields of a log line, and what the monitor thinks of the steps since the last one."""
        assert self.features is not None, "there was a step"
        rows = self.features.flatten(0, 1).float()
        spread, rank = math.nan, math.nan
        if len(rows) >= 8:  # two views of a handful of images say nothing about a collapse
            measured = torch.stack([feature_spread(rows), effective_rank(rows)]).to(distributed.exact_dtype(rows.device))
            spread, rank = distributed.all_mean(measured).tolist()
        out_dim = self.loss.center.shape[1]
        log_k = math.log(out_dim)
        elapsed = self.steps - self.monitor.last_step
        skipped = round(means["skipped_steps"] * elapsed)
        means = _of_steps_done(means)
        fields = {
            "loss": means["loss"],
            "loss_over_lnK": means["loss"] / log_k,
            "entropy_over_lnK": means["entropy"] / log_k,
            "kl": means["kl"],
            "grad_norm": means["grad_norm"],
            "feature_spread": spread,
            "effective_rank": rank,
            "center_norm": self.loss.center.norm().item(),
        }
        fields |= {
            name: value for name, value in means.items() if name not in (*fields, "entropy", "skipped_steps", "bad_step")
        }
        loss, entropy = means["loss"], means["entropy"]
        warnings = self.monitor.update(
            loss=loss,
            entropy=entropy,
            out_dim=out_dim,
            spread=spread,
            step=self.steps,
            steps_per_epoch=self.plan.steps_per_epoch,
        )
        if self.scaler.is_enabled():
            fields["skipped_steps"] = skipped
            if skipped > max(10, 0.1 * elapsed):  # a few are normal while the scale finds its value
                warnings.append(
                    f"{skipped} of {elapsed} steps were skipped, because their gradients overflowed in float16: use "
                    "run.precision bf16, or lower optim.lr"
                )
        return fields, warnings

    def epoch_fields(self, means: dict[str, float], values: Sequence[StepValues]) -> dict[str, float]:
        """Under the names of the published SimPool training, which existing tools read."""
        steps = len(values)
        skipped = round(means["skipped_steps"] * steps)
        means = _of_steps_done(means)
        return {
            "train_loss": means["loss"],
            "train_entropy": means["entropy"],
            "train_KL_div": means["kl"],
            "train_lr": sum(v.lr for v in values) / steps,
            "train_wd": sum(v.weight_decay for v in values) / steps,
            "train_momentum": sum(v.momentum for v in values) / steps,
            "train_teacher_temp": statistics.mean(v.teacher_temperature for v in values),  # exact if they are all the same
            "train_grad_norm": means["grad_norm"],
        } | ({"train_skipped_steps": skipped} if self.scaler.is_enabled() else {})

    def state(self) -> dict[str, Any]:
        """As tensors and plain values."""
        names = ("student", "teacher", "loss", "optimizer", "scaler", "monitor")
        return {name: getattr(self, name).state_dict() for name in names} | {"step": self.steps, "new_head": self.plan.new_head}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a stored state, strictly."""
        for name in ("student", "teacher", "loss"):
            load_strict(getattr(self, name), state[name], source=f"the {name}")
        for name in ("optimizer", "monitor"):
            getattr(self, name).load_state_dict(state[name])
        for parameter, stored in self.optimizer.state.items():  # torch does not compare them
            for name, value in stored.items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise ValueError(
                        f"{name} of the optimizer is {tuple(value.shape)} for a parameter {tuple(parameter.shape)}"
                    )
        if state["scaler"]:  # empty unless the precision was fp16
            self.scaler.load_state_dict(state["scaler"])
        self.steps = state["step"]
        self.plan = dataclasses.replace(self.plan, new_head=state.get("new_head", False))  # version 0.1 had no run.init


def build_dino(cfg: TrainConfig, num_images: int, device: torch.device, start: Start | None = None) -> DinoLearner:
    """Student, teacher, loss, optimizer and plan of a run on that many images, at step 0.

    start: weights in place of random ones.
    ValueError for options that do not fit each other, the images or the architecture.
    """
    plan = make_plan(cfg, num_images)
    if device.type == "cuda":
        # TF32 for what stays in float32 beside half precision, the prototypes' products above all:
        # its 10 bits are more than those of bfloat16, and sums and results keep 23. Not in fp32,
        # also after a run in half precision in the same process.
        torch.set_float32_matmul_precision("highest" if cfg.run.precision == "fp32" else "high")
    torch.manual_seed(cfg.run.seed)
    encoder = build_encoder(cfg.model)
    head = DinoHead(encoder.embed_dim, **dataclasses.asdict(cfg.head))
    if start is not None:
        load_strict(encoder, start.encoder, source=f"the encoder of {cfg.run.init}")
        if start.head is not None:
            load_strict(head, start.head, source=f"the head of {cfg.run.init}")
        plan = dataclasses.replace(plan, new_head=start.head is None)
    # Convolutions are faster with the channels last (1.3 times in a CPU step of a small ResNet);
    # transformers do not care. What BatchNorm would lose: models/batch_norm.py.
    student = DinoModel(encoder, head).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher = make_teacher(student, cfg.teacher.drop_path)
    plan = dataclasses.replace(
        plan, warnings=(*plan.warnings, *_passes_are_not_the_batch(student, cfg), *_cannot_repeat(cfg, device))
    )
    for model in (student, teacher):
        distributed.synchronize_batch_norm(model, device)
        if cfg.run.compile:
            compile_blocks(model)
    temperature, momentum = cfg.loss.student_temperature, cfg.loss.center_momentum
    loss = DinoLoss(cfg.head.out_dim, student_temp=temperature, center_momentum=momentum).to(device)
    if start is not None and start.center is not None:
        loss.center.copy_(start.center)
    forward: nn.Module = student
    if distributed.world_size() > 1:
        forward = DistributedDataParallel(student, gradient_as_bucket_view=True)
        # The argument has another name from torch 2.13 on. Buffers are equal from the start.
        forward.broadcast_buffers = False
    learner = DinoLearner(
        student,
        teacher,
        loss,
        build_optimizer(cfg.optim, student),
        torch.amp.GradScaler(device.type, enabled=cfg.run.precision == "fp16"),
        Monitor(plan.warmup_steps),
        plan,
        forward,
        accumulate=cfg.run.accumulate,
        clip=cfg.optim.clip,
        precision=cfg.run.precision,
        verify_every=cfg.run.verify_every,
    )
    if cfg.run.compile and device.type == "cuda" and distributed.world_size() == 1:
        buffers = [*student.buffers(), *teacher.buffers()]
        learner.captured = CapturedPass(learner._pass, student.parameters(), buffers, add=cfg.run.accumulate > 1)
    return learner


def compile_blocks(model: DinoModel) -> None:
    """torch.compile the blocks of the trunk in place. Names do not change.

    Blocks are compiled as one function of a block, so those that are alike share their graphs.
    """
    trunk = model.encoder.trunk
    blocks: list[Any] = [m for m in trunk.modules() if isinstance(m, (Block, BasicBlock, Bottleneck, ConvNeXtBlock))]
    if not blocks:
        raise ValueError(f"run.compile does not know the blocks of {model.encoder.config.arch}: set run.compile false")
    # Crop sizes, widths and the stochastic depth of each block count against a limit of 8. Past it
    # torch would run uncompiled and say so only in its log.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16 * len(blocks))
    model.encoder.run_pool = torch.compile(Encoder.pooled, dynamic=False)
    if model.encoder.config.is_vit and can_stream(blocks):
        model.encoder.run_block = torch.compile(run_block, dynamic=False)
        return
    forward = torch.compile(_forward_of, dynamic=False)
    for block in blocks:
        block.forward = functools.partial(forward, block)


def _forward_of(block: nn.Module, x: Tensor) -> Any:
    return type(block).forward(block, x)


def _of_steps_done(means: dict[str, float]) -> dict[str, float]:
    """The means over the steps that were not left out, from those over all. NaN if all were."""
    done = 1 - means["skipped_steps"]
    return {name: value / done if done else math.nan for name, value in means.items()}


def _passes_are_not_the_batch(model: DinoModel, cfg: TrainConfig) -> list[str]:
    """A warning if accumulated passes train something else than one pass over the batch."""
    if cfg.run.accumulate == 1:
        return []
    kind, model_cfg = nn.modules.batchnorm._BatchNorm, cfg.model
    found = [
        f"BatchNorm in the {name}"
        for name, part in (("encoder", model.encoder), ("head", model.head))
        if any(isinstance(module, kind) for module in part.modules())
    ]
    if model_cfg.pool == "simpool" and model_cfg.gamma is not None and model_cfg.min_over == "batch":
        found.append("model.min_over batch")
    if not found:
        return []
    batch, images = cfg.run.batch_size, cfg.run.batch_size // cfg.run.accumulate
    return [
        f"run.accumulate {cfg.run.accumulate} with {' and '.join(found)} is another training than batch {batch} in one pass: "
        f"each pass sees its own {images} images only. For the same training set run.accumulate 1 (more processes or memory)"
    ]


def _cannot_repeat(cfg: TrainConfig, device: torch.device) -> list[str]:
    """A warning if this device may add up in another order each time, and a run would verify it."""
    if not cfg.run.verify_every or device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
        return []
    return [
        f"run.verify_every {cfg.run.verify_every}: on {device.type} some operations add up in another order each time, unless "
        "torch.use_deterministic_algorithms is on; gradients that differ may be no mistake of the device"
    ]
