"""The ground truth of ROxford and RParis: gnd_<name>.pkl as published, or the same as gnd_<name>.json.

A pickle is a program: loading a stranger's file with the standard module runs whatever it says. `load_plain_pickle` only builds
containers, strings, numbers and numpy arrays; any other name in the file is refused before it is looked up. The content
(filipradenovic/revisitop): imlist and qimlist, names of the images without .jpg; gnd, a dict for each query with its box bbx
in pixels and the numbers, in imlist, of the easy, hard and junk images of the same landmark.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

KINDS = ("easy", "hard", "junk")


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Which database images show what a query shows."""

    database: list[str]
    """Names of the database images, without suffix."""
    queries: list[str]
    """Names of the query images, without suffix."""
    boxes: np.ndarray
    """(queries, 4) float64 left, top, right, bottom of the landmark in the query image, in pixels."""
    relevant: list[dict[str, np.ndarray]]
    """For each query the numbers of its easy, hard and junk images in `database`, int64; all others are negatives."""


def read_ground_truth(folder: Path, name: str) -> GroundTruth:
    """The ground truth in gnd_<name>.json if there is one, else in gnd_<name>.pkl. ValueError if it is missing or damaged."""
    path = folder / f"gnd_{name}.json"
    if not path.is_file():
        path = path.with_suffix(".pkl")
    if not path.is_file():
        raise ValueError(f"{path} is missing (gnd_{name}.json would do as well): get it with the data set")
    with path.open("rb") as file:
        try:
            content = json.load(file) if path.suffix == ".json" else load_plain_pickle(file)
        except pickle.UnpicklingError as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{path}: {said}; get the file again, or give the same content as gnd_{name}.json") from error
        except Exception as error:  # a damaged pickle raises almost anything
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): get it again") from error
    try:
        return _checked(content)
    except (ValueError, TypeError, KeyError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} is not the ground truth of {name}: {reason}; wanted are imlist, qimlist and gnd as in revisitop"
        ) from error


def load_plain_pickle(file: BinaryIO) -> Any:
    """What a pickle holds, if that is containers, strings, numbers and numpy arrays only.

    UnpicklingError names the first other thing, which was not even imported. Strings of Python 2 are taken as Latin-1.
    """
    return _PlainUnpickler(file, encoding="latin1").load()


def _encode(text: str, encoding: str) -> bytes:
    """How protocols 0 to 2 write bytes: as text, and with the name of _codecs.encode, which could do much more."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding} are not known")
    return text.encode("latin1")


class _PlainUnpickler(pickle.Unpickler):
    """Looks up nothing but what sets and the arrays and scalars of numpy, old and new, are made of."""

    def find_class(self, module: str, name: str) -> Any:
        old_and_new = {"numpy.core": "numpy._core", "__builtin__": "builtins"}
        for old, new in old_and_new.items():
            if module == old or module.startswith(f"{old}."):
                module = new + module.removeprefix(old)
        multiarray = np._core.multiarray  # type: ignore[attr-defined]
        plain = {
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": np.dtype,
            "numpy._core.multiarray._reconstruct": multiarray._reconstruct,
            "numpy._core.multiarray.scalar": multiarray.scalar,
            "numpy._core.numeric._frombuffer": np._core.numeric._frombuffer,  # type: ignore[attr-defined]
            "_codecs.encode": _encode,
            "builtins.set": set,
            "builtins.frozenset": frozenset,
            "builtins.bytes": bytes,
            "builtins.bytearray": bytearray,
        }
        try:
            return plain[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it wants to use {module}.{name}, which plain data does not need") from None


def _checked(content: Any) -> GroundTruth:
    """The content as arrays. ValueError, TypeError or KeyError if it is something else."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    database, queries = ([str(name) for name in content[key]] for key in ("imlist", "qimlist"))
    if len(content["gnd"]) != len(queries):
        raise ValueError(f"it has {len(queries)} queries, but {len(content['gnd'])} entries in gnd")
    if not database or not queries:
        raise ValueError(f"it has {len(database)} database images and {len(queries)} queries")
    boxes, relevant = np.empty((len(queries), 4)), []
    for number, (query, entry) in enumerate(zip(queries, content["gnd"], strict=True)):
        box = np.asarray(entry["bbx"], np.float64).reshape(-1)
        if len(box) != 4 or not np.isfinite(box).all() or not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"the box of query {query} is {box.tolist()}, not left, top, right, bottom")
        boxes[number] = box
        relevant.append({kind: _numbers(entry[kind], f"{kind} of query {query}", len(database)) for kind in KINDS})
    return GroundTruth(database, queries, boxes, relevant)


def _numbers(values: Any, what: str, count: int) -> np.ndarray:
    """Image numbers as int64: an empty list would be an array of floats."""
    array = np.asarray(values)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{what} is not a list of whole numbers")
    if array.min() < 0 or array.max() >= count:
        raise ValueError(f"{what} goes from {array.min()} to {array.max()}, but there are images 0 to {count - 1}")
    return array.astype(np.int64)
