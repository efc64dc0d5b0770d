"""Reads the golden vectors: what the published implementations computed, and real-size weights that are made and not stored.

A file holds arrays <case>/{in,param,out,out64,grad,grad64}/<name> and a JSON string <case>/meta. Two compact encodings are
undone: a name that ends in __i8q32 holds v * 32 as int8, in __u16q256 v * 256 as uint16.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
HERE = Path(__file__).parent
GOLDEN_POSITIONS = {"simpool": "dino_always", "official": "dino"}
"""model.pos_interp of the arrays of ViTs, by the reference's mode. Mode simpool resampled its positions at the native grid too,
on the CPU where the arrays were made; mode official, with the class token, did not: its images of that grid are square.
At other grids the two rules are one."""


def load(name: str) -> Arrays:
    """All arrays of one file."""
    arrays = {}
    with np.load(HERE / f"{name}.npz", allow_pickle=False) as file:
        for key in file.files:
            value = file[key]
            if key.endswith("__i8q32"):
                key, value = key.removesuffix("__i8q32"), value.astype(np.float32) / np.float32(32)
            elif key.endswith("__u16q256"):
                key, value = key.removesuffix("__u16q256"), value.astype(np.float64) / 256
            arrays[key] = value
    return arrays


def load_json(name: str) -> Any:
    return json.loads((HERE / f"{name}.json").read_text())


def cases(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the cases, in order."""
    return list(dict.fromkeys(key.partition("/")[0] for key in arrays if "/" in key))


def sub(arrays: Mapping[str, np.ndarray], prefix: str) -> Arrays:
    """The arrays below a prefix, without it."""
    prefix = prefix.rstrip("/") + "/"
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def meta(arrays: Mapping[str, np.ndarray], case: str) -> Any:
    """Settings of a case."""
    return json.loads(str(arrays[f"{case}/meta"]))


def assert_close(ours: Any, reference: Any, rtol: float = 1e-5, atol: float = 1e-6, name: str = "") -> float:
    """Largest difference; an AssertionError if one exceeds atol + rtol * |reference|, or shapes, NaN or infinities differ."""
    a, b = np.asarray(ours), np.asarray(reference)
    assert a.shape == b.shape, f"{name}: shape {a.shape}, reference {b.shape}"
    if not a.size:
        return 0.0
    if a.dtype.kind in "USbiu" and b.dtype.kind in "USbiu":
        assert (a == b).all(), f"{name}: {(a != b).sum()} of {a.size} differ"
        return 0.0
    a, b = a.astype(np.float64), b.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.abs(a - b))
        allowed = np.where(same, 0.0, atol + rtol * np.abs(b))
    bad = ~same & ~((error <= allowed) & np.isfinite(error))
    if bad.any():
        worst = np.unravel_index(np.argmax(np.where(bad, np.nan_to_num(error - allowed, nan=np.inf), -np.inf)), a.shape)
        raise AssertionError(
            f"{name}: {bad.sum()} of {a.size} beyond rtol {rtol}, atol {atol}; worst at {worst}: "
            f"{a[worst]!r}, reference {b[worst]!r}"
        )
    return float(error.max())


def _uniform(name: str, count: int, seed: int) -> np.ndarray:
    """Numbers in [-1, 1), multiples of 2^-23: splitmix64 counted up from a key of seed and name."""
    word = np.uint64
    with np.errstate(over="ignore"):
        key = word(seed) * word(0x9E3779B97F4A7C15) + word(zlib.crc32(name.encode())) * word(0xD1B54A32D192ED03)
        z = key + np.arange(1, count + 1, dtype=np.uint64) * word(0x9E3779B97F4A7C15)
        z = (z ^ z >> word(30)) * word(0xBF58476D1CE4E5B9)
        z = (z ^ z >> word(27)) * word(0x94D049BB133111EB)
        z = z ^ z >> word(31)
    return (z >> word(40)).astype(np.float64) / 2**23 - 1


def synth_array(name: str, shape: Iterable[int], seed: int, scale: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """float32 array that depends on its name, shape and seed only, uniform with mean `offset` and deviation `scale`."""
    shape = tuple(shape)
    values = offset + scale * np.sqrt(3.0) * _uniform(name, int(np.prod(shape, dtype=np.int64)), seed)
    return values.astype(np.float32).reshape(shape)


def synth_state(spec: Iterable[tuple[str, Iterable[int]]], seed: int) -> Arrays:
    """Weights for published parameter names and shapes; scales keep the activations of a deep network in range."""
    shapes = {name: tuple(shape) for name, shape in spec}
    last_norm = ".bn3.weight" if any(name.endswith(".bn3.weight") for name in shapes) else ".bn2.weight"

    def make(name: str, shape: tuple[int, ...]) -> np.ndarray:
        leaf = name.rpartition(".")[2]
        if leaf == "num_batches_tracked":
            return np.zeros(shape, np.int64)
        if leaf == "running_var":
            return (1 + 0.25 * _uniform(name, shape[0], seed)).astype(np.float32)
        known = {
            "running_mean": (0.1, 0.0),
            "pos_embed": (0.3, 0.0),
            "cls_token": (0.3, 0.0),
            "beta": (0.2, 0.0),
            "gamma": (0.1, 0.3),
        }
        if leaf in known:
            return synth_array(name, shape, seed, *known[leaf])
        if len(shape) == 1:
            if name.startswith("layer") and name.endswith(last_norm):
                return synth_array(name, shape, seed, 0.1, 0.3)
            return synth_array(name, shape, seed, *((0.05, 0.0) if leaf == "bias" else (0.1, 1.0)))
        gain = 1.4 if len(shape) == 4 else 1.0
        return synth_array(name, shape, seed, gain / np.sqrt(np.prod(shape[1:])))

    return {name: make(name, shape) for name, shape in shapes.items()}
