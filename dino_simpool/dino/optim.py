"""Optimizers of the student, gradient clipping, and the teacher's moving average.

Each is a few large operations that do not wait for the device, nor does what takes back a step
whose gradients are not finite. Source: the training of DINO
(github.com/facebookresearch/dino, main_dino.py and utils.py), which SimPool uses unchanged. There
are two parameter groups: tensors with weight decay, and biases and one-dimensional parameters
without. Each parameter is clipped by its own norm (not a global one). A frozen last layer has no
gradient at all, hence neither moments nor decay. Schedules are in plan.py.

LARS is our own short version, because timm's `Lars` becomes another algorithm once weight decay
matters: its trust ratio divides by |g| + decay * |p|, while the published one divides by
|g + decay * p|, and it stops adapting where the decay is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dino_simpool.config import OptimConfig


class Lars(torch.optim.Optimizer):
    """SGD with momentum, with a step size of its own for each parameter.

    Each update is scaled by trust_coefficient * |p| / |g + weight_decay * p|. One-dimensional
    parameters are neither scaled nor decayed. A zero parameter or update is not scaled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates: list[Tensor] = [p.grad for p in params]
            adapted = [i for i, p in enumerate(params) if p.ndim != 1]
            if adapted:
                tensors = [params[i] for i in adapted]
                decayed = torch._foreach_add([updates[i] for i in adapted], tensors, alpha=group["weight_decay"])
                norms, update_norms = (torch.stack(torch._foreach_norm(t)) for t in (tensors, decayed))
                ratios = torch.where((norms > 0) & (update_norms > 0), group["trust_coefficient"] * norms / update_norms, 1.0)
                torch._foreach_mul_(decayed, ratios.unbind())
                for i, update in zip(adapted, decayed, strict=True):
                    updates[i] = update
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: with weight decay, and without.

    Biases and one-dimensional parameters have none; position embeddings and class tokens are
    decayed, as published. Each group has "params", "names" (in the same order) and "weight_decay"
    (0 here, set by `set_hyperparameters`). Each trainable parameter is in exactly one group.
    """
    decayed: list[tuple[str, nn.Parameter]] = []
    plain: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if name.endswith(".bias") or parameter.ndim == 1 else decayed).append((name, parameter))
    return [
        {"params": [p for _, p in group], "names": [n for n, _ in group], "weight_decay": 0.0} for group in (decayed, plain)
    ]


def build_optimizer(cfg: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer cfg.name over the two `parameter_groups`.

    Learning rate and weight decay are set before each step. AdamW is torch's fused version: one
    kernel per group, also on the CPU, bit-equal from run to run with the same number of threads.
    SGD is not fused, because torch's fused SGD cannot take parameters that get their first gradient
    later (the last layer).
    """
    groups = parameter_groups(model)
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, fused=True)
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, foreach=True)
    return Lars(groups, cfg.lr, momentum=cfg.momentum)


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set the learning rate of both groups, and the weight decay of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale each gradient by min(1, max_norm / (its L2 norm + 1e-6)). max_norm 0 does not clip.

    Returns the norms before clipping, (number of parameters with a gradient,), in order, on their
    device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(0)
    norms = torch.stack(torch._foreach_norm(gradients))
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norms + 1e-6)).clamp(max=1).unbind())
    return norms


@torch.no_grad()
def step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """optimizer.step(), which changes no bit of parameters and moments unless `finite`.

    finite: a 0-d bool on their device.   Fused AdamW leaves its step out by itself, for nothing;
    of the others, parameters and momenta are copied first. Momenta that a step left out would have
    made are 0.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
        return
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    momenta = {p: buffer.clone() for p in params if (buffer := _momentum(optimizer, p)) is not None}
    before = copies(params)
    optimizer.step()
    put_back(params, before, unless=finite)
    made = {p: buffer for p in params if (buffer := _momentum(optimizer, p)) is not None}
    put_back(list(made.values()), [momenta.get(p, torch.zeros_like(p)) for p in made], unless=finite)


def _momentum(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    """The momentum of a parameter, if it has one."""
    return optimizer.state.get(parameter, {}).get("momentum_buffer")


@torch.no_grad()
def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the tensors as they are now."""
    return [tensor.clone() for tensor in tensors]


@torch.no_grad()
def put_back(tensors: Sequence[Tensor], before: Sequence[Tensor], *, unless: Tensor) -> None:
    """Make tensors in place what they were before, bit for bit, unless a 0-d bool is true."""
    for tensor, old in zip(tensors, before, strict=True):
        torch.where(unless, tensor, old, out=tensor)


def drop_last_layer_gradients(model: nn.Module) -> None:
    """Remove gradients of parameters with last_layer in their name: the optimizer skips them."""
    for name, parameter in model.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float, *, only_if: Tensor | None = None) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for all parameters, also frozen
    ones.

    only_if: a 0-d bool on their device; if false, the teacher stays as it is. The student must be
    finite then.   Buffers are left alone: the teacher's BatchNorm statistics come from its own
    forward passes.
    """
    means: list[Tensor] = list(teacher.parameters())
    values: list[Tensor] = list(student.parameters())
    assert len(means) == len(values), "the teacher is a copy of the student"
    if only_if is None:
        torch._foreach_lerp_(means, values, 1 - momentum)
    else:
        weight = only_if.to(means[0].dtype) * (1 - momentum)
        torch._foreach_lerp_(means, values, [weight] * len(means))
