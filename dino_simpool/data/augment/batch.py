"""The color operations of the recipe on a batch of views, each with its own parameters.

The same operations with the same numbers as pixels.apply_colors, on any device, but in float32 and
without rounding to 8 bits after each one. An operation that a view skips becomes one that changes
nothing (factor 1, kernel [0, 1, 0]), so there are no branches and no waiting for the device, and
torch.compile fuses the steps into few kernels.

Color jitter applies four operations in any order. Three of them mix a view with black, its mean
gray level or its grayscale version. The order is kept by three such mixtures before the hue and
three after it, of which three are used. Letters: R views (rows) of one size, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dino_simpool.data.augment.draw import JITTER, ViewDraw, blur_kernel
from dino_simpool.data.augment.pixels import GRAY

_FLIP, _FACTORS, _ORDER, _GRAYSCALE, _SOLARIZE, _KERNEL = 0, slice(1, 5), slice(5, 9), 9, 10, slice(11, None)
_HUE = JITTER.index("hue")
_NONE = -1.0
"""In `order`: the view has no color jitter."""


def pack(draw: ViewDraw, *, radius: int) -> Tensor:
    """The random numbers of V views without their boxes: (V, 12 + radius) float32.

    radius: of the widest blur, in pixels; its columns are the middle and right half of its kernel.
    """
    rows = np.zeros((len(draw.flip), _KERNEL.start + 1 + radius), np.float32)
    rows[:, _FLIP], rows[:, _GRAYSCALE], rows[:, _SOLARIZE] = draw.flip, draw.grayscale, draw.solarize
    rows[:, _FACTORS] = draw.factors
    rows[:, _ORDER] = np.where(draw.jitter[:, None], draw.order, _NONE)
    rows[:, _KERNEL.start] = 1
    for row, sigma in zip(rows, draw.sigma.tolist(), strict=True):
        if sigma:
            kernel = blur_kernel(sigma)
            half = kernel[len(kernel) // 2 :]
            row[_KERNEL.start : _KERNEL.start + len(half)] = half
    return torch.from_numpy(rows)


def apply_colors(views: Tensor, parameters: Tensor) -> Tensor:
    """Flip, jitter, grayscale, blur and solarize each view: (R, 3, S, S) float32 in 0..255.

    views: the same shape and range, any dtype.   parameters: (R, 12 + radius), rows of `pack`.
    """
    x = views.float()
    columns = parameters[:, :, None, None, None]
    x = torch.where(columns[:, _FLIP] > 0, x.flip(3), x)
    order, hue_place = parameters[:, _ORDER], (parameters[:, _ORDER] == _HUE).float().argmax(1)
    for place in range(3):
        x = _mix(x, torch.where(place < hue_place, order[:, place], _NONE), parameters[:, _FACTORS])
    turned = _turn_hue(x, parameters[:, _FACTORS][:, _HUE, None, None])
    x = torch.where((order[:, :1, None, None] != _NONE), turned, x)
    for place in range(1, 4):
        x = _mix(x, torch.where(place > hue_place, order[:, place], _NONE), parameters[:, _FACTORS])
    x = torch.where(columns[:, _GRAYSCALE] > 0, _gray(x), x)
    x = _blur(x, parameters[:, _KERNEL])
    return torch.where((columns[:, _SOLARIZE] > 0) & (x >= 128), 255 - x, x)


@cache
def compiled_colors() -> Callable[[Tensor, Tensor], Tensor]:
    """`apply_colors` with torch.compile, called once because each call takes a millisecond."""
    return torch.compile(apply_colors, dynamic=False)


def normalize(views: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Values in 0..255 -> 0..1, minus mean, divided by std; (R, S, S, 3) in the same layout."""
    # Fake tensors (FakeTensorMode) must neither get into the cache nor meet real ones from it.
    along_rows = _along_rows if type(torch.empty(0)) is Tensor else _along_rows.__wrapped__
    scale, shift = along_rows(mean, std, views.shape[2], views.device)
    return (views.flatten(2).float() * scale).add_(shift).to(dtype).view_as(views)


@cache
def _along_rows(mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift of a row of pixels, each (3 * width,).

    Broadcasting three values takes five times as long on a CPU. Cached, because copying to the
    device would wait for all work queued there.
    """
    scale = torch.tensor([1 / (255 * s) for s in std])
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
    return scale.repeat(width).to(device), shift.repeat(width).to(device)


def _gray(x: Tensor) -> Tensor:
    return sum(weight * x[:, channel, None] for channel, weight in enumerate(GRAY))  # type: ignore[return-value]


def _mix(x: Tensor, operation: Tensor, factors: Tensor) -> Tensor:
    """Apply brightness, contrast, saturation or nothing (_NONE) to each view; operation: (R,)."""
    operation = operation[:, None, None, None]
    is_saturation, is_contrast = (operation == JITTER.index(name) for name in ("saturation", "contrast"))
    gray = _gray(x)
    level = (gray.mean((2, 3), keepdim=True) + 0.5).floor()
    other = gray * is_saturation + level * is_contrast
    chosen = factors.gather(1, operation.flatten(1).clamp(min=0).long())[:, :, None, None]
    factor = torch.where(operation == _NONE, 1.0, chosen)
    return (x * factor + other * (1 - factor)).clamp(0, 255)


def _turn_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue of each view by its shift (R, 1, 1), in turns, by way of HSV."""
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    divisor = chroma.clamp(min=1e-6)
    sixths = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sixths = torch.where(value == red, (green - blue) / divisor, sixths)
    hue = sixths + 6 * (shift * 255).trunc() / 256  # in steps of an 8-bit hue, as published
    # Each channel is value minus chroma times a trapezoid over the hue circle, 1/3 turn apart.
    places = [(offset + hue) % 6 for offset in (5, 3, 1)]
    return torch.stack([value - chroma * torch.minimum(place, 4 - place).clamp(0, 1) for place in places], 1)


def _blur(x: Tensor, half: Tensor) -> Tensor:
    """Filter each view along both axes; half: (R, r + 1), from the middle of its kernel."""
    rows, channels, height, width = x.shape
    radius = half.shape[1] - 1
    kernel = torch.cat([half.flip(1)[:, :-1], half], 1).repeat_interleave(channels, 0)
    planes = F.pad(x.reshape(1, rows * channels, height, width), (radius,) * 4, mode="replicate")
    planes = F.conv2d(planes, kernel[:, None, None, :], groups=rows * channels)
    planes = F.conv2d(planes, kernel[:, None, :, None], groups=rows * channels)
    return planes.view(rows, channels, height, width)
