"""The command `convert`: weights of others to ours and back, to timm, and to graphs.

    official   OUT/checkpoint.pth        what the scripts of DINO and SimPool load
    ours       OUT/backbone.safetensors, model.json; with a head also weights.pth (student, teacher)
    timm       OUT/timm.safetensors      for timm.create_model, with the call that takes it
    onnx       OUT/encoder.onnx          for onnxruntime
    program    OUT/encoder.pt2           for torch.export.load

Every file is read again and compared with the encoder before it gets its name, and convert.json
beside it says how it was made.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dino_simpool import distributed, timm_models
from dino_simpool.checkpoint import FORMAT, export_encoder, load_encoder
from dino_simpool.config import ConvertConfig, HeadConfig, ModelConfig, TrainConfig, to_dict
from dino_simpool.convert import graphs
from dino_simpool.convert.graphs import largest_difference
from dino_simpool.files import make_writable, write_atomically
from dino_simpool.logs import say
from dino_simpool.models.encoder import TRAINING, Encoder
from dino_simpool.models.foreign import TimmEncoder
from dino_simpool.models.recognize import TORCHVISION_ONLY, recognize
from dino_simpool.models.trunk import find_arch
from dino_simpool.models.weights import center_of, from_official, load_official, load_strict, to_official
from dino_simpool.results import model_record, write_record

TOLERANCE = 1e-4
"""Largest difference of an export, relative to the largest value of the output."""
FILES = {
    "official": ("checkpoint.pth",),
    "ours": ("backbone.safetensors", "model.json", "weights.pth"),
    "timm": ("timm.safetensors",),
    "onnx": ("encoder.onnx",),
    "program": ("encoder.pt2",),
}


def main(cfg: ConvertConfig) -> None:
    """The command `dino-simpool convert`."""
    distributed.setup("cpu")
    out = make_writable(Path(cfg.out), "--out")
    if there := [name for name in (*FILES[cfg.to], "convert.json") if (out / name).exists()]:
        raise FileExistsError(f"{out / there[0]} exists: give another --out, or remove it")
    encoder = load_encoder(
        cfg.checkpoint, which=cfg.which, weights=cfg.weights or None, **({**cfg.model, "min_over": cfg.min_over})
    )
    if isinstance(encoder, TimmEncoder) and cfg.to not in ("onnx", "program"):
        raise ValueError(
            f"{cfg.checkpoint} is timm's own model: it can become onnx or program, for other tools take timm's file"
        )
    writers: dict[str, Callable[[Encoder, ConvertConfig, Path], dict[str, Any]]] = {
        "official": _official, "ours": _ours, "timm": _timm, "onnx": _graph, "program": _graph
    }  # fmt: skip
    said = writers[cfg.to](encoder, cfg, out)
    source = model_record(encoder, cfg.checkpoint, cfg.which, weights=cfg.weights)
    record = {"evaluator": "convert", "to": cfg.to, **said, "tolerance": TOLERANCE, "model": source}
    write_record(out / "convert.json", record, cfg)
    if distributed.is_main():
        for name in FILES[cfg.to]:
            if (out / name).exists():
                print(f"written: {out / name}")
        for key, value in said.items():
            print(f"  {key}: {value if not isinstance(value, float) else f'{value:.2g}'}")


def _checked(path: Path, write: Callable[[Path], object], compare: Callable[[Path], float]) -> float:
    """Write a file, read it and compare; the file gets its name only then.

    ValueError if the largest difference is above TOLERANCE."""
    difference = torch.inf

    def write_and_compare(temporary: Path) -> None:
        nonlocal difference
        whole = temporary.with_suffix(path.suffix)  # by which readers tell formats
        try:
            write(whole)
            difference = compare(whole)
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"{path.name} differs from the encoder by {difference:.2g} of the largest value, {TOLERANCE} is allowed: "
                    "it was not kept, please report this with the checkpoint's model options"
                )
            whole.replace(temporary)
        finally:
            whole.unlink(missing_ok=True)

    write_atomically(path, write_and_compare)
    return difference


def _images(batch: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch + size[0]))


@torch.no_grad()
def _difference(found: Callable[[Tensor], Tensor], encoder: Encoder) -> float:
    """The largest difference of features at the encoder's own size, for one image and for three."""
    side = encoder.config.image_size
    images = [_images(batch, (side, side)) for batch in graphs.BATCHES]
    return max(largest_difference([found(x)], [encoder(x)]) for x in images)


def _parts(cfg: ConvertConfig, encoder: Encoder) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Student and teacher under our names, as far as the file has them, and its content."""
    own = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    if Path(cfg.checkpoint).suffix == ".safetensors":
        return {cfg.which: own}, {}
    content = load_official(cfg.checkpoint)
    if content.keys() & TORCHVISION_ONLY:  # names that only the encoder was read by
        return {cfg.which: own}, content
    names: tuple[Any, ...] = tuple(name for name in ("student", "teacher") if isinstance(content.get(name), dict))
    parts = {name: from_official(content, which=name) for name in names}
    return parts or {cfg.which: from_official(content)}, content


def _official(encoder: Encoder, cfg: ConvertConfig, out: Path) -> dict[str, Any]:
    """A checkpoint of DINO's and SimPool's self-supervised scripts."""
    config = encoder.config
    if config.is_vit and config.pool == "gap":
        raise ValueError("the official ViTs have a class token or SimPool, this one has gap: use --to ours or timm")
    if config.norm_order == "norm_then_pool":
        raise ValueError(
            "the official self-supervised ViTs have their norm after pooling, this one before: use --to ours or timm"
        )
    parts, content = _parts(cfg, encoder)
    notes = []
    if config.is_vit and config.gamma is not None and config.pool == "simpool" and not config.beta:
        notes.append("simpool.beta is added as 0: the official ViT with a gamma has one")
        parts = {name: {**part, "encoder.pool.beta": torch.zeros(1)} for name, part in parts.items()}
    if config.is_vit and config.pos_interp == "size":
        notes.append("the official code resamples position embeddings by its own rule: other sizes give other features")
    normed = any(name.endswith("running_mean") for part in parts.values() for name in part)
    epoch = content.get("epoch", encoder.epochs)
    heads = {name: value for part in parts.values() for name, value in part.items() if name.startswith("head.")}
    args = {
        "arch": config.arch, "patch_size": config.patch_size, "mode": "simpool" if config.pool == "simpool" else "official",
        "gamma": config.gamma, "drop_path_rate": config.drop_path, "epochs": encoder.total_epochs,
        "use_bn_in_head": any(".bn" in name for name in heads),
    }  # fmt: skip
    file: dict[str, Any] = {}
    for name, part in parts.items():
        prefix = "module." if name == "student" or normed else ""
        file[name] = {prefix + key: value for key, value in to_official(part).items()}
    if epoch is not None:
        file["epoch"] = round(epoch)
    if (center := center_of(content)) is not None:
        file["dino_loss"] = {"center": center}
    if heads:
        file["args"] = argparse.Namespace(**args)
        notes.append("no optimizer: the official script begins with a new one")
    given = {name: value for name, value in to_dict(config).items() if name != "beta"}

    def compare(path: Path) -> float:
        again = load_official(path)
        for name, part in parts.items():
            which: Any = name
            read = from_official(again, which=which)
            if read.keys() != part.keys() or not all(torch.equal(value, read[key]) for key, value in part.items()):
                raise ValueError(f"{path.name}: the {name} that was written is not the one that is read")
        return _difference(load_encoder(path, which=cfg.which, **given), encoder)

    difference = _checked(out / "checkpoint.pth", lambda path: torch.save(file, path), compare)
    if other := _read_otherwise(out / "checkpoint.pth", cfg.which, encoder):
        notes.append(f"the file does not say, or is read as published without: {other}")
    for note in notes:
        say(note)
    return {"largest difference": difference, "notes": notes}


def _read_otherwise(path: Path, which: str, encoder: Encoder) -> str:
    """The options that an official file does not say, or says otherwise, as they are to be given
    when it is read."""
    own = to_dict(encoder.config)
    found = recognize(load_official(path), which=which, given={}, answers=own | {"heads": None}, source=str(path))
    read = to_dict(ModelConfig()) | found.options
    if encoder.config.is_vit:
        own["heads"], width = encoder.trunk.blocks[0].attn.num_heads, encoder.trunk.num_features
        read["heads"] = None if width % 64 else width // 64
    names = ("gamma", "num_heads", "heads", "pos_interp", "resize", "mean", "std")
    different = {name: json.dumps(own[name]).strip('"') for name in names if own[name] != json.loads(json.dumps(read[name]))}
    return " ".join(f"--model.{name} {shlex.quote(value)}" for name, value in different.items())


def _ours(encoder: Encoder, cfg: ConvertConfig, out: Path) -> dict[str, Any]:
    """Our export, and with a head also a file for `train --run.init`."""
    parts, content = _parts(cfg, encoder)
    training = {name: getattr(encoder, name) for name in TRAINING}
    own = content.get("config", {}).get("run", {}) if "format" in content else {}
    heads = [part for part in parts.values() if any(name.startswith("head.") for name in part)]
    if heads:
        head = _head_config(heads[0])
        config = to_dict(TrainConfig(model=encoder.config, head=head))
        state = {"format": FORMAT, "config": config, "step": 0, **parts}
        if isinstance(content.get("epoch"), int):
            state["epoch"] = content["epoch"]
        if (center := center_of(content)) is not None:
            state["loss"] = {"center": center}

        def again(path: Path) -> float:
            return _difference(load_encoder(path, which=cfg.which, min_over=encoder.config.min_over), encoder)

        _checked(out / "weights.pth", lambda path: torch.save(state, path), again)
    export_encoder(out, encoder, seed=own.get("seed", 0), **training)
    difference = _difference(load_encoder(out / "backbone.safetensors"), encoder)
    if difference:
        raise ValueError(f"{out / 'backbone.safetensors'} is not what was written: remove it, and check the disk")
    return {"largest difference": difference}


def _head_config(part: dict[str, Tensor]) -> HeadConfig:
    """The sizes of a head from its weights."""
    layers = max(i for i in range(1, 11) if f"head.fc{i}.weight" in part)
    prototypes = part["head.last_layer.parametrizations.weight.original1"]
    return HeadConfig(
        out_dim=prototypes.shape[0],
        bottleneck_dim=prototypes.shape[1],
        hidden_dim=part["head.fc1.weight"].shape[0] if layers > 1 else HeadConfig().hidden_dim,
        layers=layers,
        batch_norm="head.bn1.weight" in part,
    )


def timm_call(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The name and the options with which timm.create_model makes this encoder: its own model for
    cls and gap, `timm_models` for simpool. ValueError if it has none."""
    family, name = find_arch(config.arch)
    if config.pool == "simpool":
        if config.arch not in timm_models.ARCHITECTURES:
            raise ValueError(f"timm_models has no {config.arch}_simpool: it has {', '.join(timm_models.ARCHITECTURES)}")
        usual = ModelConfig(arch=config.arch, gamma=1.25 if family == "vit" else 2.0)
        names = {name: name for name in (*timm_models.CHECKED, "stem", "patch_size", "width", "depth")} | {
            "image_size": "img_size"
        }
        own, first = to_dict(config), to_dict(usual)
        options = {theirs: own[ours] for ours, theirs in names.items() if own[ours] != first[ours]}
        if "gamma" in options and options["gamma"] is None:
            options["gamma"] = "none"
        return f"{config.arch}_simpool", options
    options = {"num_classes": 0}
    if family == "vit":
        sizes = {"embed_dim": config.width, "num_heads": config.heads, "depth": config.depth}
        options |= {key: value for key, value in sizes.items() if value}
        if config.width and not config.heads:
            options["num_heads"] = max(1, config.width // 64)
        options |= {"img_size": config.image_size} if config.image_size != 224 else {}
        options |= {"patch_size": config.patch_size} if config.patch_size != 16 else {}
        if config.pool == "gap":
            options |= {"class_token": False, "global_pool": "avg", "fc_norm": config.norm_order == "pool_then_norm"}
        return name, options
    if config.stem == "small" or (config.width and family == "resnet"):
        raise ValueError(f"timm's {name} has no small stem and no other width: use --to ours, or onnx")
    depth = config.depth if isinstance(config.depth, tuple | None) else (config.depth,) * 4
    if depth and len(depth) < 4:
        raise ValueError(f"timm's {name} has four stages, this one {len(depth)}: use --to ours, or onnx")
    options |= {"layers" if family == "resnet" else "depths": depth} if depth else {}
    options |= {"dims": tuple(config.width * 2**i for i in range(4))} if config.width else {}
    return name, options


def _timm(encoder: Encoder, cfg: ConvertConfig, out: Path) -> dict[str, Any]:
    """A state dict that timm's model takes."""
    name, options = timm_call(encoder.config)
    model = timm.create_model(name, **options).eval()
    if encoder.config.pool == "simpool":
        state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
        state["_extra_state"] = model.state_dict()["_extra_state"]
    else:
        norm = (
            "head.norm."
            if find_arch(encoder.config.arch)[0] == "convnext"
            else "fc_norm."
            if options.get("fc_norm")
            else "norm."
        )
        state = {
            key.removeprefix("trunk.") if key.startswith("trunk.") else key.replace("norm.", norm, 1): value
            for key, value in encoder.state_dict().items()
        }

    def compare(path: Path) -> float:
        load_strict(model, load_file(path), source=str(out / "timm.safetensors"))
        return _difference(model, encoder)

    tensors = {key: value.detach().contiguous() for key, value in state.items()}
    difference = _checked(out / "timm.safetensors", lambda path: save_file(tensors, path), compare)
    words = "".join(f", {key}={value!r}" for key, value in options.items())
    before = "import dino_simpool.timm_models; " if encoder.config.pool == "simpool" else ""
    call = f'{before}timm.create_model("{name}"{words}, checkpoint_path="{out / "timm.safetensors"}")'
    return {"largest difference": difference, "to load": call}


def _graph(encoder: Encoder, cfg: ConvertConfig, out: Path) -> dict[str, Any]:
    """ONNX or torch.export."""
    side = encoder.config.image_size
    sizes = [cfg.size or (side, side)]
    outputs = graphs.Outputs(graphs.at_size(encoder, sizes[0])).eval()
    if graphs.is_dynamic(encoder):
        sizes.append((sizes[0][0] + 32, sizes[0][1] + 64))
    else:
        say(f"images have {sizes[0][0]} x {sizes[0][1]} pixels in this export: --size for others")
    run = graphs.run_onnx if cfg.to == "onnx" else graphs.run_program
    reference = graphs.Outputs(encoder).eval()

    @torch.no_grad()
    def compare(path: Path) -> float:
        images = [_images(batch, size) for batch in graphs.BATCHES for size in sizes]
        return max(largest_difference(run(path, x), list(reference(x))) for x in images)

    def write(path: Path) -> None:
        program = graphs.trace(outputs, sizes[0])
        if cfg.to == "onnx":
            graphs.write_onnx(program, outputs.names, path)
        else:
            graphs.write_program(program, path)

    difference = _checked(out / FILES[cfg.to][0], write, compare)
    return {
        "largest difference": difference,
        "outputs": list(outputs.names),
        "sizes": "any" if graphs.is_dynamic(encoder) else list(sizes[0]),
    }
