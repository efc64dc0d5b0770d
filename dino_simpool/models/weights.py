"""Weights of other projects: key tables, a loader that runs no code, and a strict check.

Sources: the files written by facebookresearch/dino and by the self-supervised code of SimPool
(github.com/billpsomas/simpool), both called "dino" here, and by SimPool's supervised code, a fork
of timm, called "supervised". Our names are those of `dino.model.DinoModel`: `encoder.trunk.*`,
`encoder.pool.*`, `encoder.norm.*`, `head.*`, and `classifier.*` for the linear classifier of a
supervised file.

A row of a table is (dino, supervised, ours); `#` stands for a number, `*` for the rest of a name.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PosixPath
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dino_simpool.paths import no_checkpoint

Layout = Literal["dino", "supervised"]
Row = tuple[str, str, str]


def _pool(supervised: str) -> tuple[Row, ...]:
    names = (("norm_patches.*", "norm.*"), ("wq.weight", "q.weight"), ("wk.weight", "k.weight"), ("beta", "beta"))
    return tuple((f"simpool.{theirs}", f"{supervised}.{theirs}", f"pool.{ours}") for theirs, ours in names)


ENCODERS: dict[str, tuple[Row, ...]] = {
    "vit": (
        ("pos_embed", "pos_embed", "trunk.pos_embed"),
        ("cls_token", "cls_token", "trunk.cls_token"),
        ("patch_embed.*", "patch_embed.*", "trunk.patch_embed.*"),
        ("blocks.*", "blocks.*", "trunk.blocks.*"),
        *_pool("gp.pool"),
        ("norm.*", "norm.*", "norm.*"),
        ("head.*", "head.*", "classifier.*"),
    ),
    "resnet": (
        ("conv1.*", "conv1.*", "trunk.conv1.*"),
        ("bn1.*", "bn1.*", "trunk.bn1.*"),
        ("layer#.*", "layer#.*", "trunk.layer#.*"),
        *_pool("global_pool.pool"),
        ("fc.*", "fc.*", "classifier.*"),
    ),
    "convnext": (
        ("downsample_layers.0.*", "stem.*", "trunk.stem.*"),
        ("downsample_layers.#.*", "stages.#.downsample.*", "trunk.stages.#.downsample.*"),
        ("stages.#.#.dwconv.*", "stages.#.blocks.#.conv_dw.*", "trunk.stages.#.blocks.#.conv_dw.*"),
        ("stages.#.#.norm.*", "stages.#.blocks.#.norm.*", "trunk.stages.#.blocks.#.norm.*"),
        ("stages.#.#.pwconv#.*", "stages.#.blocks.#.mlp.fc#.*", "trunk.stages.#.blocks.#.mlp.fc#.*"),
        ("stages.#.#.gamma", "stages.#.blocks.#.gamma", "trunk.stages.#.blocks.#.gamma"),
        *_pool("head.global_pool.pool"),
        ("norm.*", "head.norm.*", "norm.*"),
        ("head.*", "head.fc.*", "classifier.*"),
    ),
}
"""The names of the parts of an encoder, by family."""

_PROTOTYPES = (
    ("last_layer.weight_g", "", "last_layer.parametrizations.weight.original0"),
    ("last_layer.weight_v", "", "last_layer.parametrizations.weight.original1"),
)
HEADS: dict[str, tuple[Row, ...]] = {
    "one layer": (("mlp.*", "", "fc1.*"), *_PROTOTYPES),
    "plain": (*((f"mlp.{2 * i}.*", "", f"fc{i + 1}.*") for i in range(9)), *_PROTOTYPES),
    "batch norm": (
        *((f"mlp.{3 * i}.*", "", f"fc{i + 1}.*") for i in range(9)),
        *((f"mlp.{3 * i + 1}.*", "", f"bn{i + 1}.*") for i in range(9)),
        *_PROTOTYPES,
    ),
}
"""DINO heads. The published ones number all modules of one sequence, activations included."""

FAMILY_KEYS = {
    "patch_embed.proj.weight": "vit",
    "conv1.weight": "resnet",
    "stem.0.weight": "convnext",
    "downsample_layers.0.0.weight": "convnext",
}
COLUMNS = {"dino": 0, "supervised": 1, "ours": 2}
OURS = ("encoder.trunk.", "trunk.")
"""What names of ours begin with."""


def read_file(path: str | Path) -> Any:
    """The content of a file of weights (.pth and the like, .safetensors), its tensors on the CPU.

    No code of the file is run: of old files a short list of plain types is let in, as which options
    and learning rates were saved. FileNotFoundError, or ValueError in one line if the file is
    broken or holds anything else, which is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(no_checkpoint(path))
    if not path.stat().st_size:
        raise ValueError(f"{path} cannot be read (it is empty, 0 bytes): copy it again")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"{path} cannot be read (broken, or no safetensors file): {error}") from error
    # It makes NumPy scalars, as which learning rates were saved, in old files under another name.
    scalar: Any = np.float64(0).__reduce__()[0]
    scalars = [np.dtype, np.dtypes.Float64DType, scalar, (scalar, "numpy.core.multiarray.scalar")]
    try:
        _check_crc(path)
        with torch.serialization.safe_globals([argparse.Namespace, PosixPath, *scalars]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it holds {found[1]}, and loading it could run code: only tensors and plain values are loaded"
            raise ValueError(f"{path} cannot be read ({reason}); get the file from its authors") from error
        raise ValueError(f"{path} cannot be read (it is no checkpoint): give a file of weights") from error
    except Exception as error:  # torch raises many kinds for broken files; the cause is kept
        if "TorchScript" in str(error):
            raise ValueError(f"{path} cannot be read (it is TorchScript, which is code): give a file of weights") from error
        reason = str(error).partition("\n")[0][:160]
        raise ValueError(
            f"{path} cannot be read (truncated, broken, or no checkpoint): {type(error).__name__} {reason}".strip()
        ) from error


def _check_crc(path: Path) -> None:
    """BadZipFile if a part of a checkpoint does not match the CRC-32 that its zip format stores.

    torch does not compare them when it loads. 500 MB take 0.2 s. Files of torch's older format,
    which are no zip archives, have none.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} does not match its checksum")


def load_official(path: str | Path) -> dict[str, Any]:
    """The content of a published file, as `read_file` reads it. ValueError also if it is no
    dictionary."""
    content = read_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: give a dictionary of weights")
    return content


def from_official(checkpoint: Mapping[str, Any], *, which: Literal["teacher", "student"] = "teacher") -> dict[str, Tensor]:
    """Weights under our names, from the content of a published file or ours, or a bare state dict.

    which: of a supervised file, teacher is the moving average if there is one. ValueError for names
    that no table knows.
    """
    state = stripped(checkpoint, which)
    if any(name.startswith(OURS) for name in state):
        ours = ("encoder.", "head.", "classifier.")
        return {name if name.startswith(ours) else f"encoder.{name}": value for name, value in state.items()}
    encoder, head = split(state)
    result: dict[str, Tensor] = {}
    if encoder:
        renamed = _rename(_without_class_position(encoder), ENCODERS[_family(encoder)], "ours")
        result |= {name if name.startswith("classifier.") else f"encoder.{name}": value for name, value in renamed.items()}
    if head:
        result |= {f"head.{name}": value for name, value in _rename(head, head_rows(head), "ours").items()}
    return result


def stripped(checkpoint: Mapping[str, Any], which: str) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without what wrappers put before names, and without the
    extra BatchNorms of a training with split ones."""
    return {unwrapped(name): value for name, value in _choose(checkpoint, which).items() if ".aux_bn." not in name}


def unwrapped(name: str) -> str:
    """A name without what torch.compile and DistributedDataParallel put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def center_of(content: Mapping[str, Any]) -> Tensor | None:
    """The center (1, K) of the loss in a checkpoint of DINO, SimPool or ours, if there is one."""
    loss = content.get("dino_loss", content.get("loss"))
    return loss.get("center") if isinstance(loss, dict) else None


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Encoder and head of a state dict under published names, each without its prefix. ValueError
    for names that belong to neither."""
    if not any(name.startswith(("backbone.", "head.mlp.")) for name in state):  # an encoder or a head alone
        prefix = "head." if "last_layer.weight_g" in state else "backbone."
        state = {prefix + name: value for name, value in state.items()}
    if stray := [name for name in state if not name.startswith(("backbone.", "head."))]:
        raise ValueError(f"unknown names of weights: {first_names(stray)}")
    return _section(state, "backbone."), _section(state, "head.")


def to_official(state: Mapping[str, Tensor], *, layout: Layout = "dino") -> dict[str, Tensor]:
    """Weights under published names, from those of a DinoModel, an encoder or a head under ours.

    layout: "dino" has the prefixes backbone. and head.; "supervised" has none, as in the fork of
    timm, and no place for a head (ValueError).
    """
    bare = ("trunk.", "pool.", "norm.")
    state = {f"encoder.{name}" if name.startswith(bare) else name: value for name, value in state.items()}
    encoder, head = _section(state, "encoder."), _section(state, "head.")
    encoder |= {name: value for name, value in state.items() if name.startswith("classifier.")}
    renamed = _rename(encoder, ENCODERS[_family(_section(encoder, "trunk."))], layout) if encoder else {}
    if layout == "supervised":
        if head:
            raise ValueError("a supervised file has no place for a DINO head: convert the encoder only, or use layout dino")
        return renamed
    return {f"backbone.{name}": value for name, value in renamed.items()} | {
        f"head.{name}": value for name, value in _rename(head, head_rows(head), "dino").items()
    }


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 of the weights by name, the same for a checkpoint and for an export of it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_strict(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load all weights of a module. ValueError, with the first five that differ, unless all match.
    The message calls the state `source`."""
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{n} {tuple(state[n].shape)} for {tuple(v.shape)}" for n, v in own.items() if n in state and state[n].shape != v.shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "other shape": shapes}
    if any(problems.values()):
        said = "; ".join(f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in problems.items() if names)
        raise ValueError(f"the weights of {source} do not fit this model ({said})")
    module.load_state_dict(state)


def _choose(checkpoint: Mapping[str, Any], which: str) -> Mapping[str, Tensor]:
    """The state dict inside a checkpoint."""
    if all(isinstance(value, Tensor) for value in checkpoint.values()):
        return checkpoint
    places = ("student", "state_dict") if which == "student" else ("teacher", "state_dict_ema", "state_dict")
    for place in places:
        if isinstance(checkpoint.get(place), Mapping):
            return checkpoint[place]
    raise ValueError(
        f"the checkpoint has no {which}: it has {first_names(checkpoint)}, and one of {', '.join(places)} is needed"
    )


def _section(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _family(names: Mapping[str, Tensor]) -> str:
    found = [family for name, family in FAMILY_KEYS.items() if name in names]
    if not found:
        raise ValueError(f"no ViT, ResNet or ConvNeXt has these weights: {first_names(names)}")
    return found[0]


def head_rows(names: Mapping[str, Tensor]) -> tuple[Row, ...]:
    """The table of the head that has these names."""
    if "mlp.weight" in names or ("fc1.weight" in names and "fc2.weight" not in names):
        return HEADS["one layer"]
    return HEADS["batch norm" if any(name.startswith("bn1.") or name.endswith("running_mean") for name in names) else "plain"]


def _without_class_position(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Drops the first position of early SimPool files: that of a class token that they lack."""
    rows = state["pos_embed"].shape[1] if "pos_embed" in state and "cls_token" not in state else 0
    if math.isqrt(rows) ** 2 == rows or math.isqrt(rows - 1) ** 2 != rows - 1:
        return state
    warnings.warn(
        f"pos_embed has {rows} rows but there is no class token, as in early SimPool files: the first row is "
        "dropped, and model.pos_interp dino_legacy repeats their interpolation",
        stacklevel=3,
    )
    return {**state, "pos_embed": state["pos_embed"][:, 1:]}


def _rename(state: Mapping[str, Tensor], rows: tuple[Row, ...], target: str) -> dict[str, Tensor]:
    """Renames all weights: to ours from the layout that knows all names, or from ours to target."""
    unknown: list[list[str]] = []
    for source in ("dino", "supervised") if target == "ours" else ("ours",):
        pairs = [(row[COLUMNS[source]], row[COLUMNS[target]]) for row in rows]
        names = {name: translate(name, pairs) for name in state}
        unknown.append([name for name, new in names.items() if new is None])
        if not unknown[-1]:
            assert len(set(names.values())) == len(names)
            return {new: state[name] for name, new in names.items() if new is not None}
    raise ValueError(f"unknown names of weights: {first_names(min(unknown, key=len))}")


def rename_known(state: Mapping[str, Tensor], rows: tuple[Row, ...], source: Layout) -> tuple[dict[str, Tensor], list[str]]:
    """The weights that a layout names, under our names, and the names that it does not know."""
    pairs = [(row[COLUMNS[source]], row[COLUMNS["ours"]]) for row in rows]
    names = {name: translate(name, pairs) for name in state}
    known = {new: state[name] for name, new in names.items() if new is not None}
    return known, [name for name, new in names.items() if new is None]


def translate(name: str, pairs: Sequence[tuple[str, str]]) -> str | None:
    """The name by the first pair (theirs, ours) that knows it."""
    for theirs, ours in pairs:
        pattern = re.escape(theirs).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)")
        if match := re.fullmatch(pattern, name):
            return re.sub("[#*]", "{}", ours).format(*match.groups())
    return None


def first_names(names: Collection[str]) -> str:
    """The first five names."""
    return ", ".join(list(names)[:5]) + (", ..." if len(names) > 5 else "")
