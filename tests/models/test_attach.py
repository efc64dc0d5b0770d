"""SimPool in models of timm and torchvision: where it is put, what stays, and the maps of such a model."""

from __future__ import annotations

import copy
import pickle
import re
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

from dino_simpool import attach_simpool, simpool_maps
from dino_simpool.models.pooling.attach import _grid
from dino_simpool.models.pooling.simpool import SimPool
from dino_simpool.synthetic import write_dataset

ROOT = Path(__file__).parents[2]
vit = partial(timm.create_model, "vit_tiny_patch16_224", img_size=(48, 64), depth=1, embed_dim=24, num_heads=2, num_classes=5)
eva = partial(timm.create_model, "vit_small_patch16_dinov3", img_size=64, depth=1, embed_dim=24, num_heads=2, num_classes=5)
torch_vit = partial(
    torchvision.models.VisionTransformer, 48, 16, num_layers=1, num_heads=2, hidden_dim=24, mlp_dim=8, num_classes=5
)
small_swin = partial(
    timm.create_model, "swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(1, 1), embed_dim=12, num_heads=(1, 2)
)
narrow_v2 = partial(timm.create_model, "resnetv2_50", layers=(1, 1), channels=(16, 24))
convnext = partial(torchvision.models.ConvNeXt, [CNBlockConfig(16, None, 2)], num_classes=5)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], tuple[int, int]]] = {
    # the model, the size of an image, the size of its map
    "timm ViT": (vit, (48, 64), (3, 4)),
    "timm ViT without class token": (partial(vit, class_token=False, global_pool="avg"), (48, 64), (3, 4)),
    "timm ViT with registers": (partial(vit, reg_tokens=3), (48, 64), (3, 4)),
    "timm ViT that averages all tokens": (partial(vit, global_pool="avg", pool_include_prefix=True), (48, 64), (3, 4)),
    "timm ViT with another attention pooling": (partial(vit, global_pool="map", class_token=False), (48, 64), (3, 4)),
    "timm EVA with registers": (eva, (64, 64), (4, 4)),
    "timm ResNet": (partial(timm.create_model, "test_resnet", num_classes=5), (64, 96), (2, 3)),
    "timm ResNetV2": (partial(narrow_v2, num_classes=5), (64, 96), (8, 12)),
    "timm ConvNeXt": (partial(timm.create_model, "test_convnext", num_classes=5), (64, 96), (2, 3)),
    "timm EfficientNet": (partial(timm.create_model, "test_efficientnet", num_classes=5), (64, 96), (2, 3)),
    "timm Swin": (partial(small_swin, num_classes=5), (64, 64), (8, 8)),
    "torchvision ViT": (torch_vit, (48, 48), (3, 3)),
    "torchvision ResNet": (partial(torchvision.models.resnet18, num_classes=5), (64, 96), (2, 3)),
    "torchvision ConvNeXt": (convnext, (32, 48), (8, 12)),
    "torchvision MobileNet": (partial(torchvision.models.mobilenet_v3_small, num_classes=5), (64, 96), (2, 3)),
}  # fmt: skip


def attached(name: str, **options: object) -> tuple[nn.Module, SimPool, Tensor]:
    """A model in evaluation mode with weights that all differ, its SimPool, and two images; in float64."""
    torch.manual_seed(0)
    make, size, _ = MODELS[name]
    model = make().double()
    pool = attach_simpool(model, **{"gamma": 2.0, **options})
    for parameter in (*pool.parameters(), *list(model.parameters())[-2:]):  # and the classifier: torchvision's ViT has zeros
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval(), pool, torch.randn(2, 3, *size, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_it_pools_what_was_pooled_before(name: str) -> None:
    """The classifier gets what SimPool makes of the map or the patches: seen by a hook, and computed again from them."""
    model, pool, images = attached(name)
    seen: dict[str, Tensor] = {}
    pool.register_forward_hook(lambda _, given, pooled: seen.update(given=given[0], pooled=pooled))
    logits = model(images)
    _, _, grid = MODELS[name]
    assert logits.shape == (2, 5) and seen["pooled"].shape == (2, pool.out_dim)
    tokens = seen["given"] if seen["given"].ndim == 3 else seen["given"].flatten(2).transpose(1, 2)
    assert tokens.shape == (2, grid[0] * grid[1], pool.out_dim)
    if hasattr(model, "forward_features"):
        features = model.forward_features(images)
        if features.ndim == 3:
            features = features[:, model.num_prefix_tokens :]
        elif features.shape[1] != pool.out_dim:
            features = features.permute(0, 3, 1, 2)
        if "EfficientNet" not in name:
            torch.testing.assert_close(seen["given"], features)
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    if name.endswith(" ResNet"):
        torch.testing.assert_close(logits, classifier(pool(tokens)))
    images[1] = 0  # the other image of the batch plays no part
    torch.testing.assert_close(model(images)[0], logits[0])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_states(name: str) -> None:
    """Every parameter of SimPool and the classifier learns; states, copies and pickles give the same logits."""
    model, pool, images = attached(name)
    logits = model(images)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 and p.dtype == torch.float64 for p in pool.parameters())
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    again, _, _ = attached(name)
    for parameter in again.parameters():
        parameter.data.zero_()
    again.load_state_dict(model.state_dict())
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(images), logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_all_other_weights_keep_their_names_and_modes(name: str) -> None:
    make, _, _ = MODELS[name]
    torch.manual_seed(1)
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("attn_pool.")}
    next(module for module in model.modules() if not list(module.children())).eval()
    modes = {key: module.training for key, module in model.named_modules() if "pool" not in key}
    attach_simpool(model)
    after = model.state_dict()
    assert len(after) == len(before) + 4 and all(torch.equal(after[key], value) for key, value in before.items())
    now = {key: module.training for key, module in model.named_modules()}
    assert {key: now[key] for key in modes} == modes and sum(now.values()) > sum(modes.values())


@pytest.mark.parametrize("name", MODELS)
def test_maps(name: str) -> None:
    """The attention of what SimPool is given, as a map; a batch of one gives the same, and training goes on as before."""
    model, pool, images = attached(name)
    pool.q.weight.data *= 1e12 if "MobileNet" in name else 1  # whose map is almost 0 before any training
    seen: list[Tensor] = []
    hook = pool.register_forward_hook(lambda _, given, pooled: seen.append(given[0]))
    model(images)
    hook.remove()
    model.train()
    maps = simpool_maps(model, images)
    assert maps.shape == (2, *MODELS[name][2]) and not maps.requires_grad and model.training
    expected = pool(seen[0], return_attention=True)[1].reshape(maps.shape)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(simpool_maps(model, images[1:]), maps[1:])
    assert maps.std() > 1e-4


def test_a_bright_corner_is_where_the_map_is() -> None:
    """The orientation of a map: of a model that attends to bright positions, on an image with one of them."""
    model = convnext()
    pool = attach_simpool(model)
    bright = torch.zeros(1, 3, 32, 48)
    bright[0, :, :4, -8:] = 1  # above, at the right: one row, two columns of 8 x 12
    seen: list[Tensor] = []
    pool.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    simpool_maps(model, bright)
    x = pool.norm(seen[0].flatten(2).transpose(1, 2))[0]
    with torch.no_grad():  # keys along what distinguishes that corner
        direction = x.view(8, 12, -1)[0, 10:].mean(0) - x.mean(0)
        pool.k.weight.copy_(torch.eye(16))
        query = seen[0].flatten(2).mean(2)[0]
        pool.q.weight.copy_(100 * direction[:, None] * query[None] / query.square().sum())
    [found] = simpool_maps(model, bright)
    assert found[0, 10:].sum() > 0.9


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.avgpool, self.fc = nn.Conv2d(3, 8, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(torch.cat([self.avgpool(x), self.avgpool(-x)], 1).flatten(1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 4)),
            "Sequential: there is no global pooling that SimPool can replace: give a ViT",
        ),
        (lambda: nn.Sequential(nn.Linear(3, 3)), "a black image does not pass"),
        (partial(timm.create_model, "test_resnet", global_pool="", num_classes=0), "there is no global pooling"),
        (partial(timm.create_model, "test_resnet", global_pool="catavgmax"), "there is no global pooling"),
        (partial(timm.create_model, "deit_tiny_distilled_patch16_224", depth=1, img_size=32), "used 0 times in a pass"),
        (partial(timm.create_model, "mixer_s32_224"), "there is no global pooling"),
        (torchvision.models.mobilenet_v2, "there is no global pooling"),
        (partial(torchvision.models.segmentation.lraspp_mobilenet_v3_large, weights_backbone=None), "it returns a OrderedDict"),
        (Twice, "there is no global pooling"),
    ],
)
def test_what_does_not_fit_is_refused_and_unchanged(make: Callable[[], nn.Module], words: str) -> None:
    model = make()
    keys, text = list(model.state_dict()), str(model)
    with pytest.raises(ValueError, match=words) as error:
        attach_simpool(model)
    assert "\n" not in str(error.value) and list(model.state_dict()) == keys and str(model) == text
    assert all(not module._forward_hooks for module in model.modules())


def test_once_only_and_with_options_that_fit() -> None:
    model = MODELS["timm ResNet"][0]()
    with pytest.raises(ValueError, match="gamma"):
        attach_simpool(model, gamma=-1.0)
    with pytest.raises(ValueError, match="has 0 SimPools"):
        simpool_maps(model, torch.zeros(1, 3, 64, 64))
    attach_simpool(model)
    with pytest.raises(ValueError, match="ResNet has a SimPool already"):
        attach_simpool(model)


@pytest.mark.parametrize(
    ("tokens", "height", "width", "grid"),
    [(196, 224, 224, (14, 14)), (12, 48, 64, (3, 4)), (2, 47, 16, (2, 1)), (1, 16, 16, (1, 1)), (6, 100, 70, (3, 2))],
)
def test_rows_and_columns(tokens: int, height: int, width: int, grid: tuple[int, int]) -> None:
    assert _grid(tokens, height, width) == grid


def test_tokens_that_are_no_grid() -> None:
    with pytest.raises(ValueError, match="13 tokens are no grid over an image of 32 x 32"):
        _grid(13, 32, 32)


def test_the_options_arrive() -> None:
    pool = attach_simpool(vit(), gamma=1.25, num_heads=2, beta=True, min_over="batch")
    assert (pool.gamma, pool.num_heads, pool.min_over) == (1.25, 2, "batch") and pool.beta is not None


def test_the_example_trains_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few small images: a loss for each epoch, a picture with three rows that differ, and a state that can be loaded."""
    example = runpy.run_path(str(ROOT / "examples/attach_simpool.py"))
    write_dataset(str(tmp_path / "data"), seed=1, train_per_class=8, val_per_class=2, size=32)
    example["main"]([str(tmp_path / "out"), "--data", str(tmp_path / "data"), "--epochs", "3", "--size", "32"])
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss ([\d.]+), val [\d.]+ %", capsys.readouterr().out)]
    assert len(losses) == 3 and losses[2] < losses[0]
    picture = np.asarray(Image.open(tmp_path / "out/maps.png")).astype(int)
    assert picture.shape == (3 * 128, 8 * 130, 3)
    images, untrained, trained = np.split(picture, 3)
    for one, other in ((images, untrained), (images, trained), (untrained, trained)):
        assert np.abs(one - other).mean() > 3
    model = timm.create_model("resnet10t", num_classes=10, channels=(32, 48, 64, 96), output_stride=8)
    attach_simpool(model)
    model.load_state_dict(torch.load(tmp_path / "out/classifier.pth", weights_only=True))
