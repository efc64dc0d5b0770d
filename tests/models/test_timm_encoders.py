"""timm:NAME: features of timm's own models, attention where there is a class token, and what is refused."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dino_simpool.checkpoint import load_encoder

ENCODERS: dict[str, str] = {
    "vit_tiny_patch16_224": "cls",
    "deit_tiny_distilled_patch16_224": "cls",  # two tokens before the patches
    "deit3_small_patch16_224": "cls",  # layer scale, positions of patches only
    "vit_tiny_r_s16_p8_224": "cls",  # patches of a ResNet's map
    "vit_xsmall_patch16_clip_224": "cls",  # a norm before the blocks
    "vit_small_patch14_reg4_dinov2": "cls",  # registers, patches of 14 pixels
    "vit_small_plus_patch16_dinov3": "cls",  # rotary positions, registers, SwiGLU
    "eva02_tiny_patch14_224": "cls",  # rotary positions, SwiGLU
    "cait_xxs24_224": "cls",  # class attention
    "test_vit3": "pooling",  # attention pooling
    "vit_wee_patch16_reg1_gap_256": "",  # a register, no class token
    "xcit_nano_12_p16_224": "",  # attention over channels
    "swin_tiny_patch4_window7_224": "",  # maps with channels last
    "mixer_s32_224": "",
    "resnet18": "",
    "resnetv2_50": "",
    "convnextv2_atto": "",
    "mobilenetv3_small_050": "",  # a layer after the pooling
    "regnety_002": "",
    "mobilevit_xxs": "",
}
"""Encoders of different kinds, and whose attention they have."""


def image(encoder: Any, count: int = 1) -> Tensor:
    size = encoder.config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def filled(name: str) -> nn.Module:
    """A model of timm whose weights are nowhere 0, so that each of them counts."""
    torch.manual_seed(3)
    model: nn.Module = timm.create_model(name, num_classes=0).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_timms(name: str) -> None:
    encoder, model = load_encoder(f"timm:{name}", weights="random"), filled(name)
    encoder.trunk.load_state_dict(model.state_dict())
    x, data = image(encoder), timm.data.resolve_model_data_config(model)
    size = data["input_size"][-1]
    config = encoder.config
    assert (config.mean, config.std, config.image_size, config.resize) == (
        data["mean"], data["std"], size, int(size / data["crop_pct"]))  # fmt: skip
    with torch.no_grad():
        features, expected = encoder(x), model(x)
        assert torch.equal(features, expected) and features.shape == (1, encoder.embed_dim)
        if encoder.config.image_size > 300:  # takes long
            return
        maps = encoder.pool_input(x)[0]
        assert torch.equal(encoder.pool(maps), expected)
        tokens = encoder.tokens(x)
        if maps.ndim == 4:
            assert tokens.numel() == maps.numel()
        else:
            assert torch.equal(tokens, maps[:, maps.shape[1] - tokens.shape[1] :])
        if ENCODERS[name]:
            attention = encoder.attention(x)
            torch.testing.assert_close(attention.sum((1, 2)), torch.ones(1))
            assert attention[0].numel() == tokens.shape[1]
        else:
            with pytest.raises(ValueError, match=rf"^timm:{name} has no (class token|attention over its patches)") as error:
                encoder.attention(x)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "layer", "prefix"),
    [
        ("vit_tiny_patch16_224", "blocks.11.attn", 1),
        ("deit_tiny_distilled_patch16_224", "blocks.11.attn", 2),
        ("vit_small_patch16_dinov3", "blocks.11.attn", 5),
        ("eva02_tiny_patch14_224", "blocks.11.attn", 1),
        ("cait_xxs24_224", "blocks_token_only.1.attn", 1),
    ],
)
def test_attention_is_that_of_the_class_token_in_the_last_block(name: str, layer: str, prefix: int) -> None:
    """Against what timm itself makes where it does not fuse its attention."""
    encoder, seen = load_encoder(f"timm:{name}", weights="random"), []
    encoder.trunk.load_state_dict(filled(name).state_dict())
    x = image(encoder)
    ours, maps = encoder.attention(x, per_head=True), encoder.attention(x)
    module = encoder.trunk.get_submodule(layer)
    module.fused_attn = False
    module.attn_drop.register_forward_hook(lambda _, __, output: seen.append(output))
    encoder.trunk(x)
    expected = seen[-1][:, :, 0, prefix:]
    torch.testing.assert_close(ours.flatten(2), expected / expected.sum(-1, keepdim=True))
    mean = expected.mean(1)
    torch.testing.assert_close(maps.flatten(1), mean / mean.sum(-1, keepdim=True))
    torch.testing.assert_close(encoder.attention(x), maps)  # also where timm is told not to fuse
    assert not module.fused_attn


def test_an_attention_that_is_not_seen_is_not_replaced_by_another() -> None:
    """A last layer that fuses nothing, or makes two attentions, as differential ones do."""
    encoder = load_encoder("timm:test_vit", weights="random")
    x, last = image(encoder), encoder.trunk.blocks[-1].attn
    encoder.attention(x)
    plain = last.forward
    for forward in (lambda tokens, **_: tokens, lambda tokens, **_: plain(tokens) - plain(tokens)):
        last.forward = forward
        with pytest.raises(ValueError, match="timm:test_vit has no attention over its patches"):
            encoder.attention(x)


def test_other_sizes(tmp_path: Path) -> None:
    encoder = load_encoder("timm:test_vit", weights="random")
    with torch.no_grad():
        x = torch.randn(2, 3, 100, 70)
        assert encoder(x).shape == (2, 64) and encoder.attention(x).shape == (2, 6, 4)
        assert torch.equal(encoder(x), encoder(x[..., :96, :64]))
        torch.testing.assert_close(encoder(x[:1]), encoder(x)[:1])
    small = load_encoder("timm:test_vit", weights="random", image_size=96)
    assert small.config.image_size == 96 and small.config.resize is None and small.config.mean == encoder.config.mean
    fixed = load_encoder("timm:mixer_s32_224", weights="random")
    with pytest.raises(ValueError, match="timm:mixer_s32_224 takes images of 224 x 224 pixels only, not 64 x 64"):
        fixed(torch.zeros(1, 3, 64, 64))
    windows = load_encoder("timm:swin_tiny_patch4_window7_224", weights="random")
    with pytest.raises(ValueError, match=r"cannot take images of 250 x 250 pixels, its own are 224 x 224 \(Input height"):
        windows(torch.zeros(1, 3, 250, 250))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_vit3"])
def test_weights_of_a_file(name: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    whole = timm.create_model(name, num_classes=7).eval()
    state, bare = whole.state_dict(), timm.create_model(name, num_classes=0).eval()
    missing, _ = bare.load_state_dict(state, strict=False)
    assert not missing
    save_file(state, tmp_path / "model.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, tmp_path / "model.pth.tar")
    x = torch.randn(2, 3, 160, 160)
    for file in ("model.safetensors", "model.pth.tar"):
        encoder = load_encoder(f"timm:{name}", weights=tmp_path / file)
        assert torch.equal(encoder(x), bare(x)) and encoder.config.source == file
    first = next(iter(bare.state_dict()))
    for damaged in (
        {key: value for key, value in state.items() if key != first},
        {key + "_x" * (key == first): value for key, value in state.items()},
        {key: value[None] if key == first else value for key, value in state.items()},
    ):
        torch.save(damaged, tmp_path / "damaged.pth")
        with pytest.raises(ValueError, match=first):
            load_encoder(f"timm:{name}", weights=tmp_path / "damaged.pth")


def test_weights_with_the_names_of_their_authors(tmp_path: Path) -> None:
    """timm translates them; DINOv2's own files also hold a mask token, which no encoder uses."""
    torch.manual_seed(5)
    bare = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    state = bare.state_dict()
    torch.save(state | {"mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2.pth")
    loaded = load_encoder("timm:vit_small_patch14_dinov2", weights=tmp_path / "dinov2.pth").trunk.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in state.items())

    convnext = timm.create_model("convnext_atto", num_classes=0).state_dict()
    names = (
        ("stem.", "downsample_layers.0."),
        (".blocks.", "."),
        ("conv_dw", "dwconv"),
        ("mlp.fc", "pwconv"),
        ("head.norm", "norm"),
    )
    theirs = {}
    for name, value in convnext.items():
        for ours, official in names:
            name = name.replace(ours, official)
        theirs[re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", name)] = value
    torch.save({"model": theirs}, tmp_path / "convnext.pth")
    loaded = load_encoder("timm:convnext_atto", weights=tmp_path / "convnext.pth").trunk.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in convnext.items())


def test_random_weights_come_from_seed_0_and_leave_the_callers_numbers() -> None:
    before = torch.get_rng_state()
    first, second = (load_encoder("timm:test_vit", weights="random").state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(before, torch.get_rng_state())
    untrained = load_encoder("timm:test_vit", which="untrained")
    assert untrained.config.source == "random" and torch.equal(untrained.trunk.pos_embed, first["trunk.pos_embed"])


def test_what_timm_downloaded_before_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled("test_vit")
    place = "timm/test_vit.r160_in1k"
    repository = tmp_path / f"models--{place.replace('/', '--')}"
    for folder in ("refs", "snapshots/abc"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    save_file(model.state_dict() | {"head.weight": torch.zeros(9, 64), "head.bias": torch.zeros(9)},
              repository / "snapshots/abc/model.safetensors")  # fmt: skip
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    encoder = load_encoder("timm:test_vit")
    x = image(encoder)
    assert torch.equal(encoder(x), model(x)) and place in encoder.config.source


def test_without_network_the_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError) as error:
        load_encoder("timm:vit_small_patch14_dinov2.lvd142m")
    assert str(error.value) == (
        "the weights of timm:vit_small_patch14_dinov2.lvd142m cannot be downloaded (huggingface.co is not reached, [Errno -2] "
        "Name or service not known): give --weights FILE, model.safetensors of "
        "huggingface.co/timm/vit_small_patch14_dinov2.lvd142m, or --weights random"
    )


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "timm:vit_smal_patch16_224",
            {},
            r"timm does not know vit_smal_patch16_224: did you mean timm:vit_small_patch16_224\?",
        ),
        ("timm:", {}, "timm does not know an empty name: give timm:NAME"),
        ("timm:test_vit.zebra", {}, "timm has no weights test_vit.zebra: its tags are r160_in1k"),
        ("timm:mixer_s32_224", {}, "timm has no weights of timm:mixer_s32_224: give --weights FILE, or --weights random"),
        ("timm:test_vit", {"which": "student"}, "timm:test_vit has no student weights"),
        ("timm:test_vit", {"weights": "random", "min_over": "batch"}, "min_over batch is for SimPool"),
        ("timm:test_vit", {"weights": "random", "gamma": 2.0}, "the options of timm:test_vit: unknown option gamma"),
        ("timm:test_vit", {"weights": "none.pth"}, "no checkpoint none.pth"),
        ("weights.pth", {"weights": "random"}, "weights random are for a checkpoint timm:NAME"),
    ],
)
def test_mistakes_are_one_line(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, OSError), match=f"^{said}") as error:
        load_encoder(name, **options)
    assert "\n" not in str(error.value)
