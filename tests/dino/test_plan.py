"""Schedules against the public code's, durations, and what the plan says about short runs and small data."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from golden.load import assert_close, cases, load, meta

from dino_simpool.config import HeadConfig, ModelConfig, OptimConfig, RunConfig, TeacherConfig, TrainConfig
from dino_simpool.dino.plan import (
    USUAL_RATES,
    cosine_schedule,
    duration_steps,
    jump,
    make_plan,
    small_images,
    teacher_temperature,
)

IMAGENET = 1281167


def make_config(*, batch: int = 256, epochs: int | float | str = 100, **changes: object) -> TrainConfig:
    """A recipe with some options changed: optim_lr=.. sets optim.lr."""
    cfg = TrainConfig(run=RunConfig(batch_size=batch, epochs=epochs))
    for key, value in changes.items():
        section, _, name = key.partition("_")
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})})
    return cfg


@pytest.mark.parametrize("case", cases(load("open_schedules")))
def test_schedule_golden(case: str) -> None:
    data = load("open_schedules")
    settings = meta(data, case)
    per_epoch = settings["niter_per_ep"]
    total = settings["epochs"] * per_epoch
    ours = [
        cosine_schedule(
            step,
            total,
            settings["base_value"],
            settings["final_value"],
            warmup_steps=settings.get("warmup_epochs", 0) * per_epoch,
            warmup_start=settings.get("start_warmup_value", 0.0),
        )
        for step in range(total)
    ]
    assert_close(ours, data[f"{case}/out/schedule"], 1e-12, 1e-18)


def test_schedule_corners() -> None:
    values = [cosine_schedule(step, 10, 1.0, 0.1, warmup_steps=4) for step in range(10)]
    assert values[:5] == [0.0, 1 / 3, 2 / 3, 1.0, 1.0], "the warm-up includes both ends, so the peak occurs twice"
    assert 0.1 < values[-1] < 0.2, "the end is approached, not reached"
    assert cosine_schedule(0, 10, 1.0, 0.1, warmup_steps=1) == 0.0, "a warm-up of one step is its start"
    assert cosine_schedule(0, 10, 1.0, 0.1) == 1.0
    assert cosine_schedule(0, 1, 1.0, 0.1) == 1.0


@pytest.mark.parametrize("case", cases(load("open_dino_loss")))
def test_teacher_temperature_golden(case: str) -> None:
    data = load("open_dino_loss")
    s = meta(data, case)
    ours = [
        teacher_temperature(epoch, s["warmup_teacher_temp_epochs"], s["warmup_teacher_temp"], s["teacher_temp"])
        for epoch in range(s["nepochs"])
    ]
    assert_close(ours, data[f"{case}/out/teacher_temp_schedule"], 1e-12)


@pytest.mark.parametrize("warmup_epochs", [0, 1, 2, 30])
def test_teacher_temperature_is_a_linspace(warmup_epochs: int) -> None:
    expected = [*np.linspace(0.04, 0.07, warmup_epochs), *[0.07] * 5]
    assert_close([teacher_temperature(e, warmup_epochs, 0.04, 0.07) for e in range(warmup_epochs + 5)], expected, 1e-12)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [(10, 70), (0.5, 4), ("10", 70), ("10ep", 70), ("0.5ep", 4), ("5000it", 5000), ("1e3img", 31), ("1e6img", 31250),
     ("5%", 10), ("100%", 200), (0, 0), ("0it", 0)],
)  # fmt: skip
def test_durations(duration: int | float | str, steps: int) -> None:
    assert duration_steps(duration, steps_per_epoch=7, total_steps=200, batch_size=32, name="optim.warmup") == steps


def test_duration_errors() -> None:
    with pytest.raises(ValueError, match=r"run\.epochs.*5%"):
        duration_steps("5%", steps_per_epoch=7, total_steps=None, batch_size=32, name="run.epochs")
    with pytest.raises(ValueError, match="soon"):
        duration_steps("soon", steps_per_epoch=7, total_steps=9, batch_size=32, name="optim.warmup")


def test_published_vit_run() -> None:
    """README of SimPool, ViT-S: batch 800, learning rate 5e-4 per 256, against the formulas of the public code."""
    plan = make_plan(make_config(batch=800), IMAGENET)
    per_epoch = IMAGENET // 800
    total = 100 * per_epoch
    assert (plan.steps_per_epoch, plan.total_steps, plan.epochs) == (per_epoch, total, 100)
    assert (plan.warmup_steps, plan.teacher_warmup_steps, plan.freeze_steps) == (10 * per_epoch, 30 * per_epoch, per_epoch)
    assert plan.warnings == plan.suggestions == ()
    first, peak, after = (plan.values(step) for step in (0, 10 * per_epoch - 1, 10 * per_epoch + 5000))
    assert (first.lr, first.momentum, first.teacher_temperature) == (0, 0.996, 0.04)
    assert first.weight_decay == pytest.approx(0.04, rel=1e-12)
    assert peak.lr == 5e-4 * 800 / 256 == 1.5625e-3
    progress = 5000 / (total - 10 * per_epoch)
    assert_close(after.lr, 1e-5 + 0.5 * (1.5625e-3 - 1e-5) * (1 + math.cos(math.pi * progress)), 1e-12)
    assert plan.values(per_epoch - 1).freeze_last_layer and not plan.values(per_epoch).freeze_last_layer
    for epoch in (0, 1, 17, 29, 30, 99):
        of_epoch = [plan.values(step).teacher_temperature for step in (epoch * per_epoch, (epoch + 1) * per_epoch - 1)]
        assert of_epoch[0] == of_epoch[1] == (0.04 + epoch * (0.07 - 0.04) / 29 if epoch < 30 else 0.07)  # to the last bit
        assert of_epoch[0] == pytest.approx([*np.linspace(0.04, 0.07, 30), *[0.07] * 70][epoch])
    last = plan.values(total - 1)
    assert 1e-5 < last.lr < 1.001e-5 and 0.3999 < last.weight_decay < 0.4 and 0.999999 < last.momentum < 1


@pytest.mark.parametrize(
    ("batch", "images", "changes"),
    [
        pytest.param(800, IMAGENET, {}, id="ViT-S"),
        pytest.param(1280, IMAGENET, {"optim_name": "lars", "optim_lr": 0.3, "head_out_dim": 60000}, id="R-50"),
        pytest.param(480, IMAGENET, {"optim_lr": 1e-3, "teacher_warmup": 50, "optim_freeze_last_layer": 3}, id="ConvNeXt-S"),
        pytest.param(800, 260 * 1000, {}, id="ImageNet-20 %"),
    ],
)
@pytest.mark.parametrize("epochs", [100, 300])
def test_no_advice_for_published_runs(batch: int, images: int, changes: dict, epochs: int) -> None:
    plan = make_plan(make_config(batch=batch, epochs=epochs, **changes), images)
    assert plan.warnings == plan.suggestions == ()


@pytest.mark.parametrize(
    ("epochs", "total", "num_epochs"),
    [(1, 31, 1), (0.1, 3, 1), (2.5, 78, 3), ("5it", 5, 1), ("32it", 32, 2), ("3200img", 100, 4), ("1img", 1, 1)],
)
def test_any_length_runs(epochs: int | float | str, total: int, num_epochs: int) -> None:
    """Shorter than the warm-ups: these are scaled, said so, and every value is in its range."""
    plan = make_plan(make_config(batch=32, epochs=epochs), 1000)
    assert (plan.total_steps, plan.epochs) == (total, num_epochs)
    assert plan.warmup_steps == round(0.1 * total)
    assert len(plan.warnings) >= 2 and "optim.warmup" in plan.warnings[0] and "teacher.warmup" in plan.warnings[1]
    for step in range(total):
        values = plan.values(step)
        assert 0 <= values.lr <= plan.peak_lr and 0.0399 < values.weight_decay < 0.4 and 0.996 <= values.momentum < 1
        assert 0.04 <= values.teacher_temperature <= 0.07
    assert plan.table().count("\n") >= 2


@pytest.mark.parametrize(
    ("warmup", "epochs"),
    [
        (1, 1),
        ("10it", 1),
        ("14it", 1),
        ("15it", 2),
        (1.5, 2),
        ("16it", 2),
        ("25it", 2),
        ("26it", 3),
        (1.7, 2),
        ("10%", 1),
        (4, 4),
    ],
)
def test_teacher_warmup_is_rounded_to_whole_epochs(warmup: float | str, epochs: int) -> None:
    """To the nearest, halves to the even one, at ten steps an epoch; constant within an epoch, as published."""
    plan = make_plan(make_config(batch=100, epochs=10, teacher_warmup=warmup), 1000)
    assert (plan.steps_per_epoch, plan.total_steps, plan.teacher_warmup_steps) == (10, 100, 10 * epochs)
    expected = np.repeat([*np.linspace(0.04, 0.07, epochs), *[0.07] * (10 - epochs)], 10)
    assert_close([plan.values(step).teacher_temperature for step in range(100)], expected, 1e-12)
    assert epochs == 1 or f"{'temperature reached':20}{10 * epochs - 10:>9}" in plan.table()


@pytest.mark.parametrize(
    ("warmup", "steps"), [(0, 0), ("1it", 1), ("2it", 2), ("4it", 4), (0.5, 5), ("9it", 9), ("900img", 9), ("3%", 3)]
)
def test_a_teacher_warmup_shorter_than_an_epoch_goes_by_steps(warmup: float | str, steps: int) -> None:
    """At ten steps an epoch: as many values from start to end as the warm-up has steps."""
    plan = make_plan(make_config(batch=100, epochs=10, teacher_warmup=warmup), 1000)
    assert plan.teacher_warmup_steps == steps
    expected = [*np.linspace(0.04, 0.07, steps), *[0.07] * (100 - steps)]
    assert_close([plan.values(step).teacher_temperature for step in range(100)], expected, 1e-12)


@pytest.mark.parametrize(
    ("epochs", "said", "expected"),
    [
        (1, "scaled to 3 steps, 30% of the run as published; give", [0.04, 0.055, *[0.07] * 8]),
        ("26it", "scaled to 8 steps, 30% of the run as published; give", [*np.linspace(0.04, 0.07, 8), *[0.07] * 18]),
        (0.1, "scaled to 0 steps", [0.07]),
        (
            "50it",
            "scaled to 20 steps, 30% of the run as published and rounded to whole epochs; give",
            [0.04] * 10 + [0.07] * 40,
        ),
    ],
)
def test_a_scaled_teacher_warmup_is_what_the_message_says(epochs: float | str, said: str, expected: list[float]) -> None:
    """Ten steps an epoch, a warm-up of 30 epochs."""
    plan = make_plan(make_config(batch=100, epochs=epochs), 1000)
    assert f"teacher.warmup (30: 300 steps) is longer than the run ({len(expected)} steps): {said}" in plan.warnings[1]
    assert_close([plan.values(step).teacher_temperature for step in range(plan.total_steps)], expected, 1e-12)


def test_a_warmup_as_long_as_the_run_is_kept() -> None:
    plan = make_plan(make_config(batch=100, epochs=10, optim_warmup=10, teacher_warmup=10), 1000)
    assert plan.warmup_steps == plan.total_steps == 100
    assert not any("warmup" in text for text in plan.warnings)
    assert plan.values(99).lr == plan.peak_lr
    assert plan.values(99).teacher_temperature == pytest.approx(0.07)


def test_one_batch_is_enough_data_and_less_is_not() -> None:
    assert make_plan(make_config(batch=10), 10).steps_per_epoch == 1
    with pytest.raises(ValueError, match=r"batch_size is 11.* 10 images.*10 or less"):
        make_plan(make_config(batch=11), 10)
    with pytest.raises(ValueError, match="no images"):
        make_plan(make_config(), 0)


def test_warnings_name_the_option() -> None:
    rising = make_plan(make_config(batch=4, epochs=1000), 1000)
    assert any("optim.min_lr" in text for text in rising.warnings)
    for freeze, accident in ((1, True), ("5it", False), ("100%", False)):
        plan = make_plan(make_config(epochs=1, optim_warmup="10%", teacher_warmup=0, optim_freeze_last_layer=freeze), 5000)
        assert any("freeze_last_layer" in text for text in plan.warnings) == accident


def suggested(cfg: TrainConfig, images: int) -> dict[str, float]:
    """Option -> advised value, from `try OPTION VALUE`; each suggestion names the present value too."""
    found = {}
    for text in make_plan(cfg, images).suggestions:
        option, value = text.partition(": try ")[2].split()[:2]
        section, name = option.split(".")
        present = getattr(getattr(cfg, section), name)
        assert f"{option} {present:g}" in text if isinstance(present, float) else f"{option} {present}" in text
        found[option] = float(value.removesuffix("%"))
    return found


def test_the_rate_of_batches_from_128_on_is_the_users() -> None:
    """With a rate that is low for any batch, advice is given below 128 images only."""
    for batch, advised in ((127, True), (128, False)):
        assert ("optim.lr" in suggested(make_config(batch=batch, optim_lr=2e-4), IMAGENET)) == advised


def test_advice_for_small_data() -> None:
    assert suggested(make_config(), 50000) == {"head.out_dim": 2048}
    assert suggested(make_config(batch=128, head_out_dim=2048), 1000)["head.out_dim"] == 256
    assert "head.out_dim" not in suggested(make_config(head_out_dim=256), 1000)


def test_advice_for_a_small_batch() -> None:
    """The teacher's half-life in images of the published run: 0.996 at 1024 images is 0.999 at 256."""
    assert suggested(make_config(batch=256), IMAGENET) == {"teacher.momentum": 0.999}
    advice = suggested(make_config(batch=32), IMAGENET)
    half_life = math.log(0.5) / math.log(advice["teacher.momentum"]) * 32
    assert 0.9 < half_life / (math.log(0.5) / math.log(0.996) * 1024) < 1.1
    assert advice["optim.lr"] * 32 / 256 == pytest.approx(5e-4 * math.sqrt(32 / 256), rel=0.05)
    assert list(advice) == ["teacher.momentum", "optim.lr"]
    assert "teacher.momentum" not in suggested(make_config(batch=32), 50000), "the same share of smaller data is enough"


def test_advice_that_is_taken_is_not_given_again() -> None:
    for batch, images in ((32, IMAGENET), (32, 50000), (256, 50000), (16, 2000), (64, 800)):
        cfg = make_config(batch=batch)
        advice = suggested(cfg, images)
        assert advice
        cfg = replace(
            cfg,
            head=HeadConfig(out_dim=int(advice.get("head.out_dim", cfg.head.out_dim))),
            teacher=TeacherConfig(momentum=advice.get("teacher.momentum", cfg.teacher.momentum)),
            optim=OptimConfig(lr=advice.get("optim.lr", cfg.optim.lr)),
        )
        assert suggested(cfg, images) == {}


def test_advice_for_a_short_run() -> None:
    """A teacher slower than the run stays at its random start."""
    advice = suggested(make_config(batch=32, epochs="300it", head_out_dim=256, optim_lr=3e-3, optim_warmup="10%"), 5000)
    assert list(advice) == ["teacher.momentum"]
    assert math.log(0.5) / math.log(advice["teacher.momentum"]) == pytest.approx(30, rel=0.1)


@pytest.mark.parametrize("warmup", ["60%", "3it"])
def test_advice_about_the_warmup(warmup: str) -> None:
    assert suggested(make_config(batch=800, optim_warmup=warmup), IMAGENET) == {"optim.warmup": 10}


def test_table_shows_the_turning_points() -> None:
    lines = make_plan(make_config(batch=800), IMAGENET).table().splitlines()
    assert "1281167 images" in lines[0] and "160100" in lines[0]
    rows = {line[:20].strip(): line[20:].split() for line in lines[2:]}
    assert list(rows) == ["start", "prototypes free", "peak rate", "temperature reached", "middle", "end"]
    assert rows["peak rate"][:3] == ["16009", "9", "0.001563"]
    assert rows["start"][-1] == "frozen" and rows["end"][-1] == "free"
    assert [int(row[0]) for row in rows.values()] == sorted(int(row[0]) for row in rows.values())


def test_positions_of_newer_cpus_are_named() -> None:
    """Before step 1: who wants to repeat the release does not want them. A CNN has no positions."""
    for model, said in ((ModelConfig(pos_interp="dino_always"), 1), (ModelConfig(pos_interp="dino"), 0),
                        (ModelConfig(arch="resnet18", pos_interp="dino_always"), 0)):  # fmt: skip
        plan = make_plan(replace(make_config(), model=model), 256)
        assert len([text for text in plan.warnings if "train with model.pos_interp dino" in text]) == said


def warnings_of(images: int = 1000, **changes: object) -> str:
    return "\n".join(make_plan(make_config(batch=100, epochs=30, **changes), images).warnings)


@pytest.mark.parametrize(
    ("name", "low", "right", "high"), [("adamw", 1e-6, 5e-4, 0.1), ("lars", 1e-4, 0.3, 100), ("sgd", 1e-6, 0.03, 90)]
)
def test_a_learning_rate_far_from_what_learns_is_warned_of(name: str, low: float, right: float, high: float) -> None:
    found = warnings_of(optim_name=name, optim_lr=low, optim_min_lr=0.0)
    assert f"below {USUAL_RATES[name][0]:g}: with {name} the run will hardly learn" in found
    assert f"above {USUAL_RATES[name][1]:g}: with {name} the run will hardly stay stable" in warnings_of(
        optim_name=name, optim_lr=high
    )
    assert warnings_of(optim_name=name, optim_lr=right) == ""


@pytest.mark.parametrize("option", ["temperature", "warmup_temperature"])
def test_teacher_temperatures_are_below_the_students_and_not_near_zero(option: str) -> None:
    for value, said in (
        (0.1, "is not below loss.student_temperature 0.1"),
        (0.5, "is not below"),
        (0.005, "a single prototype"),
    ):
        found = warnings_of(**{f"teacher_{option}": value})
        assert f"teacher.{option} {value:g} " in found and said in found and found.count("\n") == 0
    assert warnings_of(**{f"teacher_{option}": 0.05}) == ""
    assert "is not below loss.student_temperature 0.05" in warnings_of(loss_student_temperature=0.05)


def test_a_jump_of_the_learning_rate_is_named() -> None:
    """A finished run of ten epochs ends near the least rate; a run of thirty is still high there."""
    short, long = (make_plan(make_config(batch=100, epochs=epochs, optim_warmup=2), 1000) for epochs in (10, 30))
    said = jump(short, long, 100)
    assert (
        f"from {short.values(99).lr:.3g} to {long.values(100).lr:.3g} at step 100" in said
        and "100 steps before, 300 now" in said
    )
    assert jump(short, short, 50) == jump(long, long, 300) == jump(short, long, 5) == ""


@pytest.mark.parametrize(
    ("sides", "said"),
    [([32, 32, 32], "try crops.global_size 32 and a local_size of about 16"), ([100, 50, 500], "at most 100 pixels"), ([], ""),
     ([112], ""), ([50, 400, 600], ""), ([5], "crops.global_size 16 and a local_size of about 16")],
)  # fmt: skip
def test_crops_far_larger_than_the_images(sides: list[int], said: str) -> None:
    found = small_images(sides, make_config())
    assert said in found and bool(found) == bool(said)
