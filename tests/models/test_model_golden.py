"""Encoders, head and multi-crop against the published models: all weights carried over by the key
tables, then equal numbers.

Each runs in float64 (relative 1e-6) and float32 (the tolerances of the reference runs, which had
other rounding).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from golden.load import GOLDEN_POSITIONS, assert_close, load, load_json, meta, sub, synth_array, synth_state
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from dino_simpool.config import ModelConfig
from dino_simpool.dino.model import DinoHead, DinoModel, make_teacher
from dino_simpool.dino.optim import parameter_groups
from dino_simpool.models.encoder import Encoder, build_encoder
from dino_simpool.models.pooling.basic import GapPool
from dino_simpool.models.pooling.simpool import SimPool
from dino_simpool.models.weights import from_official, load_strict, to_official

PRECISIONS = {"64": torch.float64, "": torch.float32}
EXACT = {"rtol": 1e-6, "atol": 1e-8}
PUBLISHED = {mode: {"pos_interp": rule} for mode, rule in GOLDEN_POSITIONS.items()}
PUBLISHED["simpool"]["min_over"] = "batch"


def tensors(arrays: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {
        name: torch.from_numpy(np.array(value)).to(dtype if value.dtype.kind == "f" else None) for name, value in arrays.items()
    }


def load_encoder(encoder: Encoder, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loads published weights into an encoder, matching every key; returns the classifier's."""
    ours = from_official(state)
    classifier = {name: ours.pop(name) for name in list(ours) if name.startswith("classifier.")}
    load_strict(encoder, {name.removeprefix("encoder."): value for name, value in ours.items()}, source="golden")
    assert to_official(ours | classifier).keys() == {f"backbone.{name}" for name in state}
    return classifier


def with_options(encoder: Encoder, **options: Any) -> Encoder:
    """The same encoder and weights with other options of the pooling."""
    other = build_encoder(dataclasses.replace(encoder.config, **options)).to(next(encoder.parameters()).dtype)
    other.load_state_dict({name: value for name, value in encoder.state_dict().items() if name in other.state_dict()})
    return other.train(encoder.training)


def close(ours: Tensor, golden: dict[str, np.ndarray], name: str, precision: str, **tolerance: float) -> None:
    """Compares with the float64 run if it kept this array, else with the float32 run."""
    exact = precision and f"out64/{name}" in golden
    assert_close(ours.detach(), golden[f"out{'64' if exact else ''}/{name}"], **(EXACT if exact else tolerance), name=name)


def check_gradients(encoder: Encoder, golden: dict[str, np.ndarray], precision: str, *, rtol: float, noise: float = 0.0) -> int:
    """Checks and counts stored gradients; noise: bound for those that only rounding makes."""
    count = 0
    ours = to_official({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    for name, value in ours.items():
        name = name.removeprefix("backbone.")
        exact = precision and f"grad64/{name}" in golden
        reference = golden.get(f"grad{'64' if exact else ''}/{name}")
        if reference is None:
            continue
        scale = float(np.abs(reference).max())
        tolerance = {"rtol": 1e-6, "atol": 1e-6 * scale + 1e-10} if exact else {"rtol": rtol, "atol": rtol * scale + noise}
        assert_close(value, reference, **tolerance, name=name)
        count += 1
    return count


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", ["simpool", "official"])
def test_vit(mode: str, precision: str) -> None:
    golden = sub(load(f"open_vit_{mode}"), "vit")
    dtype, tolerance = PRECISIONS[precision], {"rtol": 1e-4, "atol": 5e-5}
    simpool = {"gamma": 1.25, "beta": True} if mode == "simpool" else {}
    encoder = build_encoder(
        ModelConfig(
            arch="vit_small",
            width=48,
            depth=3,
            heads=3,
            **simpool,
            **PUBLISHED[mode],
            pool="simpool" if mode == "simpool" else "cls",
        )
    )
    assert not load_encoder(encoder, tensors(sub(golden, "param")))
    encoder.to(dtype)
    for size in ("224x224", "96x96", "96x160"):
        x = torch.from_numpy(golden[f"in/x_{size}"]).to(dtype)
        close(encoder._embed(x)[0], golden, f"tokens0_{size}", precision, **tolerance)
        close(encoder(x), golden, f"y_{size}", precision, **tolerance)
        if mode == "simpool":
            close(encoder.attention(x).flatten(1), golden, f"attn_{size}", precision, **tolerance)
            close(encoder.pool(encoder.tokens(x)), golden, f"simpool_{size}", precision, **tolerance)
            close(with_options(encoder, min_over="image")(x), golden, f"y_per_image_{size}", precision, **tolerance)
        if f"out/tokens_last_{size}" in golden:
            last = golden[f"out/tokens_last_{size}"]
            assert_close(encoder.tokens(x).detach(), last if mode == "simpool" else last[:, 1:], **tolerance)
    x = torch.from_numpy(golden["in/x_96x96"]).to(dtype).requires_grad_()
    if mode == "simpool":
        close(with_options(encoder, gamma=2.0)(x), golden, "y_96x96_gamma2.0", precision, **tolerance)
        close(with_options(encoder, gamma=None, beta=False)(x), golden, "y_96x96_gammaNone", precision, **tolerance)
    else:
        to_patches = golden["out/selfattn_last_96x96"][:, :, 0, 1:].mean(1)
        assert_close(encoder.attention(x).detach().flatten(1), to_patches / to_patches.sum(1, keepdims=True), **tolerance)
    encoder(x).backward(torch.from_numpy(golden["in/g"]).to(dtype))
    assert_close(x.grad.abs().sum((1, 2, 3)), golden["grad/x_abs_sum"], rtol=1e-3)
    assert check_gradients(encoder, golden, precision, rtol=1e-3, noise=1e-5) == sum(k.startswith("grad/") for k in golden) - 1


def tiny_cnn(settings: dict[str, Any]) -> Encoder:
    pool = "simpool" if settings["mode"] == "simpool" else "gap"
    options: dict[str, Any] = {"pool": pool, "gamma": settings["gamma"] if pool == "simpool" else None, "min_over": "batch"}
    if settings["family"] == "convnext":
        return build_encoder(ModelConfig("convnext_tiny", width=8, depth=tuple(settings["depths"]), **options))
    if settings["block"] == "basic":
        return build_encoder(ModelConfig("resnet18", width=8, **options))
    # An odd width, which timm cannot make: its own ResNet with a narrower stem.
    trunk = ResNet(Bottleneck, (1, 1, 2, 1), num_classes=0, global_pool="", channels=(5, 10, 20, 40))
    trunk.conv1, trunk.bn1 = nn.Conv2d(3, 5, 7, 2, 3, bias=False), nn.BatchNorm2d(5)
    trunk.layer1[0].conv1, trunk.layer1[0].downsample[0] = (nn.Conv2d(5, out, 1, bias=False) for out in (5, 20))
    pooling = SimPool(160, gamma=2.0, min_over="batch") if pool == "simpool" else GapPool(160)
    return Encoder(trunk, pooling, norm=nn.Identity(), config=ModelConfig("resnet50", **options))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", ["simpool", "official"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext"])
def test_cnn(name: str, mode: str, precision: str) -> None:
    arrays, dtype = load(f"open_{name}_tiny"), PRECISIONS[precision]
    golden, settings = sub(arrays, mode), meta(arrays, mode)
    inputs, tolerance = sub(arrays, "simpool/in"), {"rtol": 1e-4, "atol": 2e-5 if name == "convnext" else 1e-4}
    state = {
        key: value
        for key, value in tensors(sub(arrays, "simpool/param")).items()
        if mode == "simpool" or not key.startswith("simpool.")
    }
    encoder = tiny_cnn(settings)
    classifier = {key: value.to(dtype) for key, value in load_encoder(encoder, state).items()}
    encoder.to(dtype).eval()

    def logits(x: Tensor) -> Tensor:
        return nn.functional.linear(encoder(x), classifier["classifier.weight"], classifier["classifier.bias"])

    for size in (f"{height}x{width}" for height, width in settings["sizes"]):
        x = torch.from_numpy(inputs[f"x_{size}"]).to(dtype)
        close(encoder(x), golden, f"feat_{size}", precision, **tolerance)
        close(logits(x), golden, f"logits_{size}", precision, **tolerance)
        if mode == "simpool":
            close(
                encoder.tokens(x).transpose(1, 2).unflatten(2, encoder.attention(x).shape[1:]),
                golden,
                f"map_{size}",
                precision,
                **tolerance,
            )
            close(encoder.attention(x).flatten(1), golden, f"attn_{size}", precision, **tolerance)
            close(encoder.pool(encoder.tokens(x)), golden, f"pool_{size}", precision, **tolerance)
            for suffix, option in (("per_image", {"min_over": "image"}), ("gammaNone", {"gamma": None})):
                pool = SimPool(encoder.embed_dim, **{"gamma": 2.0, "min_over": "batch", **option}).to(dtype)
                pool.load_state_dict(encoder.pool.state_dict())
                close(encoder.norm(pool(encoder.tokens(x))), golden, f"feat_{suffix}_{size}", precision, **tolerance)
    size = "x".join(map(str, settings["sizes"][0]))
    x = torch.from_numpy(inputs[f"x_{size}"]).to(dtype)
    logits(x).backward(torch.from_numpy(inputs["g"]).to(dtype))
    norms = {str(n): v for n, v in zip(golden["grad/names"], golden["grad/norms"], strict=True) if np.isfinite(v)}
    ours = to_official({n: p.grad for n, p in encoder.named_parameters()})
    assert {n.removeprefix("backbone.") for n in ours} == {n for n in norms if not n.startswith(("fc.", "head."))}
    for key, value in ours.items():
        assert_close(value.norm(), norms[key.removeprefix("backbone.")], 1e-3, 1e-5, name=key)
    assert check_gradients(encoder, golden, precision, rtol=1e-3) > 20
    if f"out/train_logits_{size}" in golden:
        encoder.train()
        close(logits(x), golden, f"train_logits_{size}", precision, **tolerance)
        close(encoder.trunk.bn1.running_var, golden, "train_bn1.running_var", precision, **tolerance)


FULL_SIZE = load("open_fullsize_synth")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", [key.split("/")[0] for key in FULL_SIZE if key.endswith("/meta")])
def test_full_size(case: str, precision: str) -> None:
    """The real architectures with weights that are a function of their names."""
    golden, settings, dtype = sub(FULL_SIZE, case), meta(FULL_SIZE, case), PRECISIONS[precision]
    tolerance = EXACT if precision else {"rtol": 1e-3, "atol": 2e-4}
    arch, mode = settings["arch"], settings["mode"]
    spec = [
        (entry[0], entry[1])
        for entry in load_json("open_model_keys")[f"{arch}/{mode}"]["state_dict"]
        if not entry[0].startswith(("fc.", "head."))
    ]
    state = synth_state(spec, settings["seed"])
    for name, sums in zip(golden["out/param_names"], golden["out/param_checksums"], strict=True):
        if name in state:
            value = state[name].astype(np.float64).ravel()
            assert_close([value.sum(), np.abs(value).sum(), value[0], value[-1]], sums, 1e-9, 1e-9, name=name)
    pool = "simpool" if mode == "simpool" else "cls" if arch == "vit_small" else "gap"
    gamma = settings["gamma"] if pool == "simpool" else None
    with torch.device("meta"):
        encoder = build_encoder(ModelConfig(arch, pool=pool, gamma=gamma, beta="simpool.beta" in state, **PUBLISHED[mode]))
    encoder.to_empty(device="cpu").eval()
    load_encoder(encoder, tensors(state, torch.float32))
    encoder.to(dtype)
    for height, width in settings["sizes"]:
        shape = (settings["B"], 3, height, width)
        x = torch.from_numpy(synth_array(f"input_{height}x{width}", shape, settings["seed"])).to(dtype)
        with torch.no_grad():
            tokens = encoder.tokens(x)
            assert_close(encoder(x), golden[f"out{precision}/feat_{height}x{width}"], **tolerance)
            if pool == "simpool":
                attention = encoder.pool(tokens, return_attention=True)[1]
                assert_close(attention, golden[f"out{precision}/attn_{height}x{width}"], **tolerance)
                encoder.pool.min_over = "image"
                per_image = encoder.norm(encoder.pool(tokens))
                encoder.pool.min_over = "batch"
                assert_close(per_image, golden[f"out{precision}/feat_per_image_{height}x{width}"], **tolerance)


KEYS = load_json("open_model_keys")


@pytest.mark.parametrize(
    "entry", [name for name in KEYS if name.count("/") == 1 and name.split("/")[0] not in ("DINOHead", "MultiCropWrapper")]
)
def test_published_encoder_keys(entry: str) -> None:
    """Every key, shape and kind of the published encoders, and their number of parameters."""
    arch, mode = entry.split("/")
    published = KEYS[entry]
    pool = "simpool" if mode == "simpool" else "cls" if arch.startswith("vit") else "gap"
    gamma = published["constructor"]["gamma"] if pool == "simpool" else None
    beta = pool == "simpool" and arch.startswith("vit")
    with torch.device("meta"):
        encoder = build_encoder(ModelConfig(arch, pool=pool, gamma=gamma, beta=beta))
    rows = {row[0]: row for row in published["state_dict"]}
    ours = {name.removeprefix("backbone."): value for name, value in to_official(encoder.state_dict()).items()}
    classifier = {name for name in rows if name.startswith(("fc.", "head."))}
    assert ours.keys() == rows.keys() - classifier
    assert all(list(value.shape) == rows[name][1] for name, value in ours.items())
    parameters = {name.removeprefix("backbone."): p for name, p in to_official(dict(encoder.named_parameters())).items()}
    assert sum(p.numel() for p in parameters.values()) == published["n_params"] - sum(
        int(np.prod(rows[name][1])) for name in classifier
    )
    decayed = {id(p) for p in parameter_groups(encoder)[0]["params"]}
    for name, row in rows.items():
        if len(row) > 2 and name not in classifier:
            assert (row[2] == "param") == (name in parameters)
            assert name not in parameters or (row[4] == "decay") == (id(parameters[name]) in decayed)


@pytest.mark.parametrize("arch", ["vit_small", "resnet50", "convnext_small"])
@pytest.mark.parametrize("mode", ["simpool", "official"])
def test_published_student_keys(arch: str, mode: str) -> None:
    """Encoder and head: keys, number of parameters, and which are decayed or frozen."""
    published, head = KEYS[f"MultiCropWrapper/{arch}/{mode}"], KEYS[f"DINOHead/{arch}_recipe"]
    pool = "simpool" if mode == "simpool" else "cls" if arch == "vit_small" else "gap"
    vit = pool == "simpool" and arch == "vit_small"
    with torch.device("meta"):
        encoder = build_encoder(ModelConfig(arch, pool=pool, gamma=1.25 if vit else None, beta=vit))
        options = head["constructor"]
        model = DinoModel(
            encoder,
            DinoHead(
                options["in_dim"], options["out_dim"], batch_norm=options["use_bn"], norm_last_layer=options["norm_last_layer"]
            ),
        )
    assert to_official(model.state_dict()).keys() == set(published["keys"])
    assert sum(p.numel() for p in model.parameters()) == published["n_params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == published["n_trainable"]
    names = {id(p): name for name, p in to_official(dict(model.named_parameters())).items()}
    groups = [{names[id(p)] for p in group["params"]} for group in parameter_groups(model)]
    assert groups == [set(published["group0_decay"]), set(published["group1_no_decay"])]
    assert set(names.values()) - groups[0] - groups[1] == set(published["in_no_group"])
    for row in head["state_dict"]:
        assert list(to_official(model.state_dict())[f"head.{row[0]}"].shape) == row[1]


HEADS = load("open_dino_head")


def make_head(case: str, dtype: torch.dtype) -> DinoHead:
    options = meta(HEADS, case)["kw"]
    head = DinoHead(
        options["in_dim"],
        options["out_dim"],
        hidden_dim=options["hidden_dim"],
        layers=options["nlayers"],
        bottleneck_dim=options["bottleneck_dim"],
        batch_norm=options["use_bn"],
        norm_last_layer=options["norm_last_layer"],
    )
    state = from_official(tensors(sub(HEADS, f"{case}/param")))
    load_strict(head, {name.removeprefix("head."): value for name, value in state.items()}, source="golden")
    return head.to(dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("case", "mode"), [("plain_g_trainable", ""), ("one_layer", ""), ("bn_norm_last", "_eval"), ("bn_norm_last", "_train")]
)
def test_head(case: str, mode: str, precision: str) -> None:
    """Logits, gradients (of the frozen norms none) and running statistics of the published head."""
    dtype, head = PRECISIONS[precision], make_head(case, PRECISIONS[precision]).train(mode != "_eval")
    x = torch.from_numpy(HEADS[f"{case}/in/x"]).to(dtype).requires_grad_()
    features = head(x)
    assert_close(features.detach().norm(dim=1), np.ones(len(x)), 0, 1e-6)
    logits = head.last_layer(features)
    tolerance = EXACT if precision else {"rtol": 1e-4, "atol": 1e-5}
    assert_close(logits.detach(), HEADS[f"{case}/out{precision}/y{mode}"], **tolerance)
    logits.backward(torch.from_numpy(HEADS[f"{case}/in/g"]).to(dtype))
    reference = {
        name.removesuffix(mode): value for name, value in sub(HEADS, f"{case}/grad{precision}").items() if name.endswith(mode)
    }
    gradients = to_official({f"head.{name}": p.grad for name, p in head.named_parameters() if p.grad is not None})
    ours = {name.removeprefix("head."): value for name, value in gradients.items()} | {"x": x.grad}
    assert ours.keys() == reference.keys()
    for name, value in ours.items():
        noise = 1e-5 if mode == "_train" and name in ("mlp.0.bias", "mlp.3.bias") else 0
        assert_close(value, reference[name], **(EXACT if precision and not noise else {"rtol": 1e-3, "atol": 2e-5}), name=name)
    if mode == "_train":
        for ours_name, theirs in (("bn1", "mlp.1"), ("bn2", "mlp.4")):
            norm = head.get_submodule(ours_name)
            for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                assert_close(getattr(norm, buffer), HEADS[f"{case}/out/after_{theirs}.{buffer}"], 1e-4, 1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_multicrop(precision: str) -> None:
    """Eight views of two sizes through student and teacher, in evaluation and training mode."""
    arrays, dtype = load("open_multicrop"), PRECISIONS[precision]
    golden = sub(arrays, "mc")
    encoder = build_encoder(
        ModelConfig("vit_small", width=24, depth=2, heads=2, image_size=64, gamma=1.25, beta=True, **PUBLISHED["simpool"])
    )
    model = DinoModel(encoder, DinoHead(24, 32, hidden_dim=24, bottleneck_dim=12, batch_norm=True))
    load_strict(model, from_official(tensors(sub(golden, "param"))), source="golden")
    model.to(dtype).eval()
    views = [torch.from_numpy(golden[f"in/crop{i}"]).to(dtype) for i in range(8)]
    tolerance = {"rtol": 1e-4, "atol": 5e-5}

    def logits(model: DinoModel, views: list[Tensor]) -> Tensor:
        return model.head.last_layer(model(views)).flatten(0, 1)

    rows = torch.cat([encoder(torch.cat(views[:2])), encoder(torch.cat(views[2:]))])
    close(rows, golden, "features_student", precision, **tolerance)
    close(logits(model, views), golden, "student_eval", precision, **tolerance)
    close(logits(model, views[:2]), golden, "teacher_eval", precision, **tolerance)
    close(logits(make_teacher(model), views[:2]), golden, "teacher_train", precision, **tolerance)
    close(logits(model.train(), views), golden, "student_train", precision, **tolerance)
    logits(model, views[:2])  # the reference ran one view last, with the running statistics of both passes
    close(logits(model.eval(), views[:1]), golden, "single", precision, **tolerance)
