#!/usr/bin/env python3
"""Class folders and lists as people have them: folders.py OUT. See README.md for what must hold."""

import random
import shutil
import sys
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
CLASSES = ("boot", "hat", "shirt")


def pictures(folder: Path, count: int, seed: int) -> None:
    """`count` variations of the reference photograph, told apart by class through their colours."""
    base = np.asarray(Image.open(HERE / "images" / "ref.png").convert("RGB").resize((48, 32))).astype(float)
    draw = random.Random(f"{folder.name}{seed}")
    tint = np.array([draw.uniform(0.4, 1) for _ in range(3)])
    for number in range(count):
        shift = np.roll(base, (draw.randrange(32), draw.randrange(48)), (0, 1)) * tint + draw.uniform(-20, 20)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shift.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.jpg", quality=92)


def classes(root: Path, train: int = 20, val: int = 6) -> Path:
    for split, count in (("train", train), ("val", val)):
        for name in CLASSES:
            pictures(root / split / name, count, seed=len(split))
    return root


def main(out: Path) -> None:
    nas = classes(out / "nas")
    for image in list(nas.rglob("*.jpg")):
        thumbnails = image.parent / "@eaDir" / image.name
        thumbnails.mkdir(parents=True)
        shutil.copy(image, thumbnails / "SYNOPHOTO_THUMB_M.jpg")
    mac = classes(out / "mac")
    for image in list(mac.rglob("*.jpg")):
        side = mac / image.relative_to(mac).parts[0] / "__MACOSX" / image.parent.name
        side.mkdir(parents=True, exist_ok=True)
        (side / f"._{image.name}").write_bytes(b"\0\5\x16\7\0\2")
    lost = classes(out / "lost")
    (lost / "train" / "lost+found").mkdir()
    (lost / "val" / "lost+found").mkdir()
    for split in ("test", "valid"):
        other = classes(out / split)
        (other / "val").rename(other / split)
    flat = classes(out / "flatval")
    rows = []
    for image in sorted((flat / "val").rglob("*.jpg")):
        name = f"{image.parent.name}_{image.name}"
        rows.append(f"val/{name} {image.parent.name}")
        image.rename(flat / "val" / name)
    for name in CLASSES:
        (flat / "val" / name).rmdir()
    (flat / "val.txt").write_text("\n".join(rows) + "\n")
    shards, source = out / "shards", classes(out / "shards_source")
    for split in ("train", "val"):
        (shards / split).mkdir(parents=True, exist_ok=True)
        with tarfile.open(shards / split / "000000.tar", "w") as archive:
            for number, image in enumerate(sorted((source / split).rglob("*.jpg"))):
                archive.add(image, f"{number:06}.jpg")
                label = out / "label"
                label.write_text(str(CLASSES.index(image.parent.name)))
                archive.add(label, f"{number:06}.cls")
    (out / "label").unlink()
    shutil.rmtree(source)
    leak = classes(out / "leak")
    for name in CLASSES:
        for number in range(6):
            shutil.copy(leak / "train" / name / f"{number:03}.jpg", leak / "val" / name / f"copy_{number}.jpg")
    accents = classes(out / "accents")
    for split, form in (("train", "NFC"), ("val", "NFD")):
        (accents / split / "hat").rename(accents / split / unicodedata.normalize(form, "Kätzchen"))
    lists = out / "lists"
    pictures(lists, 1, 0)
    first = lists / "000.jpg"
    names = (
        "#sunset.jpg",
        " padded .jpg",
        "100% (copy).jpg",
        "a\u2028b.jpg",
        "new\nline.jpg",
        "red\x1b[31m.jpg",
        "<script>alert(1)</script>.jpg".replace("/", "-"),
        "山" * 80 + ".jpg",
    )
    for name in names:
        shutil.copy(first, lists / name)
    (lists / "hash.txt").write_text("#sunset.jpg\n100% (copy).jpg\n")
    (lists / "labels.csv").write_text("path,label\n000.jpg,hat\n")
    (lists / "quoted.txt").write_text('"000.jpg"\n')
    (lists / "windows.txt").write_text(".\\000.jpg\r\n")
    (lists / "uri.txt").write_text(f"{first.absolute().as_uri()}\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
