"""The loss against a double loop over pairs of views in float64, the public code's figures, and itself without logits."""

from __future__ import annotations

import math

import pytest
import torch
from golden.load import assert_close, cases, load, meta
from test_distributed import group, run_processes, values
from torch import Tensor

import dino_simpool.dino.loss as loss_module
from dino_simpool import distributed
from dino_simpool.dino.loss import DinoLoss, LossTerms

DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]

SIZES = [  # V, B, K, D
    pytest.param(8, 3, 20, 6, id="usual"),
    pytest.param(2, 4, 9, 5, id="no local views"),
    pytest.param(3, 1, 7, 4, id="one image"),
    pytest.param(2, 1, 2, 1, id="smallest"),
]


def by_pairs(student: Tensor, teacher: Tensor, center: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss and entropy, pair by pair and image by image."""
    num_views, num_images = student.shape[:2]
    losses, entropies = [], []
    for b in range(num_images):
        for t in range(2):
            shifted = (teacher[t, b] - center[0]) / temperature
            q = shifted.exp() / shifted.exp().sum()
            entropies.append(-(q * q.log()).sum())
            for v in range(num_views):
                if v != t:
                    z = student[v, b] / 0.1
                    losses.append(-(q * (z - z.exp().sum().log())).sum())
    return torch.stack(losses).mean(), torch.stack(entropies).mean()


def make_inputs(
    num_views: int, num_images: int, num_prototypes: int, width: int, *, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Student features (V, B, D), prototypes (K, D) and teacher logits (2, B, K)."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_views, num_images, width, generator=generator, dtype=torch.float64)
    prototypes = torch.randn(num_prototypes, width, generator=generator, dtype=torch.float64)
    teacher = 0.1 * torch.randn(2, num_images, num_prototypes, generator=generator, dtype=torch.float64)
    return features / features.norm(dim=-1, keepdim=True), prototypes, teacher


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize(("num_views", "num_images", "num_prototypes", "width"), SIZES)
def test_equals_double_loop(
    num_views: int, num_images: int, num_prototypes: int, width: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, entropy, KL, gradients and center over four steps; chunks of two rows, the last one not full."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 2 * num_prototypes + 1)
    ours = DinoLoss(num_prototypes).double()
    center = torch.zeros(1, num_prototypes, dtype=torch.float64)
    for step, temperature in enumerate([0.04, 0.05, 0.06, 0.07]):
        features, prototypes, teacher = make_inputs(num_views, num_images, num_prototypes, width, seed=step)
        leaves = [features.clone().requires_grad_(), prototypes.clone().requires_grad_()]
        twins = [features.clone().requires_grad_(), prototypes.clone().requires_grad_()]
        expected, entropy = by_pairs(twins[0] @ twins[1].T, teacher, center, temperature)
        result = ours.fused(*leaves, teacher, temperature) if fused else ours(leaves[0] @ leaves[1].T, teacher, temperature)
        for ours_value, value in zip(result, (expected, entropy, expected - entropy), strict=True):
            assert_close(ours_value.detach(), value.detach(), 1e-12, 1e-12)
        (3 * result.loss).backward()
        (3 * expected).backward()
        for leaf, twin in zip(leaves, twins, strict=True):
            assert_close(leaf.grad, twin.grad, 1e-10, 1e-12)
        center = 0.9 * center + 0.1 * torch.stack([teacher[t, b] for t in range(2) for b in range(num_images)]).mean(0)
        assert_close(ours.center, center, 1e-12, 1e-15)


def golden_steps(loss: DinoLoss, case: str, suffix: str, dtype: torch.dtype) -> list[tuple[LossTerms, Tensor, Tensor]]:
    """Terms, gradient and center of each step of a golden case."""
    data = load("open_dino_loss")
    settings = meta(data, case)
    temperatures = data[f"{case}/out/teacher_temp_schedule"]
    steps = []
    for step, epoch in enumerate(settings["epochs"]):
        student, teacher = (
            torch.tensor(data[f"{case}/in/{name}{step}{suffix}"]).to(dtype).view(views, settings["B"], settings["out_dim"])
            for name, views in (("student", settings["ncrops"]), ("teacher", 2))
        )
        student.requires_grad_()
        terms = loss(student, teacher, float(temperatures[epoch]))
        terms.loss.backward()
        steps.append((LossTerms(*(x.detach() for x in terms)), student.grad.flatten(0, 1), loss.center.clone()))
    return steps


def compare_with_golden(steps: list[tuple[LossTerms, Tensor, Tensor]], case: str, suffix: str, dtype: torch.dtype) -> None:
    data = load("open_dino_loss")
    exact = dtype == torch.float64
    tolerance = (1e-6, 1e-8) if exact else (1e-5, 1e-6)
    out, grad = ("out64", "grad64") if exact else ("out", "grad")
    for step, (terms, gradient, center) in enumerate(steps):
        for name, value in terms._asdict().items():
            reference = data[f"{case}/{out}/{name}{step}{suffix}"]
            if math.isnan(reference):  # 0 * log 0 in the public code's float32 run; ours is the value of its float64 run
                assert case == "quirk_entropy_nan" and name != "loss"
                reference = data[f"{case}/out64/{name}{step}{suffix}"]
            assert_close(value, reference, *tolerance, f"{name}{step}")
        assert_close(gradient, data[f"{case}/{grad}/student{step}{suffix}"], *tolerance, f"gradient {step}")
        assert_close(center, data[f"{case}/{out}/center{step}{suffix}"], *tolerance, f"center {step}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["warmup", "same_epoch", "no_local_no_warmup", "quirk_entropy_nan"])
def test_golden(case: str, dtype: torch.dtype) -> None:
    data = load("open_dino_loss")
    loss = DinoLoss(meta(data, case)["out_dim"]).to(dtype)
    compare_with_golden(golden_steps(loss, case, "", dtype), case, "", dtype)


def test_all_golden_cases_are_covered() -> None:
    assert set(cases(load("open_dino_loss"))) == {
        "warmup",
        "same_epoch",
        "no_local_no_warmup",
        "quirk_entropy_nan",
        "two_ranks",
    }


def two_ranks(dtype: torch.dtype) -> list[tuple[LossTerms, Tensor, Tensor]]:
    """What one of two processes computes."""
    distributed.setup("cpu")
    return golden_steps(DinoLoss(32).to(dtype), "two_ranks", f"_rank{distributed.rank()}", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_processes_share_the_center(dtype: torch.dtype) -> None:
    """Golden, with two real processes: each has its own loss, and both the same center."""
    of_ranks = values(run_processes(two_ranks, dtype, environments=group()))
    for rank, steps in enumerate(of_ranks):
        compare_with_golden(steps, "two_ranks", f"_rank{rank}", dtype)
    for (_, _, center), (_, _, other) in zip(*of_ranks, strict=True):
        assert torch.equal(center, other)


def test_the_center_can_be_updated_later() -> None:
    """Two halves of a batch, as in gradient accumulation: loss, gradient and center equal those of the whole."""
    features, prototypes, teacher = make_inputs(5, 4, 12, 6, seed=0)
    whole, halves = DinoLoss(12).double(), DinoLoss(12).double()
    weight, weight_of_halves = prototypes.clone().requires_grad_(), prototypes.clone().requires_grad_()
    for _ in range(2):
        expected = whole.fused(features, weight, teacher, 0.04)
        expected.loss.backward()
        total, center = 0.0, torch.zeros(1, 12, dtype=torch.float64)
        for part in (slice(0, 2), slice(2, 4)):
            before = halves.center.clone()
            terms = halves.fused(features[:, part], weight_of_halves, teacher[:, part], 0.04, update_center=False)
            assert torch.equal(halves.center, before)
            (terms.loss / 2).backward()
            total += terms.loss.item() / 2
            center += teacher[:, part].mean((0, 1))[None] / 2
        halves.update_center(center)
        assert_close(total, expected.loss.item(), 1e-12)
        assert_close(halves.center, whole.center, 1e-12, 1e-15)
    assert_close(weight_of_halves.grad, weight.grad, 1e-10, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32 in", "bfloat16 in"])
def test_autocast_never_rounds_logits(dtype: torch.dtype) -> None:
    """Inside autocast the result is that of float32, forward and backward, whatever the inputs' type."""
    features, prototypes, teacher = (x.to(dtype) for x in make_inputs(4, 3, 50, 8, seed=0))
    results = []
    for autocast in (False, True):
        for fused in (False, True):
            x, weight = features.float().requires_grad_(), prototypes.float().requires_grad_()
            logits = x @ weight.T
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = DinoLoss(50)
                terms = loss.fused(x.to(dtype), weight, teacher, 0.04) if fused else loss(logits, teacher, 0.04)
                assert terms.loss.dtype == loss.center.dtype == torch.float32
                terms.loss.backward()
            results.append((terms.loss.detach(), x.grad, weight.grad))
    for result in results[1:]:
        for value, reference in zip(result, results[0], strict=True):
            assert_close(value, reference, 1e-5, 1e-6 if dtype == torch.float32 else 1e-2)


def test_certain_teacher_has_finite_entropy() -> None:
    """Probabilities that underflow to 0 count 0, and gradients stay finite."""
    teacher = torch.zeros(2, 1, 5)
    teacher[..., 0] = 100.0
    student = torch.zeros(4, 1, 5, requires_grad=True)
    terms = DinoLoss(5)(student, teacher, 0.04)
    terms.loss.backward()
    assert terms.entropy == 0
    assert_close(terms.kl, math.log(5), 1e-6)
    assert student.grad.isfinite().all()


def test_fused_is_differentiated_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """By finite differences, through unit features and a weight-normalised last layer, as the head gives them."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 30)
    features, prototypes, teacher = make_inputs(4, 2, 9, 3, seed=1)

    def total(x: Tensor, v: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(x, dim=-1)
        return DinoLoss(9).double().fused(unit, v / v.norm(dim=1, keepdim=True), teacher, 0.04).loss

    assert torch.autograd.gradcheck(total, (features.requires_grad_(), prototypes.requires_grad_()))


def test_a_frozen_last_layer_gets_no_gradient() -> None:
    features, prototypes, teacher = make_inputs(3, 2, 9, 3, seed=1)
    features.requires_grad_()
    DinoLoss(9).double().fused(features, prototypes, teacher, 0.04).loss.backward()
    assert features.grad is not None and prototypes.grad is None


@pytest.mark.parametrize(
    ("student", "prototypes", "teacher"),
    [
        pytest.param((1, 2, 3), (7, 3), (2, 2, 7), id="one view"),
        pytest.param((4, 2, 3), (7, 3), (2, 3, 7), id="other images"),
        pytest.param((4, 2, 3), (6, 3), (2, 2, 7), id="other out_dim"),
        pytest.param((4, 2, 3), (7, 3), (4, 2, 7), id="four teacher views"),
    ],
)
def test_wrong_shapes_are_refused(student: tuple, prototypes: tuple, teacher: tuple) -> None:
    with pytest.raises(ValueError, match="prototypes"):
        DinoLoss(7).fused(torch.zeros(student), torch.zeros(prototypes), torch.zeros(teacher), 0.04)


def test_the_center_is_saved() -> None:
    loss = DinoLoss(3)
    loss.update_center(torch.tensor([[1.0, 2.0, 3.0]]))
    state = loss.state_dict()
    assert list(state) == ["center"]
    assert_close(state["center"], [[0.1, 0.2, 0.3]], 1e-6)
