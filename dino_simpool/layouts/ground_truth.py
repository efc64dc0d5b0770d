"""The ground truth of ROxford and RParis: gnd_<name>.pkl as published, or gnd_<name>.json.

A pickle is a program: loading an untrusted file with the standard module runs whatever it says.
`load_plain_pickle` builds only containers, strings, numbers and numpy arrays, with its own
functions. Any other name in the file is refused before it is looked up. The content
(filipradenovic/revisitop): imlist and qimlist, names of the images without .jpg; gnd, for each
query a dict with its box bbx in pixels and the numbers in imlist of the easy, hard and junk images
of the same landmark.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

KINDS = ("easy", "hard", "junk")
MOST_BYTES = 2**24
"""The largest pickle. Published ones have less than 2**20 bytes. A byte may take 64 in memory."""
MOST_PIXELS = 2**16
"""The longest side of an image; larger boxes are invalid. (JPEG has 16 bits for it.)"""


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Which database images show the same landmark as each query."""

    database: list[str]
    """Names of the database images, without suffix."""
    queries: list[str]
    """Names of the query images, without suffix."""
    boxes: np.ndarray
    """(queries, 4) float64 left, top, right, bottom of the landmark in the query, in pixels."""
    relevant: list[dict[str, np.ndarray]]
    """Easy, hard and junk images of each query: int64 numbers in `database`. Others: negatives."""


def read_ground_truth(folder: Path, name: str) -> GroundTruth:
    """gnd_<name>.json if it exists, else gnd_<name>.pkl. ValueError if missing or broken."""
    path = folder / f"gnd_{name}.json"
    if not path.is_file():
        path = path.with_suffix(".pkl")
    if not path.is_file():
        raise ValueError(f"{path} is missing (gnd_{name}.json works too): get it with the data set")
    with path.open("rb") as file:
        try:
            content = json.load(file) if path.suffix == ".json" else load_plain_pickle(file)
        except pickle.UnpicklingError as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{path}: {said}; get the file again, or give the same content as gnd_{name}.json") from error
        except Exception as error:  # a broken pickle raises almost anything
            raise ValueError(f"{path} is broken ({type(error).__name__}: {error}): get it again") from error
    try:
        return _checked(content)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} is not the ground truth of {name}: {reason}; it needs imlist, qimlist and gnd as in revisitop"
        ) from error


def load_plain_pickle(file: BinaryIO) -> Any:
    """The content of a pickle, if it has only containers, strings, numbers and numpy arrays.

    UnpicklingError if it has anything else, which is not even imported, or is too large. Python 2
    strings are decoded as Latin-1.
    """
    data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise pickle.UnpicklingError(f"it has more than {MOST_BYTES:,} bytes, which no ground truth needs")
    return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()


# What a pickle may call. Nothing here is numpy's own: its functions take bytes of a file for
# addresses of objects, and crash.


def _encode(text: str, encoding: str) -> bytes:
    """How protocols 0 to 2 store bytes: as text. (_codecs.encode itself could do much more.)"""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding} are not supported")
    return text.encode("latin1")


def _dtype(kind: str, align: object = False, copy: object = True) -> np.dtype[Any]:
    if not isinstance(kind, str) or not _PLAIN_DTYPE.fullmatch(kind):
        raise pickle.UnpicklingError(f"the dtype {kind!r} is not one of numbers, text or objects")
    return np.dtype(kind, copy=True)  # not the one that numpy shares, since its byte order may be set next


def _content(data: Any, dtype: Any, shape: Any) -> Any:
    """The bytes that fill an array, or the list for an array of objects, if they fit it."""
    if not isinstance(dtype, np.dtype) or not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError("an array in it has no plain dtype and shape")
    data = data.encode("latin1") if isinstance(data, str) else data
    kinds, length = (list, 1) if dtype.hasobject else ((bytes, bytearray), dtype.itemsize)
    if not isinstance(data, kinds) or len(data) != math.prod(shape) * length:
        raise pickle.UnpicklingError("the content of an array in it does not fit its dtype and shape")
    return data if dtype.hasobject else bytes(data)


def _array(data: Any, dtype: Any, shape: Any, order: str = "C") -> np.ndarray:
    content = _content(data, dtype, shape)
    if dtype.hasobject:
        raise pickle.UnpicklingError("it makes an array of objects from bytes")
    return np.ndarray(shape, dtype, content, order="F" if order == "F" else "C").copy(order="K")


def _bytes(*arguments: Any) -> bytes:
    """bytes(...), except bytes(number), which could take any amount of memory."""
    if any(isinstance(each, int) for each in arguments):
        raise pickle.UnpicklingError("it asks for a number of empty bytes")
    return bytes(*arguments)


_PLAIN_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16|[SU][0-9]{1,6}|O8?)")
_CALLABLE: dict[str, Any] = {
    "numpy.ndarray": "numpy.ndarray",  # only named as an argument, and cannot be called
    "numpy.dtype": _dtype,
    "numpy._core.multiarray._reconstruct": lambda kind, shape, typecode: np.empty(0, np.uint8),  # filled by _build
    "numpy._core.multiarray.scalar": lambda dtype, data: _array(data, dtype, ())[()],
    "numpy._core.numeric._frombuffer": _array,
    "_codecs.encode": _encode,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
}


# Replaced operations of a pickle. (typeshed does not know the stack.)


def _build(machine: Any) -> None:
    """Fill an object in place: an array with its content, or a dtype with its byte order."""
    state, target = machine.stack.pop(), machine.stack[-1]
    if isinstance(target, np.ndarray) and target.size == 0 and isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, fortran, data = state
        state = (1, shape, dtype, bool(fortran), _content(data, dtype, shape))
        target.__setstate__(state)  # type: ignore[arg-type]  # the stub asks for numpy's bool, which numpy refuses
    elif isinstance(target, np.dtype) and isinstance(state, tuple) and state[2:5] == (None, None, None):
        if state[1] in ("<", ">") and np.dtype(f"{state[1]}i2") != np.dtype("i2"):  # not this machine's order
            size = (target.itemsize, target.alignment) if target.kind == "U" else (-1, -1)
            target.__setstate__((3, state[1], None, None, None, *size, target.flags))  # type: ignore[attr-defined]
    else:
        raise pickle.UnpicklingError(f"it gives a {type(target).__name__} a state, which plain data does not need")


def _bytearray(machine: Any) -> None:
    """A bytearray of the bytes that are there. (The original first takes the memory asked for.)"""
    machine.append(bytearray(machine.read(int.from_bytes(machine.read(8), "little"))))


def _refuse(machine: Any) -> None:
    raise pickle.UnpicklingError("it makes objects of classes, which plain data does not need")


class _PlainUnpickler(pickle._Unpickler):
    """The standard module's Python version, with replaced operations and nothing to look up but
    `_CALLABLE`. (The C version also allocates as much memory as a short file asks for.)
    """

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        **dict.fromkeys(b"".join([pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.NEXT_BUFFER]), _refuse),
        **dict.fromkeys(b"".join([pickle.EXT1, pickle.EXT2, pickle.EXT4]), _refuse),
        pickle.BUILD[0]: _build,
        pickle.BYTEARRAY8[0]: _bytearray,
    }

    def find_class(self, module: str, name: str) -> Any:
        new = re.sub(r"^numpy\.core\b", "numpy._core", module).replace("__builtin__", "builtins")
        if (wanted := f"{new}.{name}") not in _CALLABLE:
            raise pickle.UnpicklingError(f"it wants to use {wanted}, which plain data does not need")
        return _CALLABLE[wanted]


def _checked(content: Any) -> GroundTruth:
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    database, queries = (_names(content[key], key) for key in ("imlist", "qimlist"))
    if len(content["gnd"]) != len(queries):
        raise ValueError(f"it has {len(queries)} queries, but {len(content['gnd'])} entries in gnd")
    if not database or not queries:
        raise ValueError(f"it has {len(database)} database images and {len(queries)} queries")
    boxes, relevant = np.empty((len(queries), 4)), []
    for number, (query, entry) in enumerate(zip(queries, content["gnd"], strict=True)):
        box = np.asarray(entry["bbx"], np.float64).reshape(-1)
        left, top, right, bottom = box.round().tolist() if len(box) == 4 else (0, 0, 0, 0)
        if not (0 <= left < right < MOST_PIXELS and 0 <= top < bottom < MOST_PIXELS):
            raise ValueError(f"the box of query {query} is {box.tolist()}, not left, top, right, bottom in pixels")
        boxes[number] = box
        relevant.append({kind: _numbers(entry[kind], f"{kind} of query {query}", len(database)) for kind in KINDS})
    return GroundTruth(database, queries, boxes, relevant)


def _names(values: Any, what: str) -> list[str]:
    """Names as text. Python 2 wrote bytes."""
    names = [value.decode("latin1") if isinstance(value, bytes) else value for value in values]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"{what} holds a {type(wrong[0]).__name__} in place of a name")
    return [str(name) for name in names]


def _numbers(values: Any, what: str, count: int) -> np.ndarray:
    """Image numbers as int64. (An empty list would become an array of floats.)"""
    array = np.asarray(values)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{what} is not a list of integers")
    if array.min() < 0 or array.max() >= count:
        raise ValueError(f"{what} goes from {array.min()} to {array.max()}, but there are images 0 to {count - 1}")
    return array.astype(np.int64)
