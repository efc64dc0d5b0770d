"""The embedded data set: reproducible, cleanly split, correctly annotated, not solved by colors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_simpool import synthetic

SIZE = 40
NAMES = list(synthetic.SHAPES)
SETTINGS = {"seed": 3, "classes": 4, "train_per_class": 3, "val_per_class": 2, "size": 24}


def draw_split(first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (M, S, S, 3) in 0..1, masks (M, S, S) and classes (M,): `count` drawings of every
    class."""
    drawn = [(*synthetic.draw_image(0, c, first + i, size=SIZE), c) for c in range(len(NAMES)) for i in range(count)]
    images, masks, classes = zip(*drawn, strict=True)
    return np.stack(images) / 255, np.stack(masks), np.array(classes)


@pytest.fixture(scope="module")
def train() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return draw_split(0, 80)


@pytest.fixture(scope="module")
def val() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return draw_split(synthetic.FIRST_VAL_NUMBER, 30)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "new" / "set"
    synthetic.write_dataset(folder, **SETTINGS)
    return folder


def ridge_accuracy(bank: np.ndarray, bank_classes: np.ndarray, query: np.ndarray, classes: np.ndarray) -> float:
    """Linear probe in closed form with the best regularization for the queries: an upper bound."""
    mean, scale = bank.mean(0), bank.std(0) + 1e-6
    bank, query = (bank - mean) / scale, (query - mean) / scale
    targets = np.eye(len(NAMES))[bank_classes] - 1 / len(NAMES)
    kernel, cross = bank @ bank.T / bank.shape[1], query @ bank.T / bank.shape[1]
    scores = [cross @ np.linalg.solve(kernel + strength * np.eye(len(bank)), targets) for strength in 10.0 ** np.arange(-3, 4)]
    return max(float((s.argmax(1) == classes).mean()) for s in scores)


def pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


def color_histogram(images: np.ndarray) -> np.ndarray:
    """Square roots of the fractions of pixels in 4 x 4 x 4 joint bins and 16 bins per channel: (M,
    112)."""
    cells = np.minimum((images * 4).astype(int), 3) @ (16, 4, 1)
    joint = np.stack([np.bincount(c.ravel(), minlength=64) for c in cells])
    fine = np.minimum((images * 16).astype(int), 15)
    single = [np.stack([np.bincount(f[..., channel].ravel(), minlength=16) for f in fine]) for channel in range(3)]
    return np.sqrt(np.concatenate([joint, *single], axis=1) / images[0, ..., 0].size)


def test_same_arguments_give_the_same_image_and_each_argument_matters() -> None:
    rgb, mask = synthetic.draw_image(1, 2, 3, size=SIZE)
    again, mask_again = synthetic.draw_image(1, 2, 3, size=SIZE)
    assert rgb.shape == (SIZE, SIZE, 3) and rgb.dtype == np.uint8 and mask.shape == (SIZE, SIZE) and mask.dtype == bool
    assert np.array_equal(rgb, again) and np.array_equal(mask, mask_again)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not np.array_equal(rgb, synthetic.draw_image(*other, size=SIZE)[0])


def test_drawing_does_not_change_the_global_random_state() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    synthetic.draw_image(0, 0, 0, size=SIZE)
    assert np.array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize("class_id", range(len(NAMES)), ids=NAMES)
def test_odd_and_small_sizes_and_an_object_fully_inside(class_id: int) -> None:
    for size in (16, 33):
        rgb, mask = synthetic.draw_image(0, class_id, 0, size=size)
        assert rgb.shape == (size, size, 3) and mask.any()
    for number in range(20):
        mask = synthetic.draw_image(0, class_id, number, size=SIZE)[1]
        rim = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert rim.mean() < 0.1, "an object is cut off by the border of the image"


@pytest.mark.parametrize("wrong", [(0, 10, 0, 40), (0, -1, 0, 40), (-1, 0, 0, 40), (0, 0, -1, 40), (0, 0, 0, 15)])
def test_wrong_arguments_are_one_clear_line(wrong: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="give a class from 0 to 9") as error:
        synthetic.draw_image(*wrong[:3], size=wrong[3])
    assert "\n" not in str(error.value)


def test_area_stays_in_its_range_and_belongs_to_no_class(train: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    _, masks, classes = train
    area = masks.mean((1, 2))
    lowest, highest = synthetic.AREA
    assert lowest - 0.03 < area.min() and area.max() < highest + 0.03
    assert area.std() > 0.25 * (highest - lowest) / math.sqrt(12), "scale hardly varies"
    per_class = np.array([area[classes == c].mean() for c in range(len(NAMES))])
    assert np.abs(per_class - area.mean()).max() < 0.25 * (highest - lowest)


def test_place_and_pose_vary(train: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    _, masks, classes = train
    grid = np.arange(SIZE) + 0.5
    center = np.stack([(masks.sum(1) * grid).sum(1), (masks.sum(2) * grid).sum(1)], 1) / masks.sum((1, 2))[:, None]
    assert (center.std(0) > 0.06 * SIZE).all() and np.abs(center.mean(0) - SIZE / 2).max() < 0.04 * SIZE
    leaf = masks[classes == NAMES.index("leaf")].astype(float)
    x, y = grid - center[classes == NAMES.index("leaf"), :1], grid - center[classes == NAMES.index("leaf"), 1:]
    slant = (leaf * x[:, None, :] * y[:, :, None]).mean((1, 2))
    assert (slant > 0).any() and (slant < 0).any()


def test_raw_pixels_and_colors_do_not_give_the_class_to_a_linear_probe(
    train: tuple[np.ndarray, np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    for describe in (pixels, color_histogram):
        assert ridge_accuracy(describe(train[0]), train[2], describe(val[0]), val[2]) < 0.5


def test_the_probes_would_notice_a_color_that_belongs_to_a_class(
    train: tuple[np.ndarray, np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    tints = np.random.default_rng(0).uniform(0.3, 1, (len(NAMES), 3))
    for describe in (pixels, color_histogram):
        bank, query = (describe(images * tints[classes][:, None, None]) for images, _, classes in (train, val))
        assert ridge_accuracy(bank, train[2], query, val[2]) > 0.6


def test_the_outline_tells_the_class_once_the_object_is_cut_out(
    train: tuple[np.ndarray, np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    def cut_out(masks: np.ndarray) -> np.ndarray:
        boxes = [mask[np.ix_(mask.any(1), mask.any(0))] for mask in masks]
        return np.stack([np.asarray(Image.fromarray(b).resize((16, 16)), np.float64).ravel() for b in boxes])

    accuracy = ridge_accuracy(cut_out(train[1]), train[2], cut_out(val[1]), val[2])
    assert accuracy > 0.5, f"classes are not class-typical: {accuracy}"


def test_tree_is_balanced_named_and_annotated(tree: Path) -> None:
    record = json.loads((tree / "annotations.json").read_text())
    assert record["settings"] == {"format": synthetic.FORMAT, **SETTINGS}
    assert record["classes"] == NAMES[:4] == sorted(NAMES)[:4]
    assert sorted(p.name for p in tree.iterdir()) == ["annotations.json", "masks", "train", "val"]
    on_disk = sorted(str(p.relative_to(tree)) for split in ("train", "val") for p in (tree / split).rglob("*.png"))
    assert on_disk == sorted(entry["image"] for entry in record["images"])
    for split, count in (("train", 3), ("val", 2)):
        assert sorted(p.name for p in (tree / split).iterdir()) == NAMES[:4]
        assert all(len(list((tree / split / name).iterdir())) == count for name in NAMES[:4])
    for entry in record["images"]:
        assert entry["image"].split("/")[:2] == [entry["split"], entry["class"]] and entry["mask"] == f"masks/{entry['image']}"


def test_masks_match_boxes_and_images_match_their_numbers(tree: Path) -> None:
    for entry in json.loads((tree / "annotations.json").read_text())["images"]:
        mask = np.asarray(Image.open(tree / entry["mask"])) > 0
        x0, y0, x1, y1 = entry["box"]
        outside = mask.copy()
        outside[y0:y1, x0:x1] = False
        assert not outside.any() and mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()
        number = int(entry["image"][-8:-4]) + (synthetic.FIRST_VAL_NUMBER if entry["split"] == "val" else 0)
        rgb, drawn_mask = synthetic.draw_image(3, NAMES.index(entry["class"]), number, size=24)
        image = Image.open(tree / entry["image"])
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), rgb) and np.array_equal(mask, drawn_mask)


def test_no_image_is_in_both_splits_or_twice(tree: Path) -> None:
    files = [p.read_bytes() for split in ("train", "val") for p in (tree / split).rglob("*.png")]
    assert len(set(files)) == len(files) == 4 * (3 + 2)


def test_a_longer_set_begins_with_the_shorter_one(tree: Path, tmp_path: Path) -> None:
    synthetic.write_dataset(tmp_path / "longer", **{**SETTINGS, "train_per_class": 5})
    for path in (tree / "train").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "longer" / path.relative_to(tree)).read_bytes()


def test_the_same_set_is_reused_with_a_message(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in tree.rglob("*")}
    synthetic.write_dataset(tree, **SETTINGS)
    assert "already holds this set" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in tree.rglob("*")}


def test_anything_else_in_the_folder_is_refused_and_left(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not empty and does not hold the set"):
        synthetic.write_dataset(tree, **{**SETTINGS, "seed": 4})
    (tmp_path / "note.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "note.txt"):
        with pytest.raises(ValueError, match="give another folder"):
            synthetic.write_dataset(folder, **SETTINGS)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "annotations.json").write_text('{"settings": ')
    with pytest.raises(ValueError, match="does not hold the set"):
        synthetic.write_dataset(tmp_path / "broken", **SETTINGS)
    assert (tmp_path / "note.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_set_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    with monkeypatch.context() as patch:
        draw = synthetic.draw_image

        def stops(seed: int, class_id: int, number: int, *, size: int) -> tuple[np.ndarray, np.ndarray]:
            if class_id == 2:
                raise KeyboardInterrupt
            return draw(seed, class_id, number, size=size)

        patch.setattr(synthetic, "draw_image", stops)
        with pytest.raises(KeyboardInterrupt):
            synthetic.write_dataset(tmp_path / "set", **SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["set"] and not any((tmp_path / "set").iterdir())
    synthetic.write_dataset(tmp_path / "set", **SETTINGS)
    assert (tmp_path / "set" / "annotations.json").is_file() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("wrong", [{"classes": 0}, {"classes": 11}, {"train_per_class": 0}, {"val_per_class": -1}, {"size": 8}])
def test_settings_out_of_range_write_nothing(wrong: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give "):
        synthetic.write_dataset(tmp_path / "set", **{**SETTINGS, **wrong})
    assert not any(tmp_path.iterdir())


def test_needs_no_torch() -> None:
    code = "import sys, dino_simpool.synthetic as s; s.draw_image(0, 0, 0, size=16); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
