"""Optimisers, clipping and the moving average against the published formulas, written out, and the public code's own figures."""
from __future__ import annotations

import copy
import math

import pytest
import torch
from golden.load import assert_close, load, meta, sub
from torch import Tensor, nn

from dino_simpool.config import OptimConfig
from dino_simpool.optim import (
    Lars,
    build_optimizer,
    clip_gradients,
    drop_last_layer_gradients,
    ema_update,
    parameter_groups,
    set_hyperparameters,
)

DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]


class Tiny(nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 4))
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 6)
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 9, bias=False))
        self.last_layer.parametrizations.weight.original0.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.fc(self.norm(self.conv(x)).mean((2, 3)) + self.pos_embed.mean(1)))


def dino_lars(p: Tensor, g: Tensor, mu: Tensor, *, lr: float, decay: float) -> None:
    """The published LARS for one parameter, as an oracle."""
    if p.ndim != 1:
        g = g + decay * p
        p_norm, g_norm = math.sqrt(float((p**2).sum())), math.sqrt(float((g**2).sum()))
        g = g * (1e-3 * p_norm / g_norm if p_norm > 0 and g_norm > 0 else 1.0)
    mu.copy_(0.9 * mu + g)
    p.sub_(lr * mu)


def test_groups_hold_each_trainable_parameter_once() -> None:
    decayed, plain = parameter_groups(Tiny())
    assert decayed["names"] == ["pos_embed", "conv.weight", "fc.weight", "last_layer.parametrizations.weight.original1"]
    assert plain["names"] == ["conv.bias", "norm.weight", "norm.bias", "fc.bias"]
    trainable = [id(p) for p in Tiny().parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(plain["params"]) == len(trainable)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lars_golden(dtype: torch.dtype) -> None:
    """Five steps through decays of 1e-6 to 0.1 and 0, a skipped gradient, zero and 0-d parameters: timm's Lars fails here."""
    data = load("open_lars")
    settings = meta(data, "lars")
    model = nn.Module()
    for name in settings["shapes"]:
        model.register_parameter(name, nn.Parameter(torch.tensor(data[f"lars/in/p_{name}"]).to(dtype)))
    optimizer = build_optimizer(OptimConfig(name="lars"), model)
    assert [sorted(g["names"]) for g in optimizer.param_groups][1] == sorted(settings["no_decay"])
    out = sub(data, "lars/out64" if dtype == torch.float64 else "lars/out")
    tolerance = (1e-6, 1e-8) if dtype == torch.float64 else (1e-5, 1e-6)
    for step in range(settings["steps"]):
        for name, p in model.named_parameters():
            skipped = name == settings["skip_param"] and step == settings["skip_step"]
            p.grad = None if skipped else torch.tensor(data[f"lars/in/g{step}_{name}"]).to(dtype)
        set_hyperparameters(optimizer, settings["lr"][step], settings["wd"][step])
        optimizer.step()
        for name, p in model.named_parameters():
            assert_close(p.detach(), out[f"p{step}_{name}"], *tolerance, f"{name} after step {step}")
    for name, p in model.named_parameters():
        assert_close(optimizer.state[p]["momentum_buffer"], out[f"mu_{name}"], *tolerance, f"momentum of {name}")


@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.04])
def test_lars_equals_the_formula(decay: float) -> None:
    torch.manual_seed(0)
    params = [torch.randn(s, dtype=torch.float64) for s in [(4, 3), (5,), (2, 3, 3, 3), ()]] + [torch.zeros(3, 2, dtype=torch.float64)]
    ours = [nn.Parameter(p.clone()) for p in params]
    momenta = [torch.zeros_like(p) for p in params]
    optimizer = Lars([{"params": ours, "weight_decay": decay}], 0.3)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = lr = 0.1 * step
        for p, q, mu in zip(ours, params, momenta, strict=True):
            q_grad = torch.randn_like(q)
            p.grad = q_grad.clone()
            dino_lars(q, q_grad, mu, lr=lr, decay=decay)
        optimizer.step()
    for p, q in zip(ours, params, strict=True):
        assert_close(p.detach(), q, 1e-12, 1e-14)


@pytest.mark.parametrize("name", ["adamw", "lars", "sgd"])
def test_each_optimizer_matches_plain_loops_and_resumes_bit_equal(name: str) -> None:
    """Ten steps against torch's single-tensor loops (LARS: the formula), the last layer frozen for three; then a resume."""
    torch.manual_seed(0)
    model = Tiny().double()
    twin = copy.deepcopy(model)
    cfg = OptimConfig(name=name)
    optimizer, other = build_optimizer(cfg, model), plain_optimizer(name, twin)
    momenta = {n: torch.zeros_like(p) for n, p in twin.named_parameters()}
    for step in range(10):
        if step == 5:
            model, optimizer = resumed(cfg, model, optimizer)
        lr, decay = 1e-2 * step, 0.04 + 0.01 * step
        set_hyperparameters(optimizer, lr, decay)
        set_hyperparameters(other, lr, decay)
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
        for net in (model, twin):
            net.zero_grad()
            net(x).square().sum().backward()
            if step < 3:
                drop_last_layer_gradients(net)
        optimizer.step()
        if name == "lars":
            decayed = set(other.param_groups[0]["names"])
            with torch.no_grad():
                for n, p in twin.named_parameters():
                    if p.grad is not None:
                        dino_lars(p, p.grad, momenta[n], lr=lr, decay=decay if n in decayed else 0.0)
        else:
            other.step()
        frozen = model.last_layer.parametrizations.weight.original1
        assert (frozen in optimizer.state) == (step >= 3)
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), 1e-9, 1e-11, n)


def plain_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(model)
    if name == "adamw":
        return torch.optim.AdamW(groups, foreach=False, fused=False)
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=False)


def resumed(cfg: OptimConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy through the state dicts; both take the same next step, bit for bit."""
    again = copy.deepcopy(model)
    optimizer_again = build_optimizer(cfg, again)
    optimizer_again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trial = copy.deepcopy((model, optimizer.state_dict()))
    first = build_optimizer(cfg, trial[0])
    first.load_state_dict(trial[1])
    second_model = copy.deepcopy(again)
    second = build_optimizer(cfg, second_model)
    second.load_state_dict(copy.deepcopy(optimizer_again.state_dict()))
    for net, opt in ((trial[0], first), (second_model, second)):
        for p in net.parameters():
            p.grad = torch.full_like(p, 0.01)
        opt.step()
    for p, q in zip(trial[0].parameters(), second_model.parameters(), strict=True):
        assert torch.equal(p, q)
    return again, optimizer_again
