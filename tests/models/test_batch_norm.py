"""BatchNorm with the channels last on a CPU: against float64, and where torch's own layer is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from golden.load import assert_close
from torch import Tensor, nn

from dino_simpool.config import ModelConfig
from dino_simpool.models.batch_norm import BatchNorm
from dino_simpool.models.encoder import build_encoder

LAST = torch.channels_last


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    """Values that are not centered and gradients that follow them: sums of large numbers, which a long addition gets wrong."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) + torch.linspace(-3, 3, shape[1])[:, None, None]
    gradient = torch.randn(shape, generator=generator) + x + 1
    return x.to(memory_format=LAST), gradient.to(memory_format=LAST)


def layer(channels: int) -> BatchNorm:
    norm = BatchNorm(channels, eps=1e-3, momentum=0.3)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias)
    return norm


@pytest.mark.parametrize("shape", [(64, 2, 112, 112), (5, 3, 7, 4), (1, 6, 9, 2), (2, 4, 1, 2), (3, 2, 5, 5), (4, 8, 1, 1)])
def test_statistics_output_and_gradients_are_those_of_float64(shape: tuple[int, int, int, int]) -> None:
    """Written out in float64: relative to their largest value all are right to six digits. torch's layer gives four here."""
    x, gradient = inputs(*shape)
    norm = layer(shape[1])
    x.requires_grad_()
    output = norm(x)
    output.backward(gradient)
    values, weight, bias, g = (t.detach().double() for t in (x, norm.weight, norm.bias, gradient))
    over, count = (0, 2, 3), values.numel() // shape[1]
    mean, variance = values.mean(over, keepdim=True), values.var(over, correction=0, keepdim=True)
    deviation = (variance + 1e-3).sqrt()
    z, of_bias = (values - mean) / deviation, g.sum(over, keepdim=True)
    of_weight = (g * z).sum(over, keepdim=True)
    expected = {
        "output": (output, z * weight[:, None, None] + bias[:, None, None]),
        "running mean": (norm.running_mean, 0.3 * mean.flatten()),
        "running variance": (norm.running_var, 0.7 + 0.3 * variance.flatten() * count / (count - 1)),
        "gradient of the input": (x.grad, weight[:, None, None] / deviation * (g - of_bias / count - z * of_weight / count)),
        "gradient of the weight": (norm.weight.grad, of_weight.flatten()),
        "gradient of the bias": (norm.bias.grad, of_bias.flatten()),
    }
    for name, (ours, exact) in expected.items():
        assert ours is not None
        scale = float(max(exact.abs().max(), g.abs().mean()))  # a channel of two values has gradients of rounding noise only
        assert_close(ours.detach(), exact, 0, 2e-6 * scale, name)
    assert norm.num_batches_tracked == 1
    assert output.is_contiguous(memory_format=LAST) and x.grad.is_contiguous(memory_format=LAST)


def test_elsewhere_it_is_torchs_layer() -> None:
    """Contiguous, in float64, in evaluation mode, with a contiguous gradient, and the refusal of one value per channel."""
    x, gradient = inputs(4, 3, 5, 6)
    for case in (x.contiguous(), x.double()):
        ours, theirs = layer(3).to(case.dtype), nn.BatchNorm2d(3, eps=1e-3, momentum=0.3).to(case.dtype)
        theirs.load_state_dict(ours.state_dict())
        for _ in range(2):
            assert torch.equal(ours(case), theirs(case))
            assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
            ours.eval(), theirs.eval()
    norm, twin = layer(3), layer(3)
    twin.load_state_dict(norm.state_dict())
    ours, same = norm(x), twin(x)
    ours.backward(gradient), same.backward(gradient.contiguous())
    assert norm.weight.grad is not None and twin.weight.grad is not None
    assert_close(norm.weight.grad, twin.weight.grad, 1e-6, 1e-6)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(3)(torch.zeros(1, 3, 1, 1).to(memory_format=LAST))


def test_every_resnet_has_it_and_is_exact_with_the_channels_last() -> None:
    """A training pass of a ResNet with a wide input: running statistics against float64."""
    encoder = build_encoder(ModelConfig("resnet18", pool="gap", width=4, depth=(1, 1))).train()
    assert not [name for name, m in encoder.named_modules() if type(m) is nn.BatchNorm2d]
    exact = copy.deepcopy(encoder).double()
    images = torch.randn(16, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    encoder.to(memory_format=LAST)(images.to(memory_format=LAST))
    exact(images.double())
    for (name, ours), theirs in zip(encoder.named_buffers(), exact.buffers(), strict=True):
        assert_close(ours, theirs, 2e-6, 1e-6, name)
