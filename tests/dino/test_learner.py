"""One step of training: four iterations of the published code reproduced, and what must hold of any step."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from golden.load import GOLDEN_POSITIONS, assert_close, load, meta, sub
from timm.layers import DropPath
from torch import Tensor, nn

from dino_simpool import distributed
from dino_simpool.config import (
    CropsConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)
from dino_simpool.data.feed import Batch
from dino_simpool.dino import learner as learner_module
from dino_simpool.dino.learner import DinoLearner, build_dino, compile_blocks
from dino_simpool.dino.monitor import feature_spread
from dino_simpool.dino.plan import StepValues, make_plan
from dino_simpool.failures import UnequalGradients
from dino_simpool.models.encoder import Encoder
from dino_simpool.models.weights import from_official, load_strict, to_official
from dino_simpool.train import Means

CPU = torch.device("cpu")
VIT = ModelConfig(arch="vit_tiny", gamma=1.25, patch_size=8, width=16, depth=2, heads=2, image_size=32)
CNN = ModelConfig(arch="resnet18", gamma=2.0, width=8, depth=(1, 1), stem="small", image_size=16)
VALUES = StepValues(lr=0.01, weight_decay=0.04, momentum=0.99, teacher_temperature=0.05, freeze_last_layer=False)


def config(model: ModelConfig = VIT, *, optim: str = "adamw", **head: Any) -> TrainConfig:
    head = {"out_dim": 32, "hidden_dim": 24, "bottleneck_dim": 12} | head
    return TrainConfig(model=model, head=HeadConfig(**head), optim=OptimConfig(name=optim))


def learner_of(cfg: TrainConfig, dtype: torch.dtype = torch.float32) -> DinoLearner:
    """A learner on the CPU whose tensors are all of a dtype; converting in place keeps the optimiser's parameters."""
    learner = build_dino(cfg, 2 * cfg.run.batch_size, CPU)
    for module in (learner.student, learner.teacher, learner.loss):
        module.to(dtype)
    return learner


def views_of(batch: int, *, num_local: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [32, 32] + [16] * num_local
    return [torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def step(
    learner: DinoLearner, *batches: list[Tensor], values: StepValues = VALUES, clip: float = 0.0, precision: str = "fp32"
) -> dict[str, float]:
    """One step on some micro-batches; its metrics by name."""
    learner.accumulate, learner.clip, learner.precision = len(batches), clip, precision
    found = learner.step((Batch(views, torch.arange(len(views[0]))) for views in batches), values)
    assert tuple(found) == learner.metrics and all(value.dtype == torch.float64 for value in found.values())
    return {name: value.item() for name, value in found.items()}


def assert_equal_states(ours: Any, other: Any, where: str = "state") -> None:
    """Bit for bit, whatever is nested in them."""
    assert type(ours) is type(other), where
    if isinstance(ours, Tensor):
        assert ours.dtype == other.dtype and torch.equal(ours, other), where
    elif isinstance(ours, dict):
        assert list(ours) == list(other), where
        for key in ours:
            assert_equal_states(ours[key], other[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(other), where
        for number, pair in enumerate(zip(ours, other, strict=True)):
            assert_equal_states(*pair, f"{where}[{number}]")
    else:
        assert ours == other, where


# -- the published training


def golden_config(settings: dict[str, Any]) -> TrainConfig:
    """The run of a golden file: one step an epoch. The published schedule takes the scaled rate, we scale it by batch / 256."""
    backbone, batch = settings["backbone"], settings["B"]
    if backbone["family"] == "vit":
        sizes = {"arch": "vit_tiny", "width": backbone["embed_dim"], "depth": backbone["depth"], "heads": backbone["num_heads"]}
        quirks = {"patch_size": backbone["patch_size"], "beta": True, "pos_interp": GOLDEN_POSITIONS["simpool"]}
    else:
        sizes = {"arch": "resnet18", "width": backbone["base"], "depth": tuple(backbone["layers"])}
        quirks = {}
    return TrainConfig(
        model=ModelConfig(**sizes, **quirks, gamma=backbone["gamma"], min_over="batch", image_size=settings["img"]),
        head=HeadConfig(
            out_dim=settings["out_dim"],
            hidden_dim=settings["hidden"],
            bottleneck_dim=settings["bottleneck"],
            batch_norm=settings["use_bn"],
            norm_last_layer=settings["norm_last_layer"],
        ),
        teacher=TeacherConfig(
            momentum=settings["momentum_teacher"],
            warmup_temperature=settings["warmup_teacher_temp"],
            temperature=settings["teacher_temp"],
            warmup=settings["warmup_teacher_temp_epochs"],
        ),
        loss=LossConfig(),
        crops=CropsConfig(global_size=settings["img"], local_size=settings["loc"], num_local=settings["local"]),
        optim=OptimConfig(
            name=settings["optimizer"],
            lr=settings["lr"] * 256 / batch,
            min_lr=settings["min_lr"],
            warmup=settings["warmup_epochs"],
            weight_decay=settings["weight_decay"],
            weight_decay_end=settings["weight_decay_end"],
            clip=settings["clip_grad"],
            freeze_last_layer=settings["freeze_last_layer"],
        ),
        run=RunConfig(epochs=settings["epochs"], batch_size=batch),
    )


def copy_position_gradients(encoder: Encoder, embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Encoder._positions as the reference computed it on its CPU: at the native grid torch's bicubic interpolation by 4.1 / 4
    resamples, but its backward pass takes equal sizes for a copy (on CUDA its forward pass does so too)."""
    result = resampled_positions(encoder, embedding, grid)
    return embedding + (result - embedding).detach() if grid == encoder.trunk.patch_embed.grid_size else result


resampled_positions = Encoder._positions


def assert_golden_model(
    ours: dict[str, Tensor], reference: dict[str, np.ndarray], tolerance: tuple[float, float], name: str
) -> None:
    """All weights under their published names; two parameters get gradients of rounding noise only, which Adam blows up."""
    official = to_official(ours)
    assert sorted(official) == sorted(reference)
    for key, value in reference.items():
        mine = official[key].detach().numpy()
        if key == "backbone.simpool.beta":
            continue
        if key.endswith("qkv.bias"):  # the middle third is the key's
            width = len(value) // 3
            mine, value = np.delete(mine, slice(width, 2 * width)), np.delete(value, slice(width, 2 * width))
        assert_close(mine, value, *tolerance, f"{name} {key}")


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")])
@pytest.mark.parametrize("name", ["open_train_vit_adamw", "open_train_resnet_lars"])
def test_four_iterations_of_the_published_training(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedules, loss, entropy, KL divergence, center, student and teacher with their BatchNorm statistics."""
    data = load(name)
    settings, exact = meta(data, "train"), dtype == torch.float64
    adamw = settings["optimizer"] == "adamw"
    if adamw:
        monkeypatch.setattr(Encoder, "_positions", copy_position_gradients)
    cfg = golden_config(settings)
    plan = make_plan(cfg, settings["B"])
    learner = learner_of(cfg, dtype)
    start = from_official({key: torch.tensor(value) for key, value in sub(data, "train/param").items()})
    for model in (learner.student, learner.teacher):
        load_strict(model, start, source=name)
    out, images = sub(data, "train/out64" if exact else "train/out"), sub(data, "train/in")
    if exact:  # weights of the float64 run are stored as float32
        of_loss, of_weights = (1e-6, 1e-8), (1e-6, 1e-6) if adamw else (1e-5, 1e-5)
    else:
        of_loss, of_weights = ((1e-5, 1e-6), (1e-5, 2e-5)) if adamw else ((3e-5, 1e-5), (1e-4, 1e-4))
    for number in range(settings["steps"]):
        views = [torch.tensor(images[f"it{number}_crop{i}"]).to(dtype) for i in range(2 + settings["local"])]
        values = plan.values(number)
        metrics = step(learner, views, values=values, clip=cfg.optim.clip)
        scheduled = {"lr": values.lr, "wd": values.weight_decay, "momentum": values.momentum}
        for key, value in scheduled.items():
            if f"it{number}_{key}" in out:
                assert_close(value, out[f"it{number}_{key}"], 1e-12, 1e-12, f"{key} of step {number}")
        for key, ours in (("loss", metrics["loss"]), ("entropy", metrics["entropy"]), ("KL_div", metrics["kl"])):
            assert_close(ours, out[f"it{number}_{key}"], *of_loss, f"{key} of step {number}")
        assert_close(learner.loss.center, out[f"it{number}_center"], *of_loss, f"center after step {number}")
        if number in settings["save_steps"]:
            for part in ("student", "teacher"):
                reference = sub(out, f"it{number}_{part}")
                assert_golden_model(getattr(learner, part).state_dict(), reference, of_weights, f"{part} after step {number}")


# -- any step


@pytest.mark.parametrize("optim", ["adamw", "sgd", "lars"])
def test_two_halves_accumulated_are_one_batch(optim: str) -> None:
    """Loss, entropy, gradients, center, weights and teacher over two steps, without BatchNorm."""
    whole, halves = (learner_of(config(optim=optim), torch.float64) for _ in range(2))
    for number in range(2):
        views = views_of(6, dtype=torch.float64, seed=number)
        one = step(whole, views)
        two = step(halves, [v[:3] for v in views], [v[3:] for v in views])
        assert one == pytest.approx(two, rel=1e-10)
        for (name, p), q in zip(whole.student.named_parameters(), halves.student.parameters(), strict=True):
            if p.requires_grad:
                assert_close(q.grad, p.grad, 1e-7, 1e-12, f"gradient of {name}")
    assert_close(halves.loss.center, whole.loss.center, 1e-12, 1e-14)
    assert whole.loss.center.abs().max() > 1e-3
    for part in ("student", "teacher"):
        for (name, p), q in zip(getattr(whole, part).named_parameters(), getattr(halves, part).parameters(), strict=True):
            if not name.endswith("qkv.bias"):  # of its key's third the gradient is noise, which Adam blows up
                assert_close(q.detach(), p.detach(), 1e-6, 1e-9, f"{part} {name}")


def assert_left_out(learner: DinoLearner, before: dict[str, Any], metrics: dict[str, float]) -> None:
    """A bad step counts and is 0 in all metrics but two; weights, moments, center and statistics are those of before."""
    assert metrics == dict.fromkeys(("loss", "entropy", "kl", "grad_norm"), 0) | {"skipped_steps": 1, "bad_step": 1}
    assert_equal_states(learner.state(), before | {"step": before["step"] + 1})


@pytest.mark.parametrize("model", [VIT, CNN], ids=["vit", "cnn"])
@pytest.mark.parametrize("optim", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("broken", ["first", "second"])
def test_a_step_with_a_non_finite_loss_changes_nothing(broken: str, optim: str, model: ModelConfig) -> None:
    """Wherever in the step the number is, and the learner goes on as one that loaded the state of before."""
    cfg = config(model, optim=optim, batch_norm=model is CNN)
    learner, twin = learner_of(cfg), learner_of(cfg)
    step(learner, views_of(4))
    before = copy.deepcopy(learner.state())
    good, bad = views_of(2, seed=1), views_of(2, seed=2)
    bad[3][1, 0, 0, 0] = torch.nan  # one pixel of one local crop: no other view or image sees it
    metrics = step(learner, *((bad, good) if broken == "first" else (good, bad)))
    assert_left_out(learner, before, metrics)
    names, norms = learner.norms
    assert "head.fc1.weight" in names and len(names) == len(norms) and norms.isnan().all()
    twin.load(before)
    for each in (learner, twin):
        step(each, good, good)
    assert_equal_states(learner.state(), twin.state() | {"step": 3})


@pytest.mark.parametrize("optim", ["adamw", "sgd", "lars"])
def test_a_bad_first_step_leaves_moments_of_zero(optim: str) -> None:
    """Also one whose gradients alone are not finite, while the prototypes are frozen; then it goes on as from the start."""
    learner, twin = (learner_of(config(CNN, optim=optim, batch_norm=True)) for _ in range(2))
    before = copy.deepcopy(learner.state())
    hook = learner.student.head.fc1.weight.register_hook(lambda gradient: gradient / 0)
    metrics = step(learner, views_of(4), values=StepValues(**vars(VALUES) | {"freeze_last_layer": True}))
    hook.remove()
    after = learner.state()
    assert metrics["bad_step"] == 1
    assert all(not value.any() for moments in after["optimizer"]["state"].values() for value in moments.values())
    for part in ("student", "teacher", "loss"):
        assert_equal_states(after[part], before[part], part)
    for number in range(2):
        assert step(learner, views_of(4, seed=number)) == step(twin, views_of(4, seed=number))
    ours, other = learner.state(), twin.state() | {"step": 3}
    for state in (ours, other):  # the prototypes' moments came later
        state["optimizer"]["state"] = dict(sorted(state["optimizer"]["state"].items()))
    assert_equal_states(ours, other)


def test_a_step_with_an_infinite_loss_changes_nothing() -> None:
    """Whose gradients would be finite."""
    learner = learner_of(config())
    step(learner, views_of(2))
    before = copy.deepcopy(learner.state())
    fused = learner.loss.fused
    learner.loss.fused = lambda *args, **options: (terms := fused(*args, **options))._replace(loss=terms.loss + torch.inf)
    assert_left_out(learner, before, step(learner, views_of(2)))


def flip_a_bit(learner: DinoLearner, name: str, backward: int) -> None:
    """Flip a bit of one number in the gradient of a weight, in one backward pass from now on. (The sum of several passes may
    round the lowest bits away.)"""
    passes = iter(range(1, 1000))

    def flip(gradient: Tensor) -> Tensor:
        flipped = gradient.clone()
        if next(passes) == backward:
            flipped.view(torch.int32).view(-1)[3] ^= 2**21
        return flipped

    learner.student.get_parameter(name).register_hook(flip)


@pytest.mark.parametrize("model", [VIT, CNN], ids=["vit", "cnn"])
def test_verifying_changes_nothing_and_finds_a_flipped_bit(model: ModelConfig) -> None:
    """With stochastic depth, BatchNorm and two passes, in every second step; NaN is the same as NaN."""
    cfg = config(dataclasses.replace(model, drop_path=0.5), batch_norm=True)
    verified, plain = learner_of(cfg), learner_of(cfg)
    verified.verify_every = 2
    broken = views_of(3, seed=4)
    broken[0][0] = torch.nan
    for number in range(4):
        for each in (verified, plain):
            torch.manual_seed(number)
            step(each, views_of(3, seed=number), broken if number == 3 else views_of(3, seed=9))
        assert_equal_states(verified.state(), plain.state())
    flip_a_bit(verified, "head.fc2.weight", 4)  # step 5 has two, the second computation of step 6 begins with the fifth
    step(verified, views_of(3), views_of(3))
    before = copy.deepcopy(verified.state())
    message = r"step 6, computed twice .* differ \(process 0 on \S+, cpu: first in head\.fc2\.weight\)"
    with pytest.raises(UnequalGradients, match=message):
        step(verified, views_of(3), views_of(3))
    assert_equal_states(verified.state(), before)
    step(plain, views_of(3), views_of(3))
    assert verified.steps == plain.steps == 5


@pytest.mark.parametrize(("every", "device", "said"), [(3, "cuda", True), (0, "cuda", False), (3, "cpu", False)])
def test_a_device_that_cannot_repeat_a_step_is_said(every: int, device: str, said: bool) -> None:
    cfg = dataclasses.replace(config(), run=RunConfig(verify_every=every))
    warnings = learner_module._cannot_repeat(cfg, torch.device(device))
    assert bool(warnings) == said
    assert all(text.startswith("run.verify_every 3: on cuda some operations add up in another order") for text in warnings)


@pytest.mark.parametrize("model", [VIT, CNN], ids=["vit", "cnn"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_float32(model: ModelConfig, precision: str) -> None:
    """Products in half precision; parameters, center, loss and what is saved stay float32.

    Each step starts from the same state. Two trainings drift apart: with bf16 and this CNN by more
    than 5 % in three steps, for 21 of 40 seeds with torch 2.6 and 14 of 40 with 2.14. From the same
    state it is 7 % at most with bf16 and 0.7 % with fp16, of 30 seeds (0.8 % and 0.1 % in the median).
    """
    cfg = config(model, batch_norm=model is CNN)
    half, full = learner_of(cfg), learner_of(cfg)
    half.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=precision == "fp16")
    for number in range(3):
        views = views_of(4, seed=number)
        half.load(full.state())
        one, two = step(half, views, precision=precision, clip=3.0), step(full, views, clip=3.0)
        assert one["loss"] == pytest.approx(two["loss"], rel={"bf16": 0.1, "fp16": 0.02}[precision])
        assert np.isfinite(list(one.values())).all()
    changed = 0.0
    for (name, p), q in zip(half.student.named_parameters(), full.student.parameters(), strict=True):
        assert p.dtype == torch.float32 and p.isfinite().all(), name
        changed += float((p - q).detach().abs().sum())
    assert changed > 0  # or autocast did nothing
    assert half.loss.center.dtype == torch.float32


def test_float16_that_overflows_skips_the_step_and_lowers_the_scale() -> None:
    learner = learner_of(config())
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = copy.deepcopy(learner.student.state_dict())
    metrics = step(learner, views_of(4), precision="fp16")
    assert_equal_states(learner.student.state_dict(), before)
    assert learner.scaler.get_scale() == 2.0**59
    assert (metrics["grad_norm"], metrics["skipped_steps"], metrics["bad_step"]) == (0, 1, 0)
    broken = views_of(4)
    broken[0][0] = torch.nan
    metrics = step(learner, broken, precision="fp16")
    assert (metrics["skipped_steps"], metrics["bad_step"]) == (1, 1)  # a smaller scale would not help
    assert_equal_states(learner.student.state_dict(), before)


def test_the_mean_norm_is_over_the_steps_that_were_not_skipped() -> None:
    """Four steps, of which the first and the third overflow, against the norms of the other two; then none, then only one
    that overflows."""
    learner, twin = (build_dino(dataclasses.replace(config(), run=RunConfig(precision="fp16")), 256, CPU) for _ in range(2))
    norms = []
    means = Means(learner.metrics, CPU)

    def go(number: int, overflows: bool) -> None:
        for each in (learner, twin):
            each.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60 if overflows and each is learner else 1.0)
        found = learner.step([Batch(views_of(4, seed=number), torch.arange(4))], VALUES)
        means.add(found)
        if not overflows:
            norms.append(step(twin, views_of(4, seed=number), precision="fp16")["grad_norm"])

    for number, overflows in enumerate((True, False, True, False)):
        go(number, overflows)
        if overflows:  # the number of steps
            twin.load(copy.deepcopy(learner.state()))
    for span in range(2):
        _, found = means.take(span)
        fields = learner.watch(found)[0] if span == 0 else learner.epoch_fields(found, [VALUES] * 4)
        prefix = "train_" * span
        assert fields[f"{prefix}grad_norm"] == pytest.approx(sum(norms) / 2) and fields[f"{prefix}skipped_steps"] == 2
    go(4, False)
    fields, _ = learner.watch(means.take(0)[1])
    assert fields["grad_norm"] == pytest.approx(norms[-1]) and fields["skipped_steps"] == 0
    go(5, True)
    fields, _ = learner.watch(means.take(0)[1])
    assert math.isnan(fields["grad_norm"]) and fields["skipped_steps"] == 1


@pytest.mark.parametrize(("skipped", "elapsed", "said"), [(1, 1, False), (10, 11, False), (11, 12, True), (11, 200, False)])
def test_many_skipped_steps_are_said(skipped: int, elapsed: int, said: bool) -> None:
    """A few are how the scale of the loss finds its value."""
    learner = build_dino(dataclasses.replace(config(), run=RunConfig(precision="fp16")), 256, CPU)
    learner.features, learner.steps = torch.ones(2, 1, 12), elapsed
    means = {"loss": 2.0, "entropy": 1.5, "kl": 0.5, "grad_norm": 3.0, "skipped_steps": skipped / elapsed}
    warnings = learner.watch(means)[1]
    assert [text.split(",")[0] for text in warnings] == [f"{skipped} of {elapsed} steps were skipped"] * said


@pytest.mark.parametrize(
    ("model", "batch_norm", "found"),
    [
        (VIT, False, ""),
        (CNN, False, "with BatchNorm in the encoder is"),
        (CNN, True, "with BatchNorm in the encoder and BatchNorm in the head is"),
        (VIT, True, "with BatchNorm in the head is"),
        (dataclasses.replace(VIT, min_over="batch"), False, "with model.min_over batch is"),
        (dataclasses.replace(VIT, min_over="batch", gamma=None), False, ""),
        (ModelConfig("convnext_tiny", width=8, depth=(1, 1), stem="small", image_size=16), False, ""),
    ],
)
def test_accumulated_passes_that_are_not_the_batch_are_said(model: ModelConfig, batch_norm: bool, found: str) -> None:
    cfg = config(model, batch_norm=batch_norm)
    for accumulate in (1, 4):
        learner = build_dino(dataclasses.replace(cfg, run=RunConfig(accumulate=accumulate, batch_size=32)), 256, CPU)
        said = [text for text in learner.plan.warnings if "run.accumulate" in text]
        assert len(said) == (accumulate > 1 and bool(found))
        assert all(f"run.accumulate 4 {found}" in text and "its own 8 images" in text for text in said)


@pytest.mark.parametrize("model", [VIT, CNN], ids=["vit", "cnn"])
@pytest.mark.parametrize("num_local", [0, 2])
def test_a_batch_of_one(model: ModelConfig, num_local: int) -> None:
    """One image, with BatchNorm in the head and in the CNN; with and without local views."""
    learner = learner_of(config(model, batch_norm=True))
    before = copy.deepcopy(learner.student.state_dict())
    assert np.isfinite(list(step(learner, views_of(1, num_local=num_local)).values())).all()
    after = learner.student.state_dict()
    assert not any(torch.equal(after[name], before[name]) for name in after if name.endswith("weight"))


def test_stochastic_depth_is_the_students_only() -> None:
    """The same step from two random states: one teacher, two students; without it one student."""
    for drop_path, teacher_too in ((0.5, False), (0.0, False), (0.5, True)):
        cfg = TrainConfig(
            model=ModelConfig(**vars(VIT) | {"drop_path": drop_path}),
            head=HeadConfig(out_dim=32, hidden_dim=24, bottleneck_dim=12),
            teacher=TeacherConfig(drop_path=0.5 if teacher_too else 0.0),
        )
        features, gradients = [], []
        for seed in (1, 2):
            learner = learner_of(cfg)
            assert learner.teacher.training and learner.student.training
            torch.manual_seed(seed)
            step(learner, views_of(8))
            features.append(learner.features)
            gradients.append(learner.student.head.fc1.weight.grad)
        assert torch.equal(*features) == (not teacher_too)
        assert torch.equal(*gradients) == (drop_path == 0)


@pytest.mark.parametrize("optim", ["adamw", "sgd", "lars"])
def test_frozen_prototypes_have_no_optimiser_state(optim: str) -> None:
    """No moments and no decay while frozen; Adam's bias correction starts when they are freed."""
    learner = learner_of(config(optim=optim, norm_last_layer=False))
    scale, directions = (getattr(learner.student.head.last_layer.parametrizations.weight, f"original{i}") for i in (0, 1))
    before = scale.clone(), directions.clone()
    frozen = StepValues(**vars(VALUES) | {"freeze_last_layer": True})
    for number in range(2):
        step(learner, views_of(3, seed=number), values=frozen)
    assert torch.equal(scale, before[0]) and torch.equal(directions, before[1])
    assert scale not in learner.optimizer.state and directions not in learner.optimizer.state
    assert len(learner.optimizer.state) == sum(p.requires_grad for p in learner.student.parameters()) - 2
    step(learner, views_of(3, seed=2))
    assert not torch.equal(scale, before[0]) and not torch.equal(directions, before[1])
    if optim == "adamw":
        assert learner.optimizer.state[directions]["step"] == 1
        assert learner.optimizer.state[learner.student.head.fc1.weight]["step"] == 3


def test_norm_last_layer_keeps_prototypes_at_unit_norm() -> None:
    learner = learner_of(config(norm_last_layer=True))
    before = learner.student.head.last_layer.weight.detach().clone()
    step(learner, views_of(3))
    after = learner.student.head.last_layer.weight.detach()
    assert not torch.equal(before, after)
    assert_close(after.norm(dim=1), torch.ones(32), 1e-6, 1e-6)


def test_the_teacher_follows_the_student_after_its_step() -> None:
    """Parameters by the moving average, BatchNorm statistics by its own forward passes; never by gradient."""
    learner = learner_of(config(CNN, batch_norm=True), torch.float64)
    old = {name: p.clone() for name, p in learner.teacher.named_parameters()}
    step(learner, views_of(4, dtype=torch.float64))
    student = dict(learner.student.named_parameters())
    for name, p in learner.teacher.named_parameters():
        assert not p.requires_grad
        assert_close(p, 0.99 * old[name] + 0.01 * student[name].detach(), 1e-12, 1e-14, name)
    mean = "encoder.trunk.bn1.running_mean"
    buffers = dict(learner.teacher.named_buffers()), dict(learner.student.named_buffers())
    assert not torch.equal(buffers[0][mean], buffers[1][mean])
    # The student's trunk runs once for each size of view, the teacher's once; each head once.
    assert [int(b["encoder.trunk.bn1.num_batches_tracked"]) for b in buffers] == [1, 2]
    assert [int(b["head.bn1.num_batches_tracked"]) for b in buffers] == [1, 1]


def test_the_first_step_of_a_schedule_changes_no_weight() -> None:
    """A rate of 0, as the published warm-up begins; the center and the sums move all the same."""
    learner = learner_of(config())
    before = copy.deepcopy(learner.student.state_dict())
    metrics = step(learner, views_of(4), values=StepValues(**vars(VALUES) | {"lr": 0.0}))
    assert_equal_states(learner.student.state_dict(), before)
    assert_equal_states(learner.teacher.state_dict(), before)
    assert learner.loss.center.abs().max() > 0
    assert metrics["loss"] > 0 and metrics["grad_norm"] > 0


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_each_gradient_is_clipped_by_its_own_norm(clip: float) -> None:
    """The logged norm is that of all gradients before the clipping."""
    free, clipped = learner_of(config(optim="sgd"), torch.float64), learner_of(config(optim="sgd"), torch.float64)
    views = views_of(4, dtype=torch.float64)
    norm, same = step(free, views)["grad_norm"], step(clipped, views, clip=clip)["grad_norm"]
    gradients = [p.grad for p in free.student.parameters() if p.grad is not None]
    assert norm == same == pytest.approx(sum(float((g**2).sum()) for g in gradients) ** 0.5)
    ours = [p.grad for p in clipped.student.parameters() if p.grad is not None]
    for g, c in zip(gradients, ours, strict=True):
        assert_close(c, g * min(1, clip / (float(g.norm()) + 1e-6)) if clip else g, 1e-9, 1e-14)


def test_a_loss_scale_does_not_reach_the_clipping() -> None:
    """Scaled by 2**16, which is exact: the same norm, clipped gradients and weights to the last bit as without a scale."""
    plain, scaled = learner_of(config(optim="sgd")), learner_of(config(optim="sgd"))
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=True)
    views = views_of(4)
    metrics = [step(learner, views, clip=0.01) for learner in (plain, scaled)]
    assert metrics[0] == metrics[1]
    ours, theirs = ({n: p.grad for n, p in x.student.named_parameters() if p.grad is not None} for x in (scaled, plain))
    assert_equal_states(ours, theirs)
    clipped = [g.norm() > 0.0099 for g in theirs.values()]
    assert any(clipped) and not all(clipped)
    assert_equal_states(scaled.student.state_dict(), plain.student.state_dict())


def test_the_teachers_unit_features_are_kept() -> None:
    learner = learner_of(config())
    step(learner, views_of(3))
    assert learner.features is not None and learner.features.shape == (2, 3, 12)
    assert_close(learner.features.norm(dim=-1), torch.ones(2, 3), 1e-5, 1e-5)


@pytest.mark.parametrize("optim", ["adamw", "sgd", "lars"])
def test_a_state_goes_on_bit_equal(optim: str) -> None:
    """Through a file of tensors and plain values, taken while the prototypes were frozen."""
    learner = learner_of(config(CNN, optim=optim, batch_norm=True))
    step(learner, views_of(4), values=StepValues(**vars(VALUES) | {"freeze_last_layer": True}))
    twin = learner_of(config(CNN, optim=optim, batch_norm=True))
    twin.load(copy.deepcopy(learner.state()))
    for number in range(2):
        for each in (learner, twin):
            step(each, views_of(4, seed=number))
    assert_equal_states(learner.state(), twin.state())
    assert twin.steps == 3


def test_a_float32_state_goes_on_in_float16() -> None:
    """And back: a run without a loss scale has none to hand over."""
    plain, scaled = learner_of(config()), learner_of(config())
    scaled.scaler = torch.amp.GradScaler("cpu")
    scaled.load(plain.state())
    step(scaled, views_of(2), precision="fp16")
    plain.load(scaled.state())
    step(plain, views_of(2))
    assert plain.steps == 2


def test_a_state_of_another_model_is_refused() -> None:
    learner = learner_of(config())
    state = learner.state()
    with pytest.raises(ValueError, match=r"weights of the student do not fit.*missing"):
        learner_of(config(CNN)).load(state)
    del state["teacher"]["encoder.pool.q.weight"]
    with pytest.raises(ValueError, match=r"weights of the teacher do not fit.*1 missing: encoder\.pool\.q\.weight"):
        learner.load(state)


def test_the_seed_decides_the_start() -> None:
    first, same, other = (
        build_dino(TrainConfig(**vars(config()) | {"run": RunConfig(seed=s)}), 256, CPU).state() for s in (1, 1, 2)
    )
    assert_equal_states(first, same)
    assert not torch.equal(first["student"]["head.fc1.weight"], other["student"]["head.fc1.weight"])


def test_compile_says_when_it_does_not_know_the_blocks() -> None:
    learner = learner_of(config())
    learner.student.encoder.trunk.blocks = torch.nn.Sequential()
    with pytest.raises(ValueError, match=r"run\.compile does not know the blocks of vit_tiny"):
        compile_blocks(learner.student)


def test_options_reach_loss_teacher_monitor_and_step() -> None:
    """Each with a value that is not the default."""
    cfg = dataclasses.replace(
        config(dataclasses.replace(VIT, drop_path=0.2)),
        loss=LossConfig(student_temperature=0.2, center_momentum=0.7),
        teacher=TeacherConfig(drop_path=0.1),
        optim=OptimConfig(clip=0.3, warmup="3it"),
        run=RunConfig(epochs=5, batch_size=4, accumulate=2),
    )
    learner = build_dino(cfg, 8, torch.device("cpu"))
    assert (learner.loss.student_temp, learner.loss.center_momentum) == (0.2, 0.7)
    assert max(m.drop_prob for m in learner.teacher.modules() if isinstance(m, DropPath)) == pytest.approx(0.1)
    assert (learner.monitor.warmup_steps, learner.clip, learner.accumulate) == (3, 0.3, 2)


def test_a_log_line_is_over_all_processes_and_in_units_of_ln_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread and rank are means over processes, of 8 features or more; the center is measured by its norm."""
    learner = learner_of(config(VIT))
    learner.loss.center.fill_(2.0)
    out_dim = learner.loss.center.shape[1]
    means = {"loss": 2.0, "entropy": 1.5, "kl": 0.5, "grad_norm": 3.0, "skipped_steps": 0.0}
    monkeypatch.setattr(distributed, "all_mean", lambda tensor: tensor + 1)  # as if others had other features
    for rows, said in ((4, True), (3, False)):
        learner.features = nn.functional.normalize(torch.eye(8)[: 2 * rows], dim=-1).view(2, rows, 8)
        fields, _ = learner.watch(means)
        spread, rank = fields.pop("feature_spread"), fields.pop("effective_rank")
        assert rank == pytest.approx(9 if said else math.nan, nan_ok=True)
        assert spread == pytest.approx(1 + float(feature_spread(torch.eye(8))) if said else math.nan, nan_ok=True)
        assert fields == pytest.approx({
            "loss": 2.0, "loss_over_lnK": 2.0 / math.log(out_dim), "entropy_over_lnK": 1.5 / math.log(out_dim),
            "kl": 0.5, "grad_norm": 3.0, "center_norm": 2.0 * math.sqrt(out_dim),
        })  # fmt: skip


@pytest.mark.parametrize(("precision", "scaled"), [("fp32", False), ("bf16", False), ("fp16", True)])
def test_the_loss_is_scaled_in_float16_only(precision: str, scaled: bool) -> None:
    learner = build_dino(dataclasses.replace(config(), run=RunConfig(precision=precision)), 256, CPU)
    assert (learner.precision, learner.scaler.is_enabled()) == (precision, scaled)
