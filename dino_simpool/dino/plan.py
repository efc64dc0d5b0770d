"""Schedules: DINO's as pure functions of the step, the plan of a run, and advice for small runs.

Source: utils.cosine_scheduler and DINOLoss of github.com/facebookresearch/dino. Its quirks are
kept: the warm-up includes both of its ends, so the first learning rate is 0 and the peak occurs
twice; the final value is approached but never reached; the peak is scaled by batch / 256 and the
minimum is not; the teacher's temperature is constant within an epoch. Deviations: a warm-up longer
than the run is scaled down with a warning, where the public code crashes, and a temperature warm-up
shorter than an epoch goes from step to step, where by epochs there would be none.

A step is one optimizer step over the global batch, counted from 0. An epoch is num_images //
batch_size steps. This module does not import torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from dino_simpool.config import TrainConfig, parse_duration

REFERENCE_IMAGES, REFERENCE_BATCH, REFERENCE_MOMENTUM, REFERENCE_RATE = 1281167, 1024, 0.996, 5e-4
"""Published DINO: images of ImageNet, batch, teacher momentum, learning rate per 256 images."""
USUAL_RATES = {"adamw": (1e-6, 1e-2, 5e-4), "lars": (1e-3, 20.0, 0.3), "sgd": (1e-5, 10.0, 0.03)}
"""By optimizer: the lowest and the highest peak learning rate with which a run is likely to learn,
and an optim.lr to begin with (that of DINO, of the published ResNet-50, and of DINO's help)."""
SHARPEST = 0.01
"""Below this temperature the teacher's target is one prototype; published are 0.04 to 0.07."""
WARMUP_SHARES = {"optim.warmup": 0.1, "teacher.warmup": 0.3}
"""Published warm-ups as shares of the run: 10 and 30 of 100 epochs."""
NEW_HEAD = "10%"
"""For how much of a run a new head learns alone, before the encoder of run.init does."""


def cosine_schedule(
    step: int, total_steps: int, base: float, final: float, *, warmup_steps: int = 0, warmup_start: float = 0.0
) -> float:
    """The value at a step: a linear warm-up, then half a cosine down (or up) to final.

    The warm-up goes from warmup_start to base over warmup_steps values.
    """
    if step < warmup_steps - 1:
        return warmup_start + step * (base - warmup_start) / (warmup_steps - 1)
    if step < warmup_steps:  # the last value is the base exactly; a warm-up of a single value is its start, as in linspace
        return base if warmup_steps > 1 else warmup_start
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def teacher_temperature(time: int, warmup: int, warm: float, final: float) -> float:
    """The temperature of an epoch: linear, `warmup` values from warm to final, then final.

    time, warmup: in epochs, or both in steps for a warm-up shorter than an epoch.
    """
    if time >= warmup:
        return final
    return warm + time * (final - warm) / max(1, warmup - 1)


def duration_steps(
    duration: int | float | str, *, steps_per_epoch: int, total_steps: int | None, batch_size: int, name: str
) -> int:
    """Steps in a duration (10ep, 5000it, 1e6img, 5%), rounded to whole steps.

    total_steps: of the run, or None while it is not known. name: of the option, for the ValueError
    about a share of a run whose length is not known.
    """
    number, unit = parse_duration(duration)
    if unit == "%":
        if total_steps is None:
            raise ValueError(f"{name} is {duration}, a share of an unknown length: give epochs, steps or images")
        return round(number / 100 * total_steps)
    return round({"ep": number * steps_per_epoch, "it": number, "img": number / batch_size}[unit])


@dataclass(frozen=True)
class StepValues:
    """What the learner sets before a step."""

    lr: float
    weight_decay: float
    momentum: float
    """Of the teacher's moving average."""
    teacher_temperature: float
    freeze_last_layer: bool
    freeze_encoder: bool = False


@dataclass(frozen=True)
class Plan:
    """Length and schedules of a run, made by `make_plan`."""

    num_images: int
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    """Of the learning rate."""
    teacher_warmup_steps: int
    """Of the temperature: a multiple of an epoch, or less than one."""
    freeze_steps: int
    peak_lr: float
    cfg: TrainConfig
    new_head: bool = False
    """Whether the run started from weights without a head of its size (run.init)."""
    warnings: tuple[str, ...] = ()
    """What was changed or looks wrong, one sentence each."""
    suggestions: tuple[str, ...] = ()
    """What would suit small data or a small batch better, one sentence each with its reason."""

    @property
    def epochs(self) -> int:
        """Epochs, the last of which may be partial."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    @property
    def temperature_steps(self) -> int:
        """Steps for which the temperature of the warm-up stays the same: an epoch, or 1."""
        return self.steps_per_epoch if self.teacher_warmup_steps >= self.steps_per_epoch else 1

    @property
    def frozen_encoder_steps(self) -> int:
        """Steps at the start in which the encoder of run.init does not change."""
        duration = self.cfg.optim.freeze_encoder
        if duration is None:
            duration = NEW_HEAD if self.new_head else 0
        sizes = {"steps_per_epoch": self.steps_per_epoch, "total_steps": self.total_steps, "batch_size": self.batch_size}
        return duration_steps(duration, name="optim.freeze_encoder", **sizes)

    def values(self, step: int) -> StepValues:
        """The schedules at a step, 0 to total_steps - 1."""
        optim, teacher, total, hold = self.cfg.optim, self.cfg.teacher, self.total_steps, self.temperature_steps
        return StepValues(
            lr=cosine_schedule(step, total, self.peak_lr, optim.min_lr, warmup_steps=self.warmup_steps),
            weight_decay=cosine_schedule(step, total, optim.weight_decay, optim.weight_decay_end),
            momentum=cosine_schedule(step, total, teacher.momentum, 1.0),
            teacher_temperature=teacher_temperature(
                step // hold, self.teacher_warmup_steps // hold, teacher.warmup_temperature, teacher.temperature
            ),
            freeze_last_layer=step < self.freeze_steps,
            freeze_encoder=step < self.frozen_encoder_steps,
        )

    def table(self) -> str:
        """All schedules as text: at the start, the turning points, the middle and the end."""
        last = self.total_steps - 1
        points = {  # where two coincide, the later name stays
            "middle": self.total_steps // 2,
            "prototypes free": self.freeze_steps,
            **({"encoder free": frozen} if (frozen := self.frozen_encoder_steps) else {}),
            "temperature reached": max(0, self.teacher_warmup_steps - self.temperature_steps),
            "peak rate": max(0, self.warmup_steps - 1),
            "start": 0,
            "end": last,
        }
        names = {step: name for name, step in points.items() if step <= last}
        lines = [
            f"{self.num_images} images, batch {self.batch_size}: {self.steps_per_epoch} steps per epoch, {self.total_steps} in "
            f"total ({self.total_steps / self.steps_per_epoch:g} epochs, {self.total_steps * self.batch_size} images seen)",
            f"{'':20}{'step':>9}{'epoch':>8}{'lr':>12}{'decay':>10}{'momentum':>11}{'temperature':>13}  prototypes",
        ]
        for step in sorted(names):
            v = self.values(step)
            lines.append(
                f"{names[step]:20}{step:>9}{step // self.steps_per_epoch:>8}{v.lr:>12.4g}{v.weight_decay:>10.4g}"
                f"{v.momentum:>11.6f}{v.teacher_temperature:>13.4f}  {'frozen' if v.freeze_last_layer else 'free'}"
                f"{', encoder frozen' if v.freeze_encoder else ''}"
            )
        return "\n".join(lines)


def make_plan(cfg: TrainConfig, num_images: int) -> Plan:
    """The plan of a run on num_images images. ValueError if there is no image or no full batch."""
    batch = cfg.run.batch_size
    if num_images == 0:
        raise ValueError("there are no images to train on: set data.root to a folder or list that has some")
    if batch > num_images:
        raise ValueError(f"run.batch_size is {batch}, but there are only {num_images} images: use {num_images} or less")
    steps_per_epoch = num_images // batch
    steps_of = partial(duration_steps, steps_per_epoch=steps_per_epoch, batch_size=batch)
    total = max(1, steps_of(cfg.run.epochs, total_steps=None, name="run.epochs"))
    warnings: list[str] = []
    spans = {}
    for name, duration in (("optim.warmup", cfg.optim.warmup), ("teacher.warmup", cfg.teacher.warmup)):
        asked = steps_of(duration, total_steps=total, name=name)
        steps = asked if asked <= total else round(WARMUP_SHARES[name] * total)
        whole_epochs = name == "teacher.warmup" and steps >= steps_per_epoch
        spans[name] = round(steps / steps_per_epoch) * steps_per_epoch if whole_epochs else steps
        if asked > total:
            warnings.append(
                f"{name} ({duration}: {asked} steps) is longer than the run ({total} steps): scaled to {spans[name]} steps, "
                f"{WARMUP_SHARES[name]:.0%} of the run as published{' and rounded to whole epochs' * whole_epochs}; give "
                f"{name} as a share to set it yourself"
            )
    plan = Plan(
        num_images=num_images,
        batch_size=batch,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        warmup_steps=spans["optim.warmup"],
        teacher_warmup_steps=spans["teacher.warmup"],
        freeze_steps=steps_of(cfg.optim.freeze_last_layer, total_steps=total, name="optim.freeze_last_layer"),
        peak_lr=cfg.optim.lr * batch / 256,
        cfg=cfg,
    )
    # Advice where a run is far from the published setting (batch 480 to 1280, 1.3 M images).
    advice = (_suggest_out_dim(plan), _suggest_momentum(plan), _suggest_lr(plan), _suggest_warmup(plan))
    return replace(plan, warnings=(*warnings, *_warnings(plan)), suggestions=tuple(filter(None, advice)))


def jump(before: Plan, now: Plan, step: int) -> str:
    """The advice if the learning rate jumps where a run goes on with another plan, else empty.

    step: steps that are done, 1 or more. Compared are the rates of the last step and of the next.
    """
    if step >= now.total_steps:
        return ""
    last, following = before.values(step - 1).lr, now.values(step).lr
    if last == 0 or 0.8 <= following / last <= 1.25:
        return ""
    return (
        f"the learning rate jumps from {last:.3g} to {following:.3g} at step {step}, since the schedule is another one "
        f"({before.total_steps} steps before, {now.total_steps} now): this is no longer the training of either length. To "
        "train longer from the start, give another run.out; stop early with run.stop_after_steps"
    )


def small_images(shorter_sides: Sequence[int], cfg: TrainConfig) -> str:
    """The advice if most images are far smaller than the global crops, else empty.

    shorter_sides: in pixels, of some of the images.
    """
    side = statistics.median(shorter_sides) if shorter_sides else math.inf
    if 2 * side >= cfg.crops.global_size:
        return ""
    unit = cfg.model.patch_size if cfg.model.is_vit else 16
    size = max(1, round(side / unit)) * unit
    fitting = f"crops.global_size {size} and a local_size of about {max(1, round(0.43 * size / unit)) * unit}"
    return (
        f"half of the images looked at have a shorter side of at most {side:g} pixels, and crops.global_size is "
        f"{cfg.crops.global_size}: the crops are enlarged more than twofold and cost the time of large images; try {fitting}"
        + ("" if cfg.model.is_vit else ", and model.stem small for 32 to 64 pixels")
    )


def _warnings(plan: Plan) -> list[str]:
    """Settings that contradict each other."""
    found = []
    optim = plan.cfg.optim
    if plan.peak_lr < optim.min_lr:
        found.append(
            f"optim.min_lr {optim.min_lr:g} is above the peak learning rate {plan.peak_lr:g} (optim.lr {optim.lr:g} * batch "
            f"{plan.batch_size} / 256), so the rate rises instead of falling: lower optim.min_lr or raise optim.lr"
        )
    lowest, highest, usual = USUAL_RATES[optim.name]
    if not lowest <= plan.peak_lr <= highest:
        high = plan.peak_lr > highest
        found.append(
            f"optim.lr {optim.lr:g} * batch {plan.batch_size} / 256 gives a peak learning rate of {plan.peak_lr:.2g}, "
            f"{'above' if high else 'below'} {highest if high else lowest:g}: with {optim.name} the run will hardly "
            f"{'stay stable' if high else 'learn'}; try optim.lr {usual:g}"
        )
    student = plan.cfg.loss.student_temperature
    for name in ("temperature", "warmup_temperature"):
        value = getattr(plan.cfg.teacher, name)
        if value >= student:
            found.append(
                f"teacher.{name} {value:g} is not below loss.student_temperature {student:g}, so the targets are no sharper "
                "than the student's output and all outputs become equal: give 0.04 to 0.07 for a student's 0.1"
            )
        elif value < SHARPEST:
            found.append(
                f"teacher.{name} {value:g} makes every target a single prototype, whose choice is noise at first: give 0.04 to "
                "0.07 for a student's 0.1"
            )
    if plan.cfg.model.pos_interp == "dino_always" and plan.cfg.model.is_vit:
        found.append(
            "model.pos_interp dino_always resamples position embeddings at their own grid too, as the published code does on "
            "newer CPUs, and did not on the GPUs of the published weights: to repeat those, train with model.pos_interp dino"
        )
    if plan.freeze_steps >= plan.total_steps and parse_duration(optim.freeze_last_layer)[1] != "%":
        found.append(
            f"optim.freeze_last_layer {optim.freeze_last_layer} covers the whole run, so the prototypes never learn: shorten "
            "it, or set 100% if that is what you want"
        )
    return found


def _suggest_out_dim(plan: Plan) -> str:
    """With few images, most prototypes are never used. ImageNet has 20 images each, its 20 % 4."""
    out_dim = plan.cfg.head.out_dim
    advised = max(256, 2 ** int(math.log2(max(1, plan.num_images / 20))))
    if plan.num_images >= out_dim or advised >= out_dim:
        return ""
    return (
        f"head.out_dim {out_dim} is more than the {plan.num_images} images; prototypes without images of their own may keep "
        f"the loss at ln(out_dim): try head.out_dim {advised} (published: about 20 images per prototype)"
    )


def _suggest_momentum(plan: Plan) -> str:
    """The teacher's memory in images should be as published, or the same share of smaller data."""
    momentum, batch, total = plan.cfg.teacher.momentum, plan.batch_size, plan.total_steps
    if not 0 < momentum < 1:
        return ""
    steps = math.log(0.5) / math.log(momentum)  # half-life: newer steps have half of the teacher's weight
    published = math.log(0.5) / math.log(REFERENCE_MOMENTUM) * REFERENCE_BATCH * min(1, plan.num_images / REFERENCE_IMAGES)
    memory = f"at teacher.momentum {momentum:g} the teacher's half-life is {steps:.0f} steps ({steps * batch:.0f} images)"
    if steps > 0.25 * total:
        advised = 0.5 ** (1 / max(1.0, 0.1 * total))
        return (
            f"{memory}, {steps / total:.0%} of this run, so it stays close to its random start: "
            f"try teacher.momentum {_short_momentum(advised)} (10% of the run)"
        )
    advised = 0.5 ** (1 / max(1.0, min(published / batch, 0.05 * total)))
    if steps * batch < 0.3 * published and 1 - advised < 0.7 * (1 - momentum):
        return (
            f"{memory}; published are {published:.0f} images (batch {REFERENCE_BATCH}, for this much data), so it follows "
            f"the noise of small batches: try teacher.momentum {_short_momentum(advised)}"
        )
    return ""


def _short_momentum(momentum: float) -> str:
    """A momentum as text, with two significant digits of its distance to 1."""
    return f"{momentum:.{1 - math.floor(math.log10(1 - momentum))}f}".rstrip("0")


def _suggest_lr(plan: Plan) -> str:
    """Below 128 images, AdamW's rate should follow the square root of the batch, not the batch."""
    optim, batch = plan.cfg.optim, plan.batch_size
    reference = REFERENCE_RATE * math.sqrt(batch / 256)
    if optim.name != "adamw" or batch >= 128 or plan.peak_lr >= 0.7 * reference:
        return ""
    return (
        f"optim.lr {optim.lr:g} * batch {batch} / 256 gives a peak learning rate of {plan.peak_lr:.2g}; for batches this small "
        f"adamw usually needs the square root of the ratio, {reference:.2g}: try optim.lr {reference * 256 / batch:.2g}"
    )


def _suggest_warmup(plan: Plan) -> str:
    """A warm-up should be neither a large part of the run nor a handful of steps."""
    share, least = plan.warmup_steps / plan.total_steps, min(50, round(0.05 * plan.total_steps))
    if share <= 0.34 and plan.warmup_steps >= least:
        return ""
    return (
        f"optim.warmup {plan.cfg.optim.warmup} is {plan.warmup_steps} of {plan.total_steps} steps ({share:.0%}), "
        + ("which leaves little of the run at full rate" if share > 0.34 else "too few for the first gradients to settle")
        + ": try optim.warmup 10%"
    )
