"""The DINO loss: cross-entropy from each teacher view to every other student view.

Source: "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021), section 3.1, and
its public code. Entropy and KL divergence as in the public code of "Keep It SimPool" (ICCV 2023).
The teacher is centered and sharpened. With

    z_v = student logits of view v / student temperature,
    q_t = softmax((teacher logits of view t - center) / teacher temperature),

and the global views t in {0, 1},

    loss = mean over images b and over the 2V - 2 pairs (t, v), t != v, of
               -sum_k q_t[b, k] log softmax(z_v[b])_k
         = 1 / ((2V - 2) B) * sum_b [ sum_v w_v logsumexp(z_v[b]) - sum_t <q_t[b], sum_{v != t}
         z_v[b]> ],

with w_v = 1 for a global view (it has one partner) and 2 for a local one. The second line is what
is computed: V logsumexp instead of 2V - 2 log-softmax, and no tensor per pair. Deviation: the
entropy counts 0 log 0 as 0, while the public code gives NaN once a probability underflows.
Everything runs in float32 (float64 stays float64), also under autocast: logits rounded to bfloat16
would be wrong by up to 0.1 after the division by the temperature.

Letters: B images, V views (two global views first), D width of the unit features, K prototypes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dino_simpool.distributed import all_mean
from dino_simpool.models.pooling.simpool import without_autocast

CHUNK_ELEMENTS = 2**24
"""Student logits that `DinoLoss.fused` holds at a time: 64 MiB of float32."""


class LossTerms(NamedTuple):
    """Scalars in nats: the loss (with gradient), the teacher's mean entropy, and their difference.

    The difference is the KL divergence.
    """

    loss: Tensor
    entropy: Tensor
    kl: Tensor


class DinoLoss(nn.Module):
    """Cross-entropy between views.

    Owns the center (1, K), which is saved with the training state.
    """

    center: Tensor

    def __init__(self, out_dim: int, *, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(
        self, student: Tensor, teacher: Tensor, teacher_temp: float | Tensor, *, update_center: bool = True
    ) -> LossTerms:
        """Loss from logits: student (V, B, K), global views first; teacher (2, B, K).

        The old center is used, then moved toward this batch. With update_center=False the caller
        moves it by calling `update_center`. ValueError for shapes that do not fit.
        """
        self._check_shapes(student, teacher, self.center.shape[1])
        with without_autocast(student):
            views = _wide(student) / self.student_temp
            views = views - views.detach().amax(-1, keepdim=True)  # same loss and gradient, with smaller numbers to round
            targets = self._targets(teacher, teacher_temp)
            agreement = (targets * _partners(views)).sum()
            return self._finish(views.logsumexp(-1), agreement, targets, teacher, update_center)

    def fused(
        self,
        student_features: Tensor,
        prototypes: Tensor,
        teacher_logits: Tensor,
        teacher_temp: float | Tensor,
        *,
        update_center: bool = True,
    ) -> LossTerms:
        """The same numbers as `forward`, without a (V, B, K) tensor.

        student_features: (V, B, D). prototypes: (K, D). teacher_logits: (2, B, K). Since <q, W x> =
        <W^T q, x>, only the logsumexp needs student logits. They are computed in chunks, and again
        in the backward pass. ValueError for shapes that do not fit.
        """
        self._check_shapes(student_features, teacher_logits, prototypes.shape[0])
        with without_autocast(student_features):
            features, weight = _wide(student_features), _wide(prototypes)
            targets = self._targets(teacher_logits, teacher_temp)
            agreement = ((targets @ weight) * _partners(features)).sum() / self.student_temp
            normalizers = _ChunkedLogSumExp.apply(features.flatten(0, 1), weight, self.student_temp)
            return self._finish(normalizers.view(features.shape[:2]), agreement, targets, teacher_logits, update_center)

    @torch.no_grad()
    def update_center(self, batch_center: Tensor) -> None:
        """Move the center toward the mean of the raw teacher logits.

        batch_center: that mean, (1, K), of this process; it is averaged over all processes.
        """
        mean = all_mean(_wide(batch_center)).to(self.center.dtype)
        self.center.mul_(self.center_momentum).add_(mean, alpha=1 - self.center_momentum)

    @torch.no_grad()
    def _targets(self, teacher: Tensor, temperature: float | Tensor) -> Tensor:
        return ((_wide(teacher) - self.center) / temperature).softmax(-1)

    def _finish(
        self, normalizers: Tensor, agreement: Tensor, targets: Tensor, teacher: Tensor, update_center: bool
    ) -> LossTerms:
        """The terms from logsumexp (V, B) and the sum of all dot products."""
        num_views, num_images = normalizers.shape
        total = normalizers[:2].sum() + 2 * normalizers[2:].sum() - agreement
        loss = total / ((2 * num_views - 2) * num_images)
        entropy = torch.special.entr(targets).sum(-1).mean()
        if update_center:
            self.update_center(_wide(teacher).mean((0, 1)).unsqueeze(0))
        return LossTerms(loss, entropy, loss.detach() - entropy)

    def _check_shapes(self, student: Tensor, teacher: Tensor, num_prototypes: int) -> None:
        expected = (2, student.shape[1], self.center.shape[1])
        if student.shape[0] < 2 or tuple(teacher.shape) != expected or num_prototypes != expected[2]:
            raise ValueError(
                f"DinoLoss got student {tuple(student.shape)}, {num_prototypes} prototypes and teacher {tuple(teacher.shape)}: "
                f"give (V, B, ..) with V of 2 or more, {expected[2]} prototypes (out_dim) and teacher logits {expected}"
            )


class _ChunkedLogSumExp(torch.autograd.Function):
    """logsumexp over k of <x_m, w_k> / temperature, (M,), of x (M, D) and w (K, D), in chunks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, temperature: float) -> Tensor:
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        ctx.save_for_backward(x, weight)
        ctx.temperature, ctx.rows = temperature, rows
        return torch.cat([(part @ weight.T).logsumexp(-1) for part in (x / temperature).split(rows)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        scale = (grad / ctx.temperature).unsqueeze(-1)
        cool, scaled = x / ctx.temperature, x * scale  # rows of D numbers, which is less than K
        with without_autocast(x):
            for start in range(0, len(x), ctx.rows):
                part = slice(start, start + ctx.rows)
                probability = (cool[part] @ weight.T).softmax(-1)
                grad_x[part] = probability @ weight
                grad_weight.addmm_(probability.T, scaled[part])
        return grad_x.mul_(scale), grad_weight, None


def _partners(views: Tensor) -> Tensor:
    """(V, B, ..) -> (2, B, ..): for each global view the sum of all other views."""
    return views[:2].flip(0) + views[2:].sum(0)


def _wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it was that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
