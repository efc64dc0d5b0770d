"""Warnings of collapse on toy trainings that collapse and on one that does not, and what is written after a failure."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from golden.load import assert_close
from torch import Tensor, nn

from dino_simpool.dino.loss import DinoLoss
from dino_simpool.dino.monitor import Monitor, effective_rank, feature_spread
from dino_simpool.dino.optim import ema_update

OUT_DIM = 64


class Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


def train_toy(
    *,
    steps: int,
    log_every: int,
    teacher_temp: float = 0.04,
    center_momentum: float = 0.9,
    constant: bool = False,
    num_classes: int = 8,
) -> list[tuple[int, str]]:
    """DINO with a small MLP on noisy views of one vector per class; returns the warnings with their steps."""
    torch.manual_seed(0)
    classes = torch.randn(num_classes, 16)
    student = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), Unit())
    teacher = copy.deepcopy(student).requires_grad_(False)
    prototypes = nn.Parameter(nn.functional.normalize(torch.randn(OUT_DIM, 16), dim=1))
    loss = DinoLoss(OUT_DIM, center_momentum=center_momentum)
    optimizer = torch.optim.AdamW([*student.parameters(), prototypes], lr=3e-3)
    monitor, warnings, sums = Monitor(), [], torch.zeros(2)
    for step in range(1, steps + 1):
        images = classes[torch.randint(num_classes, (16,))]
        views = images + 0.5 * torch.randn(4, *images.shape)
        if constant:
            views = torch.ones_like(views)
        features = teacher(views[:2])
        terms = loss.fused(student(views), prototypes, features @ prototypes.detach().T, teacher_temp)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        ema_update(teacher, student, 0.95)
        sums += torch.stack([terms.loss, terms.entropy]).detach()
        if step % log_every == 0:
            means = (sums / log_every).tolist()
            sums.zero_()
            spread = feature_spread(features.flatten(0, 1)).item()
            found = monitor.update(loss=means[0], entropy=means[1], out_dim=OUT_DIM, spread=spread, step=step)
            warnings += [(step, text) for text in found]
    return warnings


@pytest.mark.parametrize("log_every", [1, 10, 50])
def test_uniform_teacher_is_noticed_within_50_steps(log_every: int) -> None:
    warnings = train_toy(steps=100, log_every=log_every, teacher_temp=1e4)
    (step, text), = warnings  # fmt: skip
    assert step <= 50
    assert text.startswith("uniform collapse") and "teacher.temperature" in text and "4.1589" in text


@pytest.mark.parametrize("log_every", [1, 10, 50])
def test_constant_output_is_noticed_within_50_steps(log_every: int) -> None:
    """With the center, a constant output makes the teacher uniform too, so that both are said."""
    warnings = train_toy(steps=100, log_every=log_every, constant=True)
    assert all(step <= 50 for step, _ in warnings)
    assert "point collapse" in {text.partition(":")[0] for _, text in warnings}


def test_collapse_to_one_prototype_is_noticed() -> None:
    """Without centering, images that do not form classes end with one answer for all: entropy and loss near 0."""
    warnings = train_toy(steps=200, log_every=10, center_momentum=1.0, num_classes=4000)
    assert [text.partition(":")[0] for _, text in warnings] == ["point collapse"]
    assert "loss.center_momentum" in warnings[0][1]


def test_healthy_training_is_left_alone() -> None:
    assert train_toy(steps=400, log_every=10) == []


def feed(monitor: Monitor, steps: range, **values: float) -> list[str]:
    """The same values at each of these steps; loss and entropy as shares of ln K."""
    log_k = math.log(OUT_DIM)
    loss, entropy, spread = values.get("loss", 0.8), values.get("entropy", 0.6), values.get("spread", 0.8)
    return [
        text.partition(":")[0]
        for step in steps
        for text in monitor.update(loss=loss * log_k, entropy=entropy * log_k, out_dim=OUT_DIM, spread=spread, step=step)
    ]


def test_a_start_near_ln_k_is_healthy() -> None:
    """Loss at ln K through a long warm-up, while the teacher is not uniform."""
    assert feed(Monitor(warmup_steps=5000), range(10, 5001, 10), loss=1.0, entropy=0.95) == []


def test_a_loss_that_stays_at_ln_k_after_the_warmup() -> None:
    monitor = Monitor(warmup_steps=500)
    assert feed(monitor, range(50, 1451, 50), loss=1.001, entropy=0.95) == []
    assert feed(monitor, range(1500, 3001, 50), loss=1.001, entropy=0.95) == ["not learning"]


def test_a_sign_of_exactly_its_patience_is_enough() -> None:
    """40 steps for a collapse; a run that does not learn is told how many steps of that it has seen, here 1,000."""
    for last, said in ((39, []), (40, ["point collapse"])):
        assert feed(Monitor(), range(1, last + 1), spread=0.001) == said
    log_k, monitor = math.log(OUT_DIM), Monitor(warmup_steps=500)
    texts = [
        text
        for step in range(100, 1501, 100)
        for text in monitor.update(loss=1.001 * log_k, entropy=0.95 * log_k, out_dim=OUT_DIM, spread=0.8, step=step)
    ]
    assert len(texts) == 1 and "for 1000 steps after the warm-up" in texts[0]


def test_a_warning_comes_once_and_again_after_a_recovery() -> None:
    monitor = Monitor()
    assert feed(monitor, range(10, 1001, 10), spread=0.001) == ["point collapse"]
    assert feed(monitor, range(1010, 1101, 10)) == []
    assert feed(monitor, range(1110, 1131, 10), spread=0.001) == [], "30 steps are not enough"
    assert feed(monitor, range(1140, 1201, 10), spread=0.001) == ["point collapse"]


def test_sure_answers_with_diverse_features_are_no_collapse() -> None:
    assert feed(Monitor(), range(10, 201, 10), loss=0.02, entropy=0.01, spread=0.9) == []
    assert feed(Monitor(), range(10, 201, 10), loss=0.02, entropy=0.01, spread=0.1) == ["point collapse"]
    assert feed(Monitor(), range(10, 201, 10), loss=0.02, entropy=0.01, spread=math.nan) == ["point collapse"]
    assert feed(Monitor(), range(10, 201, 10), spread=math.nan) == []


def test_state_survives_a_checkpoint() -> None:
    """Interrupted at each step, through JSON, the warnings come at the same steps."""
    whole, broken = Monitor(warmup_steps=3), Monitor(warmup_steps=3)
    for step in range(5, 101, 5):
        expected = feed(whole, range(step, step + 1), entropy=1.0, loss=1.0)
        state = json.loads(json.dumps(broken.state_dict()))
        broken = Monitor()
        broken.load_state_dict(state)
        assert feed(broken, range(step, step + 1), entropy=1.0, loss=1.0) == expected
        assert whole == broken
    with pytest.raises(ValueError, match="state"):
        broken.load_state_dict({"uniform": 1})


def test_feature_spread() -> None:
    torch.manual_seed(0)
    features = nn.functional.normalize(torch.randn(50, 7, dtype=torch.float64), dim=1)
    deviations = []
    for d in range(7):
        mean = sum(features[:, d].tolist()) / 50
        deviations.append(math.sqrt(sum((x - mean) ** 2 for x in features[:, d].tolist()) / 50))
    assert_close(feature_spread(features), sum(deviations) / 7 * math.sqrt(7), 1e-5)
    assert feature_spread(features[:1].expand(9, -1)) == 0
    assert feature_spread(features[:1]).isnan() and feature_spread(features[:0]).isnan()


def test_effective_rank() -> None:
    assert_close(effective_rank(torch.eye(6)[:4]), 4.0, 1e-5)
    assert_close(effective_rank(torch.ones(5, 3)), 1.0, 1e-5)
    assert_close(effective_rank(torch.ones(1, 3)), 1.0, 1e-5)
    features = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
    assert_close(effective_rank(features), math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))), 1e-5)
    assert effective_rank(torch.zeros(4, 3)).isnan()
    assert effective_rank(torch.tensor([[1.0, math.nan]])).isnan()


def test_a_loss_above_ln_k_is_warned_of_once_per_epoch_after_the_warmup() -> None:
    monitor, high = Monitor(warmup_steps=20), 1.1 * math.log(OUT_DIM)
    steps = []
    for step in range(5, 101, 5):  # ten steps an epoch
        found = monitor.update(loss=high, entropy=1.0, out_dim=OUT_DIM, spread=1.0, step=step, steps_per_epoch=10)
        steps += [step for text in found if "is above ln(head.out_dim)" in text]
        restored = Monitor(warmup_steps=20)
        restored.load_state_dict(monitor.state_dict())
        monitor = restored
    assert steps == [35, 45, 55, 65, 75, 85, 95]
    assert monitor.update(loss=0.9 * high, entropy=1.0, out_dim=OUT_DIM, spread=1.0, step=105, steps_per_epoch=10) == []


def test_a_state_of_version_0_1_has_no_epoch_of_that_warning() -> None:
    monitor = Monitor()
    monitor.load_state_dict({name: value for name, value in Monitor(warmup_steps=3).state_dict().items() if name != "above"})
    assert monitor == Monitor(warmup_steps=3)
