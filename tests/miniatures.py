"""Miniatures of the public data sets: their real layout, file names and formats, a few tiny images.

Each `write_*` takes the folder to create the data set's own folder in, and returns it. Images of
one class or landmark have one color, so the nearest neighbors are known. The content of the lists
is beside each builder.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat


def write_image(path: Path, color: str, *, seed: int = 0, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> None:
    """Noise around a color that depends on the word `color`.   size: (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    center = np.random.default_rng(list(color.encode())).integers(50, 206, 3)
    noise = np.random.default_rng(seed).integers(-20, 21, (size[1], size[0], 3))
    Image.fromarray((center + noise).clip(0, 255).astype(np.uint8)).convert(mode).save(path)


CUB = {
    "001.Black_footed_Albatross": 2,
    "100.Brown_Pelican": 1,
    "101.White_Pelican": 3,
    "150.Sage_Thrasher": 2,
    "200.Common_Yellowthroat": 1,  # alone in its class: it has no positive
}
"""Images of each class; the last three classes are test."""


def write_cub200(root: Path) -> Path:
    """CUB-200-2011 with a gray image and `._` files of macOS.

    Test: 6 images, labels 0 0 0 1 1 2.
    """
    folder, lines = root / "CUB_200_2011", []
    for label, (name, count) in enumerate(CUB.items()):
        for i in range(count):
            file = f"{name}/{name.partition('.')[2]}_{i + 1:04d}_{700 + i}.jpg"
            gray = name.startswith("150") and i == 1
            write_image(folder / "images" / file, name, seed=len(lines), mode="L" if gray else "RGB")
            lines.append((file, label))
        junk = f"._{name.partition('.')[2]}_0001_700.jpg"
        (folder / "images" / name / junk).write_bytes(b"\x00\x05\x16\x07")
    tables = {
        "images.txt": [file for file, _ in lines],
        "image_class_labels.txt": [str(int(file[:3])) for file, _ in lines],
        "train_test_split.txt": [str(i % 2) for i in range(len(lines))],  # divides each class: not the split of metric learning
        "bounding_boxes.txt": ["3.0 4.0 20.0 18.0" for _ in lines],
    }
    for name, values in tables.items():
        (folder / name).write_text("".join(f"{i} {value}\n" for i, value in enumerate(values, 1)))
    (folder / "classes.txt").write_text("".join(f"{int(name[:3])} {name}\n" for name in CUB))
    return root


CARS = [1, 1, 98, 99, 99, 150, 196, 196, 99]
"""The class of each image in the order of the file. The last six images are test."""


def write_cars196(root: Path) -> Path:
    """Cars196 with both halves in one file. Test: images 4 to 9, labels 0 0 1 2 2 0."""
    fields = ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")
    annotations = np.empty((1, len(CARS)), [(field, object) for field in fields])
    for i, number in enumerate(CARS):
        path = f"car_ims/{i + 1:06d}.jpg"
        write_image(root / "cars196" / path, f"car {number}", seed=i)
        annotations[0, i] = (path, np.uint16(3), np.uint8(2), np.uint16(38), np.uint16(28), np.uint8(number), np.uint8(i % 2))
    names = np.array([[f"Make Model {number}" for number in range(1, 197)]], object)
    savemat(str(root / "cars196" / "cars_annos.mat"), {"annotations": annotations, "class_names": names})
    return root


SOP = {
    "train": [(1, 1, 1, "bicycle_final/111085122871_0"), (2, 1, 1, "bicycle_final/111085122871_1")],
    "test": [
        (59552, 11319, 1, "bicycle_final/251952414262_0"),
        (59553, 11319, 1, "bicycle_final/251952414262_1"),
        (59554, 11320, 12, "table_final/251954012100_0"),
        (59555, 9999, 5, "fan_final/251954012164_2"),  # sorted as text, 9999 would come last
        (59556, 11320, 12, "table_final/251954012100_3"),
    ],
}
"""image_id, class_id, super_class_id, path without suffix."""


def write_sop(root: Path) -> Path:
    """Stanford Online Products. Test: 5 images, labels 1 1 2 0 2."""
    folder = root / "Stanford_Online_Products"
    for split, rows in SOP.items():
        for image, number, _, path in rows:
            write_image(folder / f"{path}.JPG", f"product {number}", seed=image)
        lines = [f"{image} {number} {group} {path}.JPG" for image, number, group, path in rows]
        (folder / f"Ebay_{split}.txt").write_text("\n".join(["image_id class_id super_class_id path", *lines]) + "\n")
    return root


INSHOP = [
    ("WOMEN/Dresses/id_00000002/02_1_front", "id_00000002", "train"),
    ("WOMEN/Dresses/id_00000002/02_2_side", "id_00000002", "train"),
    ("WOMEN/Blouses_Shirts/id_00000001/02_1_front", "id_00000001", "query"),
    ("WOMEN/Blouses_Shirts/id_00000001/02_2_side", "id_00000001", "gallery"),
    ("WOMEN/Blouses_Shirts/id_00000001/02_3_back", "id_00000001", "query"),
    ("MEN/Denim/id_00000080/01_1_front", "id_00000080", "query"),
    ("MEN/Denim/id_00000080/01_4_full", "id_00000080", "gallery"),
    ("MEN/Denim/id_00000080/01_7_additional", "id_00000080", "gallery"),
]
"""Path below img without suffix, item, part."""


def write_inshop(root: Path) -> Path:
    """In-Shop Clothes Retrieval. Queries: 3 images, labels 0 0 1; gallery: 3, labels 0 1 1."""
    folder = root / "Inshop_Clothes"
    lines = [f"{len(INSHOP)}", "image_name item_id evaluation_status"]
    for i, (path, item, part) in enumerate(INSHOP):
        write_image(folder / "Img" / "img" / f"{path}.jpg", item, seed=i)
        lines.append(f"{f'img/{path}.jpg':<75}{item:<14}{part}")
    (folder / "Eval").mkdir()
    (folder / "Eval" / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return root


LANDMARKS: dict[str, dict[str, Any]] = {
    "roxford5k": {
        "imlist": [f"{word}_{i:06d}" for word in ("all_souls", "ashmolean", "magdalen", "oxford") for i in range(3)],
        "qimlist": ["all_souls_000013", "ashmolean_000058", "magdalen_000078"],
        "gnd": [
            {"bbx": [6.4, 4.6, 50.5, 40.2], "easy": [0, 1], "hard": [2], "junk": [9]},
            {"bbx": [0.0, 0.0, 60.0, 45.0], "easy": [4], "hard": [], "junk": [3, 5]},
            {"bbx": [10.0, 5.0, 30.0, 44.0], "easy": [], "hard": [6, 7], "junk": []},  # no positives in the Easy protocol
        ],
    },
    "rparis6k": {
        "imlist": [f"paris_{word}_{i:06d}" for word in ("defense", "eiffel") for i in range(3)],
        "qimlist": ["paris_defense_000605", "paris_eiffel_000128"],
        "gnd": [
            {"bbx": [1.5, 2.5, 40.0, 30.0], "easy": [0], "hard": [1, 2], "junk": []},
            {"bbx": [3.0, 3.0, 33.0, 33.0], "easy": [3, 4], "hard": [], "junk": [5]},
        ],
    },
}
"""The content of the ground truth.

Colors depend on the word before the number. Queries are 60 x 45.
"""


def write_landmarks(root: Path, name: str) -> Path:
    """ROxford or RParis: a pickle of protocol 2, some of its lists numpy arrays, and jpg/."""
    truth = LANDMARKS[name]
    for i, image in enumerate([*truth["imlist"], *truth["qimlist"]]):
        size = (60, 45) if image in truth["qimlist"] else (36 + 4 * (i % 5), 60 - 3 * (i % 7))
        write_image(root / name / "jpg" / f"{image}.jpg", image.rpartition("_")[0], seed=i, size=size)
    entries = [
        {"bbx": entry["bbx"], "easy": np.array(entry["easy"], np.int64), "hard": entry["hard"], "junk": np.array(entry["junk"])}
        for entry in truth["gnd"]
    ]  # np.array([]) has floats, like any empty list
    (root / name / f"gnd_{name}.pkl").write_bytes(pickle.dumps(truth | {"gnd": entries}, protocol=2))
    return root


def write_roxford5k(root: Path) -> Path:
    return write_landmarks(root, "roxford5k")


def write_rparis6k(root: Path) -> Path:
    return write_landmarks(root, "rparis6k")


def write_folder(root: Path) -> Path:
    """Class folders. 4 images, labels 0 0 1 1."""
    for i, name in enumerate(("ant/a1.png", "ant/a2.png", "bee/b1.png", "bee/b2.png")):
        write_image(root / name, name[:3], seed=i)
    return root


def write_imagenet(root: Path) -> Path:
    """Two of the 1,000 classes: 3 + 2 training and 1 + 1 validation images."""
    for name, train, val in (("n01440764", 3, 1), ("n01443537", 2, 1)):
        for i in range(train):
            write_image(root / "train" / name / f"{name}_{10026 + i}.JPEG", name, seed=i)
        for i in range(val):
            write_image(root / "val" / name / f"ILSVRC2012_val_{int(name[1:]) + i:08d}.JPEG", name, seed=100 + i)
    return root


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "cub200": write_cub200,
    "cars196": write_cars196,
    "sop": write_sop,
    "inshop": write_inshop,
    "folder": write_folder,
    "roxford5k": write_roxford5k,
    "rparis6k": write_rparis6k,
    "imagenet": write_imagenet,
}
