"""One training step of this package beside a plain one, from the same weights and views.

The plain step computes what the published code does, in its way: attention as a softmax between two
products, SimPool with keys of all tokens, a loop of log-softmax terms over pairs of views, and a
loop over tensors for clipping, optimizer and moving average. Source: facebookresearch/dino
main_dino.py and utils.py, billpsomas/simpool sp.py. Inputs are random numbers: speed does not
depend on them, and no loader can be too slow.

First both run one step from the same weights, and their losses and gradients are compared. Then
they take turns, with a product of large matrices between them: its speed is what the machine can
reach at that moment.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dino_simpool.bench import interleave, medians, run, synchronize
from dino_simpool.config import BenchStepConfig, RunConfig, TrainConfig
from dino_simpool.data.feed import HALF, Batch
from dino_simpool.dino.learner import DinoLearner, build_dino
from dino_simpool.dino.model import DinoModel
from dino_simpool.dino.optim import clip_gradients, drop_last_layer_gradients, ema_update, parameter_groups, set_hyperparameters
from dino_simpool.dino.plan import StepValues
from dino_simpool.logs import text_table
from dino_simpool.models.pooling.simpool import SimPool

Step = Generator[str, None, Tensor]
"""A step in parts: it yields the name of each when it is queued, and returns the loss."""


def main(cfg: BenchStepConfig) -> None:
    """The command bench step."""
    run("step", cfg, cfg.out, lambda device: measure(cfg, device), describe)


class PlainSimPool(SimPool):
    """SimPool that multiplies every token by W_k, as published."""

    def _attention(self, tokens: Tensor, values: Tensor) -> Tensor:
        heads = (self.num_heads, -1)
        query = F.linear(tokens.mean(1, keepdim=True), self.q.weight.to(tokens.dtype)).unflatten(2, heads).transpose(1, 2)
        keys = F.linear(values, self.k.weight.to(tokens.dtype)).unflatten(2, heads).transpose(1, 2)
        return (query @ keys.transpose(2, 3) / math.sqrt(keys.shape[-1])).softmax(-1)[:, :, 0]


@dataclass
class PlainLearner:
    """The networks and the optimizer of the plain step."""

    student: DinoModel
    teacher: DinoModel
    center: Tensor
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    clip: float
    student_temperature: float
    center_momentum: float
    precision: str

    def step(self, views: Sequence[Tensor], values: StepValues) -> Step:
        """One step; yields the name of each part when it is queued, and returns the loss."""
        set_hyperparameters(self.optimizer, values.lr, values.weight_decay)
        half = HALF.get(self.precision)
        with torch.autocast(views[0].device.type, half, enabled=half is not None):
            with torch.no_grad():
                teacher = self.teacher.head.last_layer(self.teacher(views[:2]))
            yield "teacher"
            student = self.student.head.last_layer(self.student(views))
            yield "student"
            loss = self.loss(student, teacher, values.teacher_temperature)
            yield "loss"
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        yield "backward"
        self.scaler.unscale_(self.optimizer)
        for parameter in self.student.parameters():
            if self.clip and parameter.grad is not None:
                scale = self.clip / (parameter.grad.norm(2) + 1e-6)
                if scale < 1:
                    parameter.grad.mul_(scale)
        if values.freeze_last_layer:
            drop_last_layer_gradients(self.student)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        yield "clipping and optimizer"
        with torch.no_grad():
            for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                ours.mul_(values.momentum).add_((1 - values.momentum) * theirs)
        yield "moving average"
        return loss.detach()

    def loss(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """From logits (V, B, K) and (2, B, K); moves the center."""
        logits = student / self.student_temperature
        targets = ((teacher - self.center) / temperature).softmax(-1)
        terms = [
            (-target * logits[view].log_softmax(-1)).sum(-1).mean()
            for number, target in enumerate(targets)
            for view in range(len(logits))
            if view != number
        ]
        mean = teacher.float().mean((0, 1))
        self.center = self.center * self.center_momentum + mean * (1 - self.center_momentum)
        return torch.stack(terms).mean()


def make_plain(learner: DinoLearner, precision: str) -> PlainLearner:
    """The plain learner with the weights of ours, at step 0."""
    student, teacher = copy.deepcopy(learner.student), copy.deepcopy(learner.teacher)
    for module in (*student.modules(), *teacher.modules()):
        if isinstance(module, SimPool):
            module.__class__ = PlainSimPool
        elif isinstance(module, Attention):
            module.fused_attn = False  # type: ignore[misc]  # timm's own plain form
    for model in (student, teacher):
        model.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.AdamW(parameter_groups(student), foreach=False, fused=False)
    device = learner.loss.center.device.type
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    temperature, momentum = learner.loss.student_temp, learner.loss.center_momentum
    return PlainLearner(
        student, teacher, learner.loss.center.clone(), optimizer, scaler, learner.clip, temperature, momentum, precision
    )


def our_step(learner: DinoLearner, views: Sequence[Tensor], values: StepValues) -> Step:
    """The work of `DinoLearner.step` on one pass, in the parts of the plain step, so that each can
    be timed; without what takes back a step that is not finite."""
    set_hyperparameters(learner.optimizer, values.lr, values.weight_decay)
    learner.optimizer.zero_grad(set_to_none=True)
    half, temperature = HALF.get(learner.precision), values.teacher_temperature
    with torch.autocast(views[0].device.type, half, enabled=half is not None):
        with torch.no_grad():
            features = learner.teacher(views[:2])
        yield "teacher"
        student = learner.forward(views)
        yield "student"
    with torch.no_grad():
        logits = learner.teacher.head.last_layer(features)
    result = learner.loss.fused(student, learner.student.head.last_layer.weight, logits, temperature)
    yield "loss"
    learner.scaler.scale(result.loss).backward()
    yield "backward"
    learner.scaler.unscale_(learner.optimizer)
    clip_gradients(learner.student.parameters(), learner.clip)
    if values.freeze_last_layer:
        drop_last_layer_gradients(learner.student)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    yield "clipping and optimizer"
    ema_update(learner.teacher, learner.student, values.momentum)
    yield "moving average"
    return result.loss.detach()


def measure(cfg: BenchStepConfig, device: torch.device) -> dict[str, Any]:
    """All measurements, for the record."""
    on_gpu = device.type == "cuda"
    batch = cfg.batch_size or (128 if on_gpu or cfg.preset else 8)
    precision = cfg.precision or ("bf16" if on_gpu or cfg.preset else "fp32")
    plain_precision = cfg.plain_precision or ("fp16" if on_gpu and precision == "bf16" else precision)
    settings = RunConfig(batch_size=batch, precision=precision, epochs=100)
    images = 1000 * batch  # it only sets the length of the schedules
    train = TrainConfig(model=cfg.model, head=cfg.head, crops=cfg.crops, run=settings)
    learner = build_dino(train, images, device)
    values = learner.plan.values(learner.plan.total_steps // 2)
    views = make_views(cfg, batch, device)
    found: dict[str, Any] = compare(build_dino(train, images, device), make_plain(learner, precision), views, values)
    found["exact"] = compare(*_in_float64(train, images, device), [view[:2].double() for view in views], values)
    plain = make_plain(learner, plain_precision)
    given = Batch(views, torch.arange(batch))
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: _result(plain.step(views, values)),
        "ours": lambda: learner.step([given], values),
    }
    if cfg.compile:
        compiled = build_dino(dataclasses.replace(train, run=dataclasses.replace(settings, compile=True)), images, device)
        ways["ours, compiled"] = lambda: compiled.step([given], values)
    flops = {name: _flops(way) for name, way in ways.items() if "compiled" not in name}
    memory = {name: _peak_memory(way, device) for name, way in ways.items()}  # also the first, slower step of each
    rate, product = matrix_product(device, precision)
    product()
    seconds, _ = interleave(ways | {"matrix product": product}, repetitions=cfg.repetitions, device=device)
    middle = medians(seconds)
    for name in ways:
        counted = flops[name.partition(",")[0]]
        found[name] = {
            "seconds": middle[name],
            "images_per_second": batch / middle[name],
            "times_plain": medians({"": [a / b for a, b in zip(seconds["plain"], seconds[name], strict=True)]})[""],
            "flops": counted,
            "tflops_per_second": counted / middle[name] / 1e12,
            "share_of_matrix_product": counted / middle[name] / (rate / middle["matrix product"]),
            "peak_gib": memory[name],
        }
    parts = {
        "plain": _parts(lambda: plain.step(views, values), cfg.repetitions, device),
        "ours": _parts(lambda: our_step(learner, views, values), cfg.repetitions, device),
    }
    used = {
        "batch_size": batch,
        "precision": precision,
        "plain_precision": plain_precision,
        "views": [list(v.shape) for v in views],
    }
    product_tflops = rate / middle["matrix product"] / 1e12
    return found | {"parts": parts, "seconds": seconds, "matrix_product_tflops": product_tflops} | used


def _in_float64(train: TrainConfig, images: int, device: torch.device) -> tuple[DinoLearner, PlainLearner]:
    """Both learners in float64, where codes that do the same hardly differ. A ResNet's BatchNorms
    and ReLUs amplify rounding: in bfloat16 its gradients would say nothing."""
    settings = dataclasses.replace(train.run, precision="fp32")
    learner = build_dino(dataclasses.replace(train, run=settings), images, device)
    for module in (learner.student, learner.teacher, learner.loss):
        module.double()
    return learner, make_plain(learner, "fp32")


def make_views(cfg: BenchStepConfig, batch: int, device: torch.device) -> list[Tensor]:
    """Random views of the sizes of cfg.crops, the global ones first."""
    sizes = [cfg.crops.global_size] * 2 + [cfg.crops.local_size] * cfg.crops.num_local
    generator = torch.Generator().manual_seed(cfg.seed)
    return [torch.randn(batch, 3, size, size, generator=generator).to(device) for size in sizes]


def compare(learner: DinoLearner, plain: PlainLearner, views: Sequence[Tensor], values: StepValues) -> dict[str, float]:
    """How far loss and clipped gradients of one step of ours are from those of a plain one.

    Both start from the same weights and are used up. The difference of the gradients is the length
    of that of all of them, as a share of their length.
    """
    torch.manual_seed(0)  # of stochastic depth
    ours = float(learner.step([Batch(list(views), torch.arange(len(views[0])))], values)["loss"])
    torch.manual_seed(0)
    theirs = float(_result(plain.step(views, values)))
    gradients = [
        [p.grad.double() for p in student.parameters() if p.grad is not None] for student in (learner.student, plain.student)
    ]
    apart, length = (
        torch.stack([tensor.norm() for tensor in tensors]).norm()
        for tensors in ([a - b for a, b in zip(*gradients, strict=True)], gradients[1])
    )
    return {"loss_difference": abs(ours / theirs - 1), "gradient_difference": float(apart / length)}


def matrix_product(device: torch.device, precision: str) -> tuple[int, Callable[[], Tensor]]:
    """Operations (two for each multiply-add) of a product of square matrices, and the product."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = HALF.get(precision) or torch.float32
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3, lambda: a @ b


def describe(record: dict[str, Any]) -> str:
    """The tables that are printed."""
    rows = [["step", "seconds", "images/s", "times plain", "TFLOP/s", "share of a matrix product", "peak GiB"]]
    for name in ("plain", "ours", "ours, compiled"):
        if found := record.get(name):
            peak = "not measured" if found["peak_gib"] is None else f"{found['peak_gib']:.1f}"
            rows.append([
                f"{name}, {record['plain_precision' if name == 'plain' else 'precision']}",
                f"{found['seconds']:.4f}",
                f"{found['images_per_second']:.1f}",
                f"{found['times_plain']:.2f}",
                f"{found['tflops_per_second']:.3g}",
                f"{100 * found['share_of_matrix_product']:.0f} %",
                peak,
            ])  # fmt: skip
    parts = [["ms", *record["parts"]["plain"]]]
    parts += [[name, *(f"{1000 * value:.1f}" for value in found.values())] for name, found in record["parts"].items()]
    model = record["config"]["model"]
    return "\n".join([
        f"{model['arch']} with {model['pool']}, batch {record['batch_size']}, {len(record['views'])} views, "
        f"{record['machine']['device']}, a matrix product {record['matrix_product_tflops']:.3g} TFLOP/s",
        f"from the same weights, ours is apart from plain by {record['loss_difference']:.1e} of the loss and "
        f"{record['gradient_difference']:.1e} of the gradients ({record['precision']}); in float64, on two images, by "
        f"{record['exact']['loss_difference']:.1e} and {record['exact']['gradient_difference']:.1e}",
        "",
        text_table(rows, rule=True),
        "",
        text_table(parts, rule=True),
    ])  # fmt: skip


def _result(step: Step) -> Tensor:
    """Run a step to its end."""
    while True:
        try:
            next(step)
        except StopIteration as end:
            loss: Tensor = end.value
            return loss


def _flops(way: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        way()
    return counter.get_total_flops()


def _peak_memory(way: Callable[[], Any], device: torch.device) -> float | None:
    """GiB of the GPU's memory that one step needs beyond what stays allocated; None on a CPU. The
    first step of a way is not the one that is measured."""
    way()
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    way()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def _parts(step: Callable[[], Step], repetitions: int, device: torch.device) -> dict[str, float]:
    """Seconds of each part of a step, the median over the rounds, with a wait for the device after
    each part: together they take longer than a step."""
    rounds: dict[str, list[float]] = {}
    for _ in range(repetitions):
        synchronize(device)
        started = time.perf_counter()
        for name in step():
            synchronize(device)
            rounds.setdefault(name, []).append(time.perf_counter() - started)
            started = time.perf_counter()
    return medians(rounds)
