"""Optimisers, clipping and the moving average against the published formulas, written out, and the public code's figures."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from golden.load import assert_close, load, meta, sub
from torch import Tensor, nn

from dino_simpool.config import OptimConfig
from dino_simpool.dino.optim import (
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
    params = [torch.randn(shape, dtype=torch.float64) for shape in [(4, 3), (5,), (2, 3, 3, 3), ()]]
    params.append(torch.zeros(3, 2, dtype=torch.float64))
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


def hyperparameters(step: int) -> tuple[float, float]:
    """Learning rate and weight decay."""
    return 1e-2 * step, 0.04 + 0.01 * step


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int) -> None:
    """A step on a fixed input, the last layer frozen for the first three."""
    dtype = model.pos_embed.dtype
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(step), dtype=dtype)
    model.zero_grad()
    model(x).square().sum().backward()
    if step < 3:
        drop_last_layer_gradients(model)
    set_hyperparameters(optimizer, *hyperparameters(step))
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "lars", "sgd"])
def test_optimizers_equal_plain_loops(name: str) -> None:
    """Eight steps against torch's loop over single tensors (LARS: against the formula), the last layer frozen for three.

    Both get the same gradients. That of a bias before BatchNorm is rounding noise, which Adam scales up to whole steps, so two
    backward passes on weights that differ in the last bit would part further than the optimisers do.
    """
    torch.manual_seed(0)
    model = Tiny().double()
    twin = copy.deepcopy(model)
    optimizer = build_optimizer(OptimConfig(name=name), model)
    groups = parameter_groups(twin)
    plain = {
        "adamw": lambda: torch.optim.AdamW(groups, foreach=False, fused=False),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=False),
        "lars": lambda: LarsByFormula(groups, {}),
    }[name]()
    for step in range(8):
        one_step(model, optimizer, step=step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        set_hyperparameters(plain, *hyperparameters(step))
        plain.step()
        assert (model.last_layer.parametrizations.weight.original1 in optimizer.state) == (step >= 3)
    for (parameter_name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), 1e-12, 1e-14, parameter_name)


class LarsByFormula(torch.optim.Optimizer):
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mu = self.state[p].setdefault("mu", torch.zeros_like(p))
                    dino_lars(p.data, p.grad, mu, lr=group["lr"], decay=group["weight_decay"])


@pytest.mark.parametrize("name", ["adamw", "lars", "sgd"])
def test_resuming_is_bit_equal(name: str) -> None:
    """Stopped while the last layer is frozen, and after; fused and foreach kernels give the same bits each time."""
    torch.manual_seed(0)
    start = Tiny()
    straight = copy.deepcopy(start)
    optimizer = build_optimizer(OptimConfig(name=name), straight)
    broken = copy.deepcopy(start)
    state = build_optimizer(OptimConfig(name=name), broken).state_dict()
    for step in range(7):
        one_step(straight, optimizer, step=step)
        broken = copy.deepcopy(broken)
        resumed = build_optimizer(OptimConfig(name=name), broken)
        resumed.load_state_dict(copy.deepcopy(state))
        one_step(broken, resumed, step=step)
        state = resumed.state_dict()
    for p, q in zip(straight.parameters(), broken.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_the_momentum_is_the_one_of_the_options(name: str) -> None:
    """Two steps by hand at momentum 0.5: 3 - 0.1 * 2 = 2.8, then 2.8 - 0.1 * (0.5 * 2 + 1) = 2.6; LARS is SGD for vectors."""
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor([3.0]))
    optimizer = build_optimizer(OptimConfig(name=name, momentum=0.5), model)
    set_hyperparameters(optimizer, 0.1, 0.04)
    for gradient, expected in ((2.0, 2.8), (1.0, 2.6)):
        model.scale.grad = torch.tensor([gradient])
        optimizer.step()
        assert model.scale.item() == pytest.approx(expected, rel=1e-6)


def test_set_hyperparameters_decays_the_first_group_only() -> None:
    optimizer = build_optimizer(OptimConfig(), Tiny())
    set_hyperparameters(optimizer, 0.25, 0.5)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.25, 0.5), (0.25, 0.0)]


def golden_gradients(data: dict, dtype: torch.dtype) -> nn.Module:
    model = nn.Module()
    for name in data["clip/out/cancel_names"]:
        gradient = torch.tensor(data[f"clip/in/{name}"]).to(dtype)
        model.register_parameter(str(name), nn.Parameter(torch.zeros_like(gradient)))
        getattr(model, str(name)).grad = gradient
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_golden(dtype: torch.dtype) -> None:
    data = load("open_clip_ema")
    for i, max_norm in enumerate(meta(data, "clip")["clips"]):
        model = golden_gradients(data, dtype)
        norms = clip_gradients(model.parameters(), max_norm)
        assert_close(norms, data[f"clip/out/norms_{i}"], 1e-6, 1e-7)
        for name, p in model.named_parameters():
            assert_close(p.grad, data[f"clip/out/clipped{i}_{name}"], 1e-5, 1e-7, name)


def test_clip_scales_each_gradient_by_its_own_norm() -> None:
    long, short, none = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    long.grad, short.grad = torch.tensor([30.0, 40.0]), torch.tensor([0.0, 0.5])
    assert clip_gradients([long, none, short], 0).tolist() == [50.0, 0.5]
    assert long.grad.tolist() == [30.0, 40.0], "max_norm 0 must not clip"
    clip_gradients([long, none, short], 1.0)
    assert_close(long.grad, [0.6, 0.8], 1e-6)
    assert short.grad.tolist() == [0.0, 0.5]
    assert clip_gradients([none], 1.0).shape == (0,)


def test_cancelled_gradients_golden() -> None:
    """Rows: epochs of freezing, epoch, and for each parameter whether it keeps its gradient."""
    data = load("open_clip_ema")
    for freeze, epoch, *kept in data["clip/out/cancel_rows"]:
        model = golden_gradients(data, torch.float32)
        if epoch < freeze:
            drop_last_layer_gradients(model)
        assert [p.grad is not None for p in model.parameters()] == [bool(k) for k in kept]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ema_golden(dtype: torch.dtype) -> None:
    data = load("open_clip_ema")
    teacher, student = nn.Linear(7, 5, bias=False).to(dtype), nn.Linear(7, 5, bias=False).to(dtype)
    teacher.weight.data = torch.tensor(data["ema/in/teacher"]).to(dtype)
    out = sub(data, "ema/out64" if dtype == torch.float64 else "ema/out")
    for step, momentum in enumerate(meta(data, "ema")["momentum"]):
        student.weight.data = torch.tensor(data[f"ema/in/student{step}"]).to(dtype)
        ema_update(teacher, student, momentum)
        tolerance = (1e-6, 1e-8) if dtype == torch.float64 else (1e-5, 1e-7)
        assert_close(teacher.weight.detach(), out[f"teacher{step}"], *tolerance)


def test_ema_covers_frozen_parameters_and_no_buffer() -> None:
    student = Tiny()
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for p in student.parameters():
            p += 1
    student.norm.running_mean += 1
    ema_update(teacher, student, 0.75)
    for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
        assert_close(p.detach(), q.detach() - 0.75, 1e-6, 1e-6)
    assert not teacher.norm.running_mean.any()


def test_groups_and_moments_are_plain_values() -> None:
    """A checkpoint holds nothing but tensors, numbers, text, lists and dicts."""
    model = Tiny()
    optimizer = build_optimizer(OptimConfig(), model)
    one_step(model, optimizer, step=4)

    def check(value: object) -> None:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                check(item)
        else:
            assert value is None or isinstance(value, Tensor | str | int | float | bool | tuple), type(value)

    check(optimizer.state_dict())
