"""A pass as a CUDA graph computes what it computes without, on a GPU."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dino_simpool.config import HeadConfig, ModelConfig, RunConfig, TrainConfig
from dino_simpool.data.feed import Batch
from dino_simpool.dino.capture import CapturedPass
from dino_simpool.dino.learner import DinoLearner, build_dino

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
VIT = ModelConfig(arch="vit_tiny", pool="simpool", gamma=1.25, width=48, depth=2, heads=3, image_size=64, drop_path=0.2)
RESNET = ModelConfig(arch="resnet18", pool="simpool", gamma=2.0, width=8, stem="small", image_size=32)
DEVICE = torch.device("cuda")


def make(model: ModelConfig, *, captured: bool, precision: str = "fp32", accumulate: int = 1) -> DinoLearner:
    head = HeadConfig(out_dim=256, hidden_dim=64, bottleneck_dim=32, batch_norm=model is RESNET)
    run = RunConfig(batch_size=8 * accumulate, accumulate=accumulate, precision=precision, epochs=100)
    learner = build_dino(TrainConfig(model=model, head=head, run=run), 800, DEVICE)
    if captured:
        buffers = [*learner.student.buffers(), *learner.teacher.buffers()]
        learner.captured = CapturedPass(learner._pass, learner.student.parameters(), buffers, add=accumulate > 1)
    return learner


def batches(step: int, *, count: int, size: int, images: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    views = [
        [torch.randn(images, 3, s, s, generator=generator).to(DEVICE) for s in (size, size, size // 2, size // 2)]
        for _ in range(count)
    ]
    return [Batch(each, torch.arange(images)) for each in views]


def tensors(learner: DinoLearner) -> dict[str, torch.Tensor]:
    parts = {"student": learner.student, "teacher": learner.teacher, "loss": learner.loss}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("model", [VIT, RESNET], ids=["vit", "resnet"])
def test_same_steps(model: ModelConfig, accumulate: int, precision: str):
    """Weights, statistics, center and random numbers after steps with a frozen and a free last
    layer, one of them not finite, and one with fewer images."""
    options = {"precision": precision, "accumulate": accumulate}
    learners = [make(model, captured=captured, **options) for captured in (False, True)]
    results: list[list[dict[str, float]]] = [[], []]
    for step, frozen in enumerate([True, True, False, False, False]):
        given = batches(step, count=accumulate, size=model.image_size, images=6 if step == 3 else 8)
        if step == 2:
            given[-1].views[1][0, 0, 0, 0] = math.nan
        for learner, said in zip(learners, results, strict=True):
            torch.manual_seed(step)
            values = dataclasses.replace(learner.plan.values(learner.plan.warmup_steps + step), freeze_last_layer=frozen)
            said.append({name: float(value) for name, value in learner.step(given, values).items()})
            said[-1]["drawn"] = float(torch.rand((), device=DEVICE))
    for ours, theirs in zip(*results, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3 if precision == "fp32" else 2e-2, abs=1e-6)
    assert [said["skipped_steps"] for said in results[1]] == [0, 0, 1, 0, 0]
    bound = 1e-5 if precision == "fp32" else 2e-3
    start = tensors(make(model, captured=False, **options))
    for (name, theirs), ours in zip(tensors(learners[0]).items(), tensors(learners[1]).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound, msg=lambda said, name=name: f"{name}: {said}")
        assert name in start
    assert any(not torch.equal(start[name], value) for name, value in tensors(learners[1]).items())


def test_it_does_not_wait_for_the_device():
    learner = make(VIT, captured=True)
    given = batches(0, count=1, size=64)
    values = learner.plan.values(20)
    learner.step(given, values)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            learner.step(given, values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
