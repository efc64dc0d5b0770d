"""Files and folders that options name, looked at before anything heavy is imported.

A path is declared where its option is (`config.parts.path`), with what it must be. A mistake is
found within a second, where importing torch alone may take ten. What takes longer to find, such as
a file that is damaged, is found by the command.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dino_simpool.names import PACKED_SUFFIXES, is_archive, is_compressed, is_image, is_no_data, kind_left_out, say_left_out

ENDINGS = ".jpg .png .webp .tif or another ending of images"
IMAGES = f"a folder with files at any depth ending in {ENDINGS}, or a text file with one path per line"
NAMES = {"train": ("train", "training", "trn"), "val": ("val", "valid", "validation", "dev", "test", "testing", "eval")}
"""Words by which the folders of a data set are recognized, for advice only."""
_SHOWN = 6  # entries of a folder that are named
_LOOKED_AT = 20_000  # files of a source; if none of these is an image, the command has to look


def check_paths(cfg: Any, prefix: str = "") -> None:
    """Look at every path among the options of a command.

    ValueError or OSError in one line for one that is missing, that holds no image where it must, or
    where nothing can be written.
    """
    for field in dataclasses.fields(cfg):
        value, name = getattr(cfg, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check_paths(value, f"{name}.")
        if "path" not in field.metadata or not cfg.needs(field.name):
            continue
        kind, needed = field.metadata["path"]
        if not value and needed:
            raise ValueError(needed)
        for path in filter(None, value if isinstance(value, tuple) else (value,)):
            _check(path, kind, name, inside="" if prefix else getattr(cfg, "data", ""))


def no_checkpoint(path: str | Path) -> str:
    """The line for a checkpoint that is no file."""
    what = "it is a folder, give a file in it, such as" if os.path.isdir(path) else "give"
    return f"no checkpoint {path}: {what} last.pth, best.pth or backbone.safetensors of a run"


def _check(path: str, kind: str, name: str, *, inside: str) -> None:
    match kind:
        case "images":
            _look_for_images(path)
        case "train" | "val":
            _look_for_images(find_split(path, inside=inside, option=f"--{name}", role=kind))
        case "checkpoint" if not os.path.isfile(path) and not path.startswith("timm:"):
            raise FileNotFoundError(no_checkpoint(path))
        case "weights" if not os.path.isfile(path) and path != "random":
            raise FileNotFoundError(f"no weights {path}: give a file, or random")
        case "folder" if not os.path.isdir(path):
            raise FileNotFoundError(
                f"{path} {'is no folder' if os.path.exists(path) else 'does not exist'}: give {name} a folder"
            )
        case "features" if not os.path.isdir(path):
            raise FileNotFoundError(
                f"{path} {'is no folder' if os.path.exists(path) else 'does not exist'}: give {name} encoder, or a folder that "
                "`extract` wrote (for knn also pixels)"
            )
        case "existing" if not os.path.exists(path):
            raise FileNotFoundError(f"{path} does not exist: correct {name}")
        case "run" if not os.path.isfile(os.path.join(path, "config.yaml")):
            raise ValueError(f"{path} holds no run (there is no config.yaml): give the run.out of a training run")
        case "out" if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0" and (reason := _not_writable(path)):
            raise ValueError(f"cannot write to {path} ({reason}): give another {name if '.' in name else f'--{name}'}")


def _look_for_images(root: str) -> None:
    """FileNotFoundError for a source that is missing, ValueError for a folder without images."""
    if not os.path.exists(root):
        raise FileNotFoundError(f"{root} does not exist: give a folder of images")
    left_out: Counter[str] = Counter()
    for seen, path in enumerate(_files_below(root) if os.path.isdir(root) else [root]):
        if is_image(path) or is_archive(path) or is_compressed(path) or path == root or seen > _LOOKED_AT:
            return
        left_out[kind_left_out(path)] += 1
    held = f" (left out: {say_left_out(left_out)})" if left_out else ""
    raise ValueError(f"no images in {root}{held}: give {IMAGES}")


def _files_below(root: str) -> Iterator[str]:
    """Paths of the files below a folder. Links to folders are followed once."""
    folders, followed = [root], {os.path.realpath(root)}
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if is_no_data(entry.name):
                        continue
                    if not entry.is_dir():
                        yield entry.path
                    elif not entry.is_symlink():
                        folders.append(entry.path)
                    elif (real := os.path.realpath(entry.path)) not in followed:
                        followed.add(real)
                        folders.append(entry.path)
        except PermissionError as error:
            raise PermissionError(f"{error.filename} cannot be read: change its permissions or give another folder") from error


def _not_writable(folder: str) -> str:
    """Why a folder cannot be made or written to; "" if it can."""
    place = os.path.abspath(folder)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def find_split(name: str, *, inside: str = "", option: str = "--val", role: str = "val") -> str:
    """The path of a part of a data set, inside/name, or the archive of it.

    FileNotFoundError if it is missing, with what is there instead. role: train or val.
    """
    root = folder_or_archive(os.path.join(inside, name))
    if os.path.exists(root):
        return root
    folder = Path(os.path.dirname(root) or ".")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{root} does not exist, {folder} is no folder: give the one that holds {os.path.basename(root)}"
        )
    visible = (path for path in sorted(folder.iterdir()) if not is_no_data(path.name))
    entries = [path for path in visible if path.is_dir() or is_archive(path.name)]
    if usable := [path for path in entries if set(_words(path)) & set(NAMES[role]) and _may_have_classes(path)]:
        advice = " or ".join(f"{option} {option_value(path, inside)}" for path in usable)
        raise FileNotFoundError(
            f"{root} does not exist, but there is {' and '.join(path.name for path in usable)}: give {advice}"
        )
    above = os.path.dirname(os.path.abspath(folder))
    if inside and os.path.exists(folder_or_archive(os.path.join(above, name))):
        raise FileNotFoundError(f"{root} does not exist, but {above} has {name}: give --data {shlex.quote(above)}")
    held = ", ".join(path.name for path in entries[:_SHOWN]) + (", ..." if len(entries) > _SHOWN else "")
    there = f"only {held}" if held else "nor any other folder"
    raise FileNotFoundError(f"{root} does not exist, {there}: give {option} NAME, a folder of the form NAME/CLASS/IMAGE")


def folder_or_archive(root: str) -> str:
    """`root`, or root.tar or root.zip if only such an archive exists."""
    archives = (root + suffix for suffix in PACKED_SUFFIXES)
    return root if os.path.exists(root) else next(filter(os.path.isfile, archives), root)


def _may_have_classes(path: Path) -> bool:
    """Whether a folder has folders in it, as class folders must; an archive may."""
    return not path.is_dir() or any(entry.is_dir() for entry in os.scandir(path))


def _words(path: Path) -> list[str]:
    stem = path.stem if is_archive(path.name) else path.name
    return re.split(r"[^a-z]+", stem.lower())


def option_value(path: Path, inside: str) -> str:
    """A path as an option's value; options of a command with --data are relative to that."""
    path = path.with_suffix("") if is_archive(path.name) else path
    return shlex.quote(os.path.relpath(path, inside) if inside else str(path))
