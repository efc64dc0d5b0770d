"""Warns when a run collapses in one of the two ways that self-distillation can, or does not learn.

Source: section 5.3 of "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021):
without sharpening the output becomes uniform (entropy and loss are ln K), without centering it
becomes constant (both are 0). A healthy run also starts near ln K, so a loss near ln K is a sign
only if it lasts. Each threshold says what it was chosen against. The effective rank is that of Roy
and Vetterli (2007), as in RankMe (2023).

Letters: B rows, D width, K prototypes. Nothing here runs more often than the log is written.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

PATIENCE = 40
"""Steps for which a sign must last without a break. The center needs them to forget its start
(0.9 ** 40 = 0.015)."""
UNIFORM = 1e-3
"""Uniform teacher: its entropy is this close to ln K, as a share of ln K. Untrained encoders,
centered: 0.004 and more."""
SAME = 0.02
"""The same features for all images: their spread is below this. Untrained encoders: 0.27 and up."""
CONSTANT, DIVERSE = 0.05, 0.5
"""One prototype for all: loss and entropy are below 0.05 ln K. Not if the features are diverse
(spread above 0.5): a small data set that has been memorized has many certain answers, not one."""
ABOVE = 1.02
"""Worse than knowing nothing: the loss is above this share of ln K after the warm-up. A run that
learns nothing stays within 0.005 of ln K."""
FLAT, FLAT_STEPS = 5e-3, 1000
"""Not learning: the loss is this close to ln K for that many steps after the warm-up."""

MESSAGES = {
    "uniform": (
        "uniform collapse: the teacher's entropy {entropy:.4f} (loss {loss:.4f}) is ln(head.out_dim) = {log_k:.4f}, so it "
        "gives every prototype the same probability and nothing can be learned: lower teacher.temperature and "
        "teacher.warmup_temperature, or head.out_dim; then try a lower optim.lr or a longer optim.warmup"
    ),
    "flat": (
        "not learning: the loss {loss:.4f} has stayed at ln(head.out_dim) = {log_k:.4f} for {steps} steps after the warm-up: "
        "lower head.out_dim (small data: a few hundred to a few thousand) or teacher.temperature, or change optim.lr"
    ),
    "above": (
        "the loss {loss:.4f} is above ln(head.out_dim) = {log_k:.4f}, that of equal probabilities, after the warm-up of the "
        "learning rate: the student contradicts the teacher; lower optim.lr, raise teacher.warmup_temperature or set optim.clip"
    ),
    "point": (
        "point collapse: all images get the same output (loss {loss:.4f}, teacher entropy {entropy:.4f}, feature spread "
        "{spread:.4f}): use loss.center_momentum 0.9, raise teacher.temperature or teacher.warmup_temperature, lower optim.lr, "
        "or set optim.clip"
    ),
}


def feature_spread(features: Tensor) -> Tensor:
    """How much unit features (B, D) differ: a scalar.

    It is the standard deviation over rows, averaged over dimensions, times sqrt(D). 0: all rows are
    equal. About 1: they point in independent directions. NaN for fewer than two rows.
    """
    if len(features) < 2:
        return features.new_full((), math.nan)
    return features.float().std(0, correction=0).mean() * features.shape[1] ** 0.5


def effective_rank(features: Tensor) -> Tensor:
    """Number of directions that features (B, D) use, 1 to min(B, D).

    It is exp(entropy of the singular values over their sum): a scalar on the device of the
    features, computed on the CPU. The features are not centered, so equal rows have rank 1. NaN if
    all values are zero or one is not finite.
    """
    values = features.detach().cpu().double()
    if not values.isfinite().all():
        return features.new_full((), math.nan)
    shares = torch.linalg.svdvals(values)
    return torch.special.entr(shares / shares.sum()).sum().exp().to(features)


@dataclass
class Monitor:
    """Counts how many steps each sign of trouble has lasted. The fields are its whole state."""

    warmup_steps: int = 0
    """Warm-up of the learning rate, during which a loss near ln K is no sign."""
    last_step: int = 0
    uniform: int = 0
    point: int = 0
    flat: int = 0
    above: int = -1
    """The last epoch in which a loss above ln K was warned of."""

    def update(
        self, *, loss: float, entropy: float, out_dim: int, spread: float, step: int, steps_per_epoch: int = 1
    ) -> list[str]:
        """Warnings that are due at this step.

        Each is given once, and again if its sign went away and came back; that of a loss above ln K
        at most once per epoch, from the second after the warm-up on. step: steps done so far.
        loss, entropy: in nats, means over the steps since the last call. spread: `feature_spread`,
        NaN if it is not known.
        """
        log_k = math.log(out_dim)
        elapsed, self.last_step = step - self.last_step, step
        uniform = entropy > (1 - UNIFORM) * log_k
        constant = max(loss, entropy) < CONSTANT * log_k and not spread > DIVERSE
        flat = loss > (1 - FLAT) * log_k and not uniform and step > self.warmup_steps
        warnings = []
        for name, present, patience in (
            ("uniform", uniform, PATIENCE),
            ("point", constant or spread < SAME, PATIENCE),
            ("flat", flat, FLAT_STEPS),
        ):
            before = getattr(self, name)
            lasted = before + elapsed if present else 0
            setattr(self, name, lasted)
            if before < patience <= lasted:
                warnings.append(MESSAGES[name].format(loss=loss, entropy=entropy, log_k=log_k, spread=spread, steps=lasted))
        epoch = (step - 1) // steps_per_epoch
        if loss > ABOVE * log_k and not uniform and step > self.warmup_steps + steps_per_epoch and epoch > self.above:
            self.above = epoch
            warnings.append(MESSAGES["above"].format(loss=loss, log_k=log_k))
        return warnings

    def state_dict(self) -> dict[str, int]:
        """The state as plain values, for the checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over a state. ValueError if it is not one."""
        state = {"above": -1} | state  # version 0.1 did not count it
        if state.keys() != asdict(self).keys():
            raise ValueError(f"the monitor's state has {sorted(state)}: expected {sorted(asdict(self))}")
        for name, value in state.items():
            setattr(self, name, value)
