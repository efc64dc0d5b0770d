"""Encoders of every family and pooling, positions and sizes; head, student and teacher."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from golden.load import GOLDEN_POSITIONS, assert_close, load, meta
from timm.layers import DropPath
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from dino_simpool.config import ModelConfig
from dino_simpool.dino.model import DinoHead, DinoModel, make_teacher
from dino_simpool.models import encoder as encoder_module
from dino_simpool.models import stream
from dino_simpool.models.encoder import Encoder, build_encoder, position_matrix
from dino_simpool.models.pooling import build_pool
from dino_simpool.models.pooling.simpool import as_tokens
from dino_simpool.models.trunk import SHORT_NAMES, PatchConv, build_trunk, find_arch

TINY: dict[str, dict[str, Any]] = {
    "vit": {"arch": "vit_tiny", "width": 32, "heads": 2, "depth": 2, "patch_size": 4, "image_size": 32},
    "vit with registers": {
        "arch": "vit_small_patch14_reg4_dinov2",
        "width": 32,
        "heads": 2,
        "depth": 2,
        "patch_size": 14,
        "image_size": 56,
    },
    "resnet": {"arch": "resnet18", "width": 8, "depth": (1, 1, 1), "stem": "small"},
    "resnet with a deep stem": {"arch": "resnet50d", "width": 8, "depth": (1, 1, 1, 1)},
    "convnext": {"arch": "convnext_tiny", "width": 8, "depth": (1, 2, 1), "stem": "small"},
    "convnext with an overlapping stem": {"arch": "convnext_atto_ols", "width": 8, "depth": 1},
}
POOLS: dict[str, dict[str, Any]] = {
    "simpool": {},
    "simpool gamma": {"gamma": 1.25},
    "cls": {"pool": "cls"},
    "gap": {"pool": "gap"},
}
COMBINATIONS = [(trunk, pool) for trunk in TINY for pool in POOLS if pool != "cls" or "vit" in trunk]


def tiny(trunk: str = "vit", pool: str = "simpool", **options: Any) -> ModelConfig:
    return ModelConfig(**{**TINY[trunk], **POOLS[pool], **options})


def grid_of(encoder: nn.Module, height: int, width: int) -> tuple[int, int]:
    if encoder.config.is_vit:
        return height // encoder.config.patch_size, width // encoder.config.patch_size
    reduction = {"small": 4}.get(encoder.config.stem, 32)
    return -(-height // reduction), -(-width // reduction)


@pytest.mark.parametrize(("trunk", "pool"), COMBINATIONS)
def test_contract(trunk: str, pool: str) -> None:
    """Shapes at several sizes, attention with sum 1, finite values, gradients everywhere."""
    torch.manual_seed(0)
    encoder = build_encoder(tiny(trunk, pool)).double().eval()
    assert encoder.embed_dim == encoder.pool.out_dim == build_pool(encoder.config, encoder.trunk.num_features).out_dim
    for size in ((2, 64, 64), (1, 64, 96), (1, 96, 64)):
        images = torch.randn(size[0], 3, *size[1:], dtype=torch.float64)
        grid = grid_of(encoder, *size[1:])
        features, tokens = encoder(images), encoder.tokens(images)
        assert features.shape == (size[0], encoder.embed_dim)
        assert tokens.shape == (size[0], grid[0] * grid[1], encoder.trunk.num_features)
        x, found = encoder.pool_input(images)
        pooled, weights = encoder.pool(x, return_attention=True)
        assert found == grid and pooled.shape == (size[0], encoder.pool.out_dim) and torch.equal(encoder.pool(x), pooled)
        assert features.isfinite().all() and tokens.isfinite().all()
        torch.testing.assert_close(encoder(images[:1]), features[:1])
        if weights is None and pool != "cls":
            with pytest.raises(ValueError, match="has no attention maps"):
                encoder.attention(images)
            continue
        attention = encoder.attention(images)
        assert attention.shape == (size[0], *grid) and (attention >= 0).all()
        assert_close(attention.detach().sum((1, 2)), np.ones(size[0]), 0, 1e-5)
        heads = encoder.attention(images, per_head=True)
        assert heads.shape[0] == size[0] and heads.shape[2:] == grid
        assert_close(heads.detach().sum((2, 3)), np.ones(heads.shape[:2]), 0, 1e-5)
    encoder(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


class WideningPool(nn.Module):
    """Mean and maximum side by side: twice as wide as the trunk, without attention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = 2 * dim

    def forward(self, x: Tensor, return_attention: bool = False) -> Any:
        pooled = torch.cat([as_tokens(x).mean(1), as_tokens(x).amax(1)], 1)
        return (pooled, None) if return_attention else pooled


@pytest.mark.parametrize("trunk", TINY)
def test_the_norm_fits_a_pooling_that_widens(trunk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "build_pool", lambda cfg, dim: WideningPool(dim))
    images = torch.randn(2, 3, 64, 96)
    orders = ["pool_then_norm"] + ["norm_then_pool"] * ("vit" in trunk)
    for order in orders:
        encoder = build_encoder(tiny(trunk, norm_order=order)).eval()
        dim = encoder.trunk.num_features
        assert encoder.embed_dim == 2 * dim and encoder(images).shape == (2, 2 * dim)
        if trunk.startswith("resnet"):
            assert isinstance(encoder.norm, nn.Identity)
            continue
        plain = build_encoder(tiny(trunk)).norm
        assert type(encoder.norm) is type(plain) and encoder.norm.eps == plain.eps == 1e-6
        if order == "norm_then_pool":
            assert encoder.norm.normalized_shape == (dim,)
        else:
            pooled = encoder.pool(encoder.tokens(images))
            torch.testing.assert_close(encoder(images), F.layer_norm(pooled, (2 * dim,), eps=1e-6))


@pytest.mark.parametrize("per_head", [False, True])
def test_a_pooling_without_attention_is_refused(per_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "build_pool", lambda cfg, dim: WideningPool(dim))
    encoder = build_encoder(tiny("vit", "gap"))
    with pytest.raises(ValueError, match=r"^model\.pool gap has no attention maps: use one that has, such as simpool$"):
        encoder.attention(torch.randn(1, 3, 32, 32), per_head=per_head)


@pytest.mark.parametrize(("trunk", "pool"), COMBINATIONS)
def test_features_are_the_pooled_tokens(trunk: str, pool: str) -> None:
    """Features can be computed from tokens(), and the weights are those of attention()."""
    encoder, images = build_encoder(tiny(trunk, pool)).eval(), torch.randn(2, 3, 64, 96)
    if pool == "cls":
        return  # tokens() have no class token
    pooled, attention = encoder.pool(encoder.tokens(images), return_attention=True)
    torch.testing.assert_close(encoder.norm(pooled), encoder(images))
    if attention is not None:
        torch.testing.assert_close(attention, encoder.attention(images).flatten(1))


@pytest.mark.parametrize("pool", ["simpool", "gap", "cls"])
def test_norm_order(pool: str) -> None:
    """norm_then_pool pools normalized tokens; for the class token both orders are the same."""
    after = build_encoder(tiny("vit", pool)).eval()
    nn.init.normal_(after.norm.weight)
    before = build_encoder(tiny("vit", pool, norm_order="norm_then_pool")).eval()
    before.load_state_dict(after.state_dict())
    images = torch.randn(2, 3, 32, 32)
    if pool == "cls":
        torch.testing.assert_close(before(images), after(images))
    else:
        torch.testing.assert_close(before(images), before.pool(after.norm(after.tokens(images))))
        torch.testing.assert_close(before.tokens(images), after.norm(after.tokens(images)))


def test_no_class_token_without_class_token_pooling() -> None:
    for pool in ("simpool", "gap"):
        encoder = build_encoder(tiny("vit", pool))
        assert encoder.trunk.cls_token is None
        assert encoder.trunk.pos_embed.shape == (1, 64, 32)
    assert build_encoder(tiny("vit", "cls")).trunk.pos_embed.shape == (1, 65, 32)


@pytest.mark.parametrize(
    ("arch", "options", "count"),
    [
        ("vit_tiny", {"pool": "cls"}, 5_524_416),
        ("vit_tiny", {}, 5_598_144),
        ("vit_small", {"pool": "cls"}, 21_665_664),
        ("vit_small", {}, 21_960_576),
        ("vit_small", {"gamma": 1.25, "beta": True}, 21_960_577),
        ("vit_base", {"pool": "cls"}, 85_798_656),
        ("vit_base", {}, 86_978_304),
        ("resnet18", {"pool": "gap"}, 11_176_512),
        ("resnet18", {}, 11_701_824),
        ("resnet50", {"pool": "gap"}, 23_508_032),
        ("resnet50", {}, 31_900_736),
        ("convnext_small", {"pool": "gap"}, 49_454_688),
        ("convnext_small", {}, 50_635_872),
    ],
)
def test_parameter_counts_of_the_paper(arch: str, options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(ModelConfig(arch, **options))
    assert sum(p.numel() for p in encoder.parameters()) == count


@pytest.mark.parametrize(
    ("dim", "out_dim", "batch_norm", "count"),
    [(384, 65536, False, 22_352_128), (2048, 60000, True, 24_345_440), (768, 65536, False, 23_138_560)],
)
def test_parameter_counts_of_the_head(dim: int, out_dim: int, batch_norm: bool, count: int) -> None:
    with torch.device("meta"):
        head = DinoHead(dim, out_dim, batch_norm=batch_norm)
    assert sum(p.numel() for p in head.parameters()) == count


def test_one_question_whether_it_is_a_vit() -> None:
    """ModelConfig.is_vit agrees with find_arch for every name that it knows."""
    seen = {"vit": 0, "resnet": 0, "convnext": 0}
    for name in [*timm.list_models(), *SHORT_NAMES]:
        try:
            family = find_arch(name)[0]
        except ValueError:
            continue
        seen[family] += 1
        assert ModelConfig(name, pool="gap").is_vit == (family == "vit"), name
    assert min(seen.values()) > 20


@pytest.mark.parametrize("arch", sorted(timm.list_models(module="convnext")))
def test_the_norm_of_every_convnext_is_that_of_timm(arch: str) -> None:
    """The layer that timm applies to pooled maps, also where it is no LayerNorm (convnext_zepto_rms, convnext_atto_rms)."""
    with torch.device("meta"):
        trunk, make_norm = build_trunk(ModelConfig(arch, pool="gap"))
        head = timm.create_model(arch, num_classes=0, head_norm_first=False, head_hidden_size=None).head.norm
    ours, theirs = make_norm(trunk.num_features).to_empty(device="cpu"), head.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator)
        ours.get_parameter(name).data = parameter.data
    features = torch.randn(2, trunk.num_features, generator=generator) + 1
    torch.testing.assert_close(ours(features), theirs(features[:, :, None, None]).flatten(1))


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("vit_smal", "vit_small"),
        ("resnet19", "resnet1"),
        ("resnet", r"did you mean resnet\d+\?"),
        ("swin_tiny_patch4_window7_224", "family swin_transformer: allowed are"),
        ("swin_tiny_patch4_window7_224.ms_in1k", "family swin_transformer: allowed are"),
        ("vit_relpos_small_patch16_224", "family vision_transformer_relpos: allowed are"),
        ("deit_small_distilled_patch16_224", "ViTs with one class token"),
        (
            "vit_small_patch16_224.dino",
            "the tag dino names weights of others, .* give the architecture, vit_small_patch16_224$",
        ),
        ("hf-hub:timm/resnet50.a1_in1k", "give the architecture, resnet50$"),
        ("", "is empty, which timm does not know: give one of vit_tiny"),
        ("my_own_network", "timm does not know: give one of vit_tiny, vit_small"),
    ],
)
def test_unknown_architectures_are_refused(arch: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        find_arch(arch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "vit_small_patch8_224"}, "patch_size 8"),
        ({"arch": "vit_tiny", "width": 100, "heads": 3}, "divisor"),
        ({"arch": "vit_tiny", "heads": 5}, "divisor"),
        ({"arch": "vit_tiny", "depth": (1, 2)}, "stages"),
        ({"arch": "resnet18d", "width": 9}, "even"),
        ({"arch": "resnet18", "depth": (1,)}, "two blocks"),
        ({"arch": "convnext_tiny", "depth": (1, 1, 1, 1, 1)}, "one to four"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_encoder(ModelConfig(**options))


@pytest.mark.parametrize("pool", ["simpool gamma", "gap"])
def test_maps_of_one_position_are_pooled(pool: str) -> None:
    """It is `try_sizes` that refuses such a size."""
    encoder = build_encoder(ModelConfig("resnet18", width=8, **POOLS[pool])).eval()
    features, attention = encoder(torch.randn(2, 3, 32, 32)), encoder.attention(torch.randn(2, 3, 32, 64))
    assert features.shape == (2, 64) and features.isfinite().all()
    assert attention.shape == (2, 1, 2)
    assert torch.equal(encoder.attention(torch.randn(2, 3, 32, 32)), torch.ones(2, 1, 1))


def test_images_smaller_than_a_patch_are_refused() -> None:
    encoder = build_encoder(tiny("vit"))
    with pytest.raises(ValueError, match="smaller than a patch"):
        encoder(torch.randn(1, 3, 3, 32))
    assert encoder(torch.randn(1, 3, 4, 4)).shape == (1, 32)


def test_pixels_beyond_the_last_patch_are_dropped() -> None:
    encoder, images = build_encoder(tiny("vit")).eval(), torch.randn(1, 3, 35, 33)
    assert torch.equal(encoder(images), encoder(images[..., :32, :32]))


def test_small_images_have_small_cnns() -> None:
    """A third of a million parameters with an 8 x 8 map at 32 pixels."""
    encoder = build_encoder(ModelConfig("resnet18", width=24, depth=(2, 2, 2), stem="small", image_size=32))
    assert 300_000 < sum(p.numel() for p in encoder.parameters()) < 420_000
    assert encoder.tokens(torch.randn(1, 3, 32, 32)).shape == (1, 64, 96)
    assert isinstance(encoder.trunk.maxpool, nn.Identity)
    assert encoder.trunk.conv1.stride == (1, 1)


def test_narrow_resnets_have_right_gradients_with_the_channels_last() -> None:
    """No strided 1 x 1 convolution of torch is left: on many processors it is wrong there."""
    encoder = build_encoder(ModelConfig("resnet18", pool="gap", width=4, depth=(1, 1, 1), stem="small"))
    strided = [m for m in encoder.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride == (2, 2)]
    assert [type(m).__name__ for m in strided] == ["SubsampledConv"] * 2 and [m.in_channels for m in strided] == [4, 8]
    images = torch.randn(3, 3, 15, 16)
    exact = copy.deepcopy(encoder).double()
    for model, inputs in ((exact, images.double()), (encoder.to(memory_format=torch.channels_last), images)):
        model(inputs.to(memory_format=torch.channels_last)).square().sum().backward()
    for (name, p), q in zip(encoder.named_parameters(), exact.parameters(), strict=True):
        assert_close(p.grad, q.grad, 1e-3, 1e-3 * float(q.grad.abs().max()), name)
    x = torch.randn(2, 8, 5, 6)
    assert_close(strided[1](x).detach(), F.conv2d(x, strided[1].weight, stride=2).detach(), 1e-5, 1e-5)


def test_initialisation() -> None:
    """Truncated normal of 0.02 for ViT and ConvNeXt, that of nn.Linear for ResNet."""
    torch.manual_seed(0)
    vit, resnet, convnext = (build_encoder(tiny(name)) for name in ("vit", "resnet", "convnext"))
    for encoder, deviation in ((vit, 0.02), (convnext, 0.02), (resnet, (3 * 32) ** -0.5)):
        assert encoder.pool.q.weight.std().item() == pytest.approx(deviation, rel=0.15)
        assert encoder.pool.k.weight.std().item() == pytest.approx(deviation, rel=0.15)
    assert all((block.bn2.weight == 1).all() for stage in (resnet.trunk.layer1, resnet.trunk.layer3) for block in stage)
    token = build_encoder(ModelConfig("vit_tiny", pool="cls", width=384, depth=1)).trunk.cls_token
    assert token.std().item() == pytest.approx(0.02, rel=0.2)
    assert vit.trunk.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


POSITIONS = load("open_pos_embed")


@pytest.mark.parametrize("case", ["p16_224", "p8_64"])
@pytest.mark.parametrize("mode", ["simpool", "official"])
@pytest.mark.parametrize("precision", ["64", ""])
def test_positions_match_the_published_ones(case: str, mode: str, precision: str) -> None:
    """At all sizes of the golden arrays, also the native one, where the SimPool ViT resampled on that CPU."""
    settings, dtype = meta(POSITIONS, case), torch.float64 if precision else torch.float32
    rule = GOLDEN_POSITIONS[mode]
    encoder = build_encoder(
        ModelConfig(
            "vit_tiny", width=32, heads=1, depth=1, image_size=settings["img"], patch_size=settings["patch"], pos_interp=rule
        )
    )
    stored = torch.from_numpy(POSITIONS[f"{case}/in/pos_patch"])[0].to(dtype)
    for height, width in settings["sizes"]:
        grid = (height // settings["patch"], width // settings["patch"])
        ours = encoder._positions(stored, grid)
        reference = POSITIONS[f"{case}/out{precision}/{mode}_{height}x{width}"][0, mode == "official" :]
        assert_close(ours, reference, **({"rtol": 1e-6, "atol": 1e-8} if precision else {"rtol": 1e-4, "atol": 1e-5}))


def test_positions_by_size_are_interpolation_from_grid_to_grid() -> None:
    """The default: unchanged at the native grid, else antialiased bicubic, axes in order."""
    encoder = build_encoder(tiny("vit")).double()
    stored = encoder.trunk.pos_embed[0]
    assert encoder._positions(stored, (8, 8)) is stored
    for grid in ((4, 12), (12, 4), (16, 16), (1, 1)):
        expected = F.interpolate(stored.T.reshape(1, 32, 8, 8), size=grid, mode="bicubic", antialias=True)
        torch.testing.assert_close(encoder._positions(stored, grid), expected.flatten(2)[0].T)


@pytest.mark.parametrize("pool", ["simpool", "cls"])
@pytest.mark.parametrize("rule", ["size", "dino", "dino_legacy", "dino_always"])
def test_positions_at_the_native_grid_are_the_stored_ones(rule: str, pool: str) -> None:
    """To the last bit, also for pixels that are not square; dino_always alone resamples, by 8.1 / 8."""
    encoder = build_encoder(tiny("vit", pool, pos_interp=rule)).double().eval()
    prefix = encoder.trunk.num_prefix_tokens
    stored = encoder.trunk.pos_embed[0, prefix:]
    for height, width in ((32, 32), (32, 35), (34, 33)):
        images = torch.randn(2, 3, height, width, dtype=torch.float64)
        patches = encoder.trunk.patch_embed(images[..., :32, :32]).flatten(1, 2)
        ours = encoder._embed(images)[0][:, prefix:]
        if rule == "dino_always":
            published = F.interpolate(stored.T.reshape(1, 32, 8, 8), scale_factor=(8.1 / 8, 8.1 / 8), mode="bicubic")
            torch.testing.assert_close(ours, patches + published.flatten(2)[0].T)
            assert (published.flatten(2)[0].T - stored).square().mean() > 1e-4 * stored.square().mean()
        else:
            assert torch.equal(ours, patches + stored)


def test_dino_and_dino_always_differ_at_the_native_grid_only() -> None:
    first, other = (build_encoder(tiny("vit", pos_interp=rule)) for rule in ("dino", "dino_always"))
    for grid in ((4, 4), (8, 7), (16, 4), (9, 9), (8, 8)):  # 16 x 4 has as many positions as 8 x 8
        same = torch.equal(first._positions(first.trunk.pos_embed[0], grid), other._positions(first.trunk.pos_embed[0], grid))
        assert same == (grid != (8, 8))


@pytest.mark.parametrize("rule", ["size", "dino", "dino_legacy"])
def test_positions_of_a_turned_image_are_turned(rule: str) -> None:
    stored = torch.randn(6, 6, 3, dtype=torch.float64)
    there, back = (position_matrix((6, 6), grid, rule, device=stored.device, dtype=stored.dtype) for grid in ((3, 5), (5, 3)))
    turned = back @ stored.transpose(0, 1).reshape(36, 3)
    torch.testing.assert_close((there @ stored.view(36, 3)).view(3, 5, 3), turned.view(5, 3, 3).transpose(0, 1))


def test_positions_of_the_early_published_code() -> None:
    """Scale (h + 0.1) / sqrt(rows + 1)."""
    stored = torch.randn(1, 3, 14, 14, dtype=torch.float64)
    expected = F.interpolate(stored, scale_factor=(6.1 / 197**0.5, 10.1 / 197**0.5), mode="bicubic")
    matrix = position_matrix((14, 14), (6, 10), "dino_legacy", device=stored.device, dtype=stored.dtype)
    torch.testing.assert_close(matrix @ stored.flatten(2)[0].T, expected.flatten(2)[0].T)
    with pytest.raises(ValueError, match="40 x 40"):
        position_matrix((14, 14), (40, 40), "dino_legacy", device=stored.device, dtype=stored.dtype)


def export(encoder: Encoder, images: Tensor, *, strict: bool) -> Tensor:
    return torch.export.export(encoder, (images,), strict=strict).module()(images)


def fake(encoder: Encoder, images: Tensor) -> None:
    """Pass fake images through fake weights, which fails if a real tensor meets them."""
    mode = FakeTensorMode()
    state = {name: mode.from_tensor(value) for name, value in encoder.state_dict().items()}
    with mode:
        features = torch.func.functional_call(encoder, state, (mode.from_tensor(images),))
        assert isinstance(features, FakeTensor) and features.shape == (len(images), encoder.embed_dim)


TRACERS: dict[str, Callable[[Encoder, Tensor], Tensor | None]] = {
    "export": lambda encoder, images: export(encoder, images, strict=False),
    "strict export": lambda encoder, images: export(encoder, images, strict=True),
    "compile": lambda encoder, images: torch.compile(encoder, backend="aot_eager", fullgraph=True)(images),
    "trace": lambda encoder, images: torch.jit.trace(encoder, (images,), check_trace=False)(images),
    "fake": fake,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("rule", ["size", "dino"])
@pytest.mark.parametrize("tracer", TRACERS)
def test_tracing_does_not_change_later_results(tracer: str, rule: str, cached: bool) -> None:
    """Both the traced program and, later in this process, the encoder give the right numbers."""
    torch.manual_seed(0)
    encoder = build_encoder(tiny("vit", "simpool gamma", pos_interp=rule)).eval().requires_grad_(False)
    images, cache = torch.randn(2, 3, 24, 40), encoder_module._cached_position_matrix
    cache.cache_clear()
    expected = encoder(images)
    if not cached:
        cache.cache_clear()
    torch._dynamo.reset()
    traced = TRACERS[tracer](encoder, images)
    assert cache.cache_info().currsize == cached
    if traced is not None:
        torch.testing.assert_close(traced, expected)
    assert torch.equal(encoder(images), expected)


def test_exported_sizes_may_vary() -> None:
    encoder = build_encoder(tiny("vit", "simpool gamma")).eval().requires_grad_(False)
    sizes = {2: 4 * torch.export.Dim("h", min=2, max=20), 3: 4 * torch.export.Dim("w", min=2, max=20)}
    # Not strict, as newer versions of torch are by default: the strict tracer of 2.6 takes a size as
    # constant once an assertion of timm prints it.
    program = torch.export.export(encoder, (torch.randn(1, 3, 24, 40),), dynamic_shapes=(sizes,), strict=False).module()
    for height, width in ((24, 40), (44, 12)):
        images = torch.randn(1, 3, height, width)
        torch.testing.assert_close(program(images), encoder(images))


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="torch 2.6 does not export with onnxscript 0.5.4")
def test_positions_after_an_export_to_onnx() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    encoder, images = build_encoder(tiny("vit")).eval().requires_grad_(False), torch.randn(1, 3, 24, 40)
    encoder_module._cached_position_matrix.cache_clear()
    torch.onnx.export(encoder, (images,), dynamo=True)
    assert type(encoder(images)) is Tensor


def test_positions_made_without_gradients_serve_training_too() -> None:
    """The cached matrix is no inference tensor, and copies of an encoder do not share it."""
    encoder, images = build_encoder(tiny("vit")), torch.randn(1, 3, 20, 44)
    with torch.inference_mode():
        encoder(images)
    teacher = copy.deepcopy(encoder)
    with torch.no_grad():
        teacher.trunk.pos_embed += 1
    encoder(images).sum().backward()
    assert encoder.trunk.pos_embed.grad is not None
    assert not torch.allclose(encoder(images), teacher(images))


@pytest.mark.parametrize("pool", ["simpool", "cls"])
def test_attention_needs_no_fused_kernel(pool: str) -> None:
    """The map is the same with and without timm's fused self-attention, and has a gradient."""
    encoder, images = build_encoder(tiny("vit", pool)).eval(), torch.randn(1, 3, 32, 48)
    fused = encoder.attention(images)
    for block in encoder.trunk.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(encoder.attention(images), fused)
    assert fused.requires_grad


def test_class_attention_equals_plain_loops() -> None:
    encoder, images = build_encoder(tiny("vit", "cls")).double().eval(), torch.randn(1, 3, 8, 12, dtype=torch.float64)
    first, last = encoder.trunk.blocks
    layer, tokens = last.attn, last.norm1(first(encoder._embed(images)[0]))[0]
    total = torch.zeros(6, dtype=torch.float64)
    query, key, _ = layer.qkv(tokens).chunk(3, dim=1)
    for head in range(2):
        part = slice(16 * head, 16 * head + 16)
        scores = torch.stack([query[0, part] @ key[j, part] / 4 for j in range(7)])
        total += (scores.exp() / scores.exp().sum())[1:]
    torch.testing.assert_close(encoder.attention(images)[0].flatten(), total / total.sum())


def test_registers_stand_behind_the_class_token() -> None:
    """Features, tokens and class attention are those of timm's model with the same weights."""
    torch.manual_seed(0)
    config, images = tiny("vit with registers", "cls"), torch.randn(2, 3, 56, 56, dtype=torch.float64)
    encoder = build_encoder(config).double().eval().requires_grad_(False)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    sizes = {"embed_dim": 32, "num_heads": 2, "depth": 2, "img_size": 56}
    reference = timm.create_model(config.arch, num_classes=0, **sizes).double().eval().requires_grad_(False)
    reference.load_state_dict({name.removeprefix("trunk."): value for name, value in encoder.state_dict().items()})
    assert reference.num_prefix_tokens == 5
    layer, seen = reference.blocks[-1].attn, {}
    layer.fused_attn = False
    layer.attn_drop.register_forward_hook(lambda *arguments: seen.update(attention=arguments[-1]))
    tokens = reference.forward_features(images)
    assert_close(encoder(images), tokens[:, 0], 1e-9, 1e-12)
    assert_close(encoder.norm(encoder.tokens(images)), tokens[:, 5:], 1e-9, 1e-12)
    heads = seen["attention"][:, :, 0, 5:]
    heads = (heads / heads.sum(-1, keepdim=True)).view(2, 2, 4, 4)
    assert_close(encoder.attention(images, per_head=True), heads, 1e-9, 1e-12)


@pytest.mark.parametrize(
    ("trunk", "pool"), [("vit", "simpool gamma"), ("vit", "cls"), ("resnet", "gap"), ("convnext", "simpool")]
)
def test_autocast(trunk: str, pool: str) -> None:
    """bfloat16 products give float32 features near those of float32, in channels_last too."""
    torch.manual_seed(0)
    encoder, images = build_encoder(tiny(trunk, pool)).eval(), torch.randn(2, 3, 32, 32)
    exact = encoder(images)
    encoder.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = encoder(images.to(memory_format=torch.channels_last))
    assert features.dtype == torch.float32
    assert F.cosine_similarity(features, exact).min() > 0.99


def student(trunk: str = "vit", **options: Any) -> DinoModel:
    encoder = build_encoder(tiny(trunk, **options))
    return DinoModel(encoder, DinoHead(encoder.embed_dim, 20, hidden_dim=24, bottleneck_dim=8, batch_norm=True))


def test_views_are_grouped_by_size_and_come_back_view_by_view() -> None:
    model, sizes = student("resnet").double().eval(), (32, 32, 16, 16, 16)
    views = [torch.randn(3, 3, size, size, dtype=torch.float64) for size in sizes]
    calls: list[tuple[int, ...]] = []
    model.encoder.trunk.conv1.register_forward_pre_hook(lambda _, inputs: calls.append(tuple(inputs[0].shape)))
    features = model(views)
    assert calls == [(6, 3, 32, 32), (9, 3, 16, 16)]
    assert features.shape == (5, 3, 8)
    for view, expected in zip(views, features, strict=True):
        torch.testing.assert_close(model.head(model.encoder(view)), expected)


def test_head_sees_all_views_in_one_batch() -> None:
    """In training, BatchNorm of the head sees all V * B rows, that of the trunk one size."""
    torch.manual_seed(0)
    model = student("resnet").double()
    views = [torch.randn(3, 3, size, size, dtype=torch.float64) for size in (32, 32, 16)]
    features = model(views)
    copied = copy.deepcopy(model)
    rows = torch.cat([copied.encoder(torch.cat(views[:2])), copied.encoder(views[2])])
    torch.testing.assert_close(copied.head(rows).view(3, 3, 8), features)
    assert model.head.bn1.num_batches_tracked == 1
    assert model.encoder.trunk.bn1.num_batches_tracked == 2


def test_head_features_are_unit_and_prototypes_have_unit_norm() -> None:
    head = DinoHead(16, 10, hidden_dim=12, bottleneck_dim=6)
    assert_close(head(torch.randn(5, 16)).detach().norm(dim=1), np.ones(5), 0, 1e-6)
    assert head.last_layer.weight.shape == (10, 6)
    assert_close(head.last_layer.weight.detach().norm(dim=1), np.ones(10), 0, 1e-6)
    assert not head.last_layer.parametrizations.weight.original0.requires_grad
    assert DinoHead(16, 10, norm_last_layer=False).last_layer.parametrizations.weight.original0.requires_grad
    assert head.fc1.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not head.fc3.bias.any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.randn(5, 16)).dtype == torch.float32


def drop_probabilities(model: nn.Module) -> list[float]:
    return [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]


@pytest.mark.parametrize("trunk", ["vit", "resnet", "convnext"])
def test_teacher(trunk: str) -> None:
    """A copy without gradients, with its own statistics, and with its own drop path rate."""
    model = student(trunk, drop_path=0.4)
    assert max(drop_probabilities(model)) == pytest.approx(0.4)
    teacher = make_teacher(model)
    assert teacher.training and set(drop_probabilities(teacher)) == {0.0}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(a, b) and a is not b for a, b in zip(teacher.parameters(), model.parameters(), strict=True))
    assert drop_probabilities(make_teacher(model, 0.2)) == pytest.approx([p / 2 for p in drop_probabilities(model)])
    assert max(drop_probabilities(model)) == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"model\.drop_path"):
        make_teacher(student(trunk), 0.4)


def test_drop_path_rises_linearly_over_the_blocks() -> None:
    model = build_encoder(tiny("vit", depth=5, drop_path=0.4))
    rates = [block.drop_path1.drop_prob for block in model.trunk.blocks[1:]]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_compiled_blocks_change_nothing() -> None:
    """Compiled as in training: in place, one by one."""
    encoder, images = build_encoder(tiny("vit", "cls")).eval(), torch.randn(2, 3, 32, 32)
    plain = encoder(images), encoder.attention(images)
    for block in encoder.trunk.blocks:
        block.compile(backend="eager")
    torch.testing.assert_close((encoder(images), encoder.attention(images)), plain)
    assert not any("_orig_mod" in name for name in encoder.state_dict())
    copy.deepcopy(encoder)(images)


def test_encoder_names_and_config() -> None:
    config = tiny("vit", "simpool gamma", beta=True)
    encoder = build_encoder(config)
    assert encoder.config is config
    assert dataclasses.asdict(copy.deepcopy(encoder).config) == dataclasses.asdict(config)
    names = set(encoder.state_dict())
    assert {name for name in names if not name.startswith("trunk.")} == {
        "pool.norm.weight",
        "pool.norm.bias",
        "pool.q.weight",
        "pool.k.weight",
        "pool.beta",
        "norm.weight",
        "norm.bias",
    }
    assert not any(name.startswith(("trunk.norm", "trunk.head", "trunk.fc")) for name in names)


def test_same_seed_same_weights() -> None:
    states: list[dict[str, Tensor]] = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(build_encoder(tiny("convnext")).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(("width", "heads", "expected"), [(128, None, 2), (48, None, 1), (128, 8, 8), (None, None, 3)])
def test_heads_of_a_vit(width: int | None, heads: int | None, expected: int) -> None:
    """One for each 64 of a given width, unless they are given too; else those of the architecture."""
    sizes = {"width": width, "heads": heads, "depth": 1, "image_size": 32}
    encoder = build_encoder(ModelConfig(arch="vit_tiny", **sizes))
    assert encoder.trunk.blocks[0].attn.num_heads == expected


@pytest.mark.parametrize("arch", ["vit_small", "deit3_small_patch16_224", "vit_small_patch16_18x2_224", "resnet18"])
@pytest.mark.parametrize("pool", ["simpool", "cls", "gap"])
def test_features_of_images_of_several_sizes(arch: str, pool: str):
    """As those of each size alone, with gradients; a single image and an odd size are among them.
    DeiT III has layer scale; the blocks of 18x2 are of another kind."""
    if pool == "cls" and arch == "resnet18":
        return
    sizes = {"width": 8} if arch == "resnet18" else {"width": 48, "depth": 2, "heads": 3, "image_size": 64}
    cfg = ModelConfig(arch=arch, pool=pool, gamma=1.25 if pool == "simpool" else None, **sizes)
    encoder = build_encoder(cfg).double().eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images = [torch.randn(b, 3, h, w, dtype=torch.float64) for b, h, w in ((3, 64, 64), (1, 32, 48), (2, 37, 64))]
    together = encoder.features_of_sizes(images)
    alone = torch.cat([encoder(each) for each in images])
    torch.testing.assert_close(together, alone)
    pull = torch.randn_like(alone)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad((x * pull).sum(), parameters, allow_unused=True) for x in (together, alone)]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9 * float(1 + theirs.abs().max()))
    one = encoder.features_of_sizes(images[:1])
    torch.testing.assert_close(one, alone[:3])


def test_stochastic_depth_of_images_of_several_sizes():
    """Each image is dropped as a whole, with the rate of the block, and what stays is scaled."""
    cfg = ModelConfig(arch="vit_small", pool="gap", width=48, depth=2, heads=3, image_size=64, drop_path=0.5)
    encoder = build_encoder(cfg).double().train()
    shapes = ((2000, 3), (500, 2))
    torch.manual_seed(0)
    kept = stream._kept(encoder.trunk.blocks[1].drop_path1, torch.zeros(7000, 48), shapes)
    assert kept is not None and kept.shape == (7000, 1) and set(kept.unique().tolist()) == {0.0, 2.0}
    for part, (images, tokens) in zip(kept.split([6000, 1000]), shapes, strict=True):
        by_image = part.view(images, tokens)
        assert torch.equal(by_image, by_image[:, :1].expand_as(by_image)) and abs(by_image.mean() - 1) < 0.1
    assert stream._kept(encoder.trunk.blocks[0].drop_path1, torch.zeros(7000, 48), shapes) is None
    assert stream._kept(encoder.eval().trunk.blocks[1].drop_path1, torch.zeros(7000, 48), shapes) is None
    images = [torch.randn(5, 3, 64, 64, dtype=torch.float64), torch.randn(4, 3, 32, 32, dtype=torch.float64)]
    encoder.train()
    for block in encoder.trunk.blocks:
        block.drop_path1 = block.drop_path2 = torch.nn.Identity()
    encoder.trunk.blocks[1].drop_path1 = DropPath(0.999999)
    dropped = encoder.features_of_sizes(images)
    encoder.trunk.blocks[1].attn.proj.weight.data.zero_()
    encoder.trunk.blocks[1].attn.proj.bias.data.zero_()
    torch.testing.assert_close(dropped, torch.cat([encoder(each) for each in images]))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_patches_are_those_of_the_convolution(memory: torch.memory_format):
    layer = torch.nn.Conv2d(3, 5, 4, 4).double()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    expected = layer(images)
    expected.square().sum().backward()
    gradients = [images.grad, layer.weight.grad, layer.bias.grad]
    images.grad = layer.weight.grad = layer.bias.grad = None
    layer.__class__ = PatchConv
    found = layer.to(memory_format=memory)(images.contiguous(memory_format=memory))
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    for ours, theirs in zip([images.grad, layer.weight.grad, layer.bias.grad], gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
