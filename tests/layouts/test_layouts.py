"""Data sets in their official layouts: what is read, what is missing, and malicious pickles."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from miniatures import BUILDERS, LANDMARKS, write_image
from PIL import Image

from dino_simpool.data.sources import ImageSet
from dino_simpool.layouts import LAYOUTS, check_layout, differing_counts, ground_truth, part_counts
from dino_simpool.layouts.ground_truth import load_plain_pickle, read_ground_truth
from dino_simpool.layouts.landmarks import landmarks, lenient
from dino_simpool.layouts.metric_learning import fine_grained

QUERIES: dict[str, tuple[list[int], tuple[str, ...], str]] = {
    "cub200": (
        [0, 0, 0, 1, 1, 2],
        ("101.White_Pelican", "150.Sage_Thrasher", "200.Common_Yellowthroat"),
        "images/150.Sage_Thrasher/Sage_Thrasher_0002_701.jpg",
    ),
    "cars196": ([0, 0, 1, 2, 2, 0], ("99", "150", "196"), "car_ims/000008.jpg"),
    "sop": ([1, 1, 2, 0, 2], ("9999", "11319", "11320"), "table_final/251954012100_3.JPG"),
    "inshop": ([0, 0, 1], ("id_00000001", "id_00000080"), "Img/img/MEN/Denim/id_00000080/01_1_front.jpg"),
    "folder": ([0, 0, 1, 1], ("ant", "bee"), "bee/b1.png"),
}
"""Labels, classes and one path of the queries in each miniature."""


@pytest.mark.parametrize("layout", QUERIES)
def test_the_test_split_of_metric_learning(layout: str, tmp_path: Path) -> None:
    images, gallery = fine_grained(layout, str(BUILDERS[layout](tmp_path)))
    labels, classes, path = QUERIES[layout]
    assert images.labels is not None
    assert (images.labels.tolist(), images.classes) == (labels, classes)
    assert images.labels.dtype == np.int64 and path in images.paths
    assert all(images.read(i).mode == "RGB" for i in range(len(images)))  # one of CUB's is gray
    if layout != "inshop":
        assert gallery is None
        return
    assert gallery is not None and gallery.labels is not None
    assert gallery.labels.tolist() == [0, 1, 1] and gallery.classes == classes
    assert not set(gallery.paths) & set(images.paths)


@pytest.mark.parametrize("layout", ["cub200", "cars196", "sop", "inshop"])
def test_the_root_may_be_the_folder_itself(layout: str, tmp_path: Path) -> None:
    [folder] = list(BUILDERS[layout](tmp_path).iterdir())
    inside, outside = fine_grained(layout, str(folder))[0], fine_grained(layout, str(tmp_path))[0]
    assert inside.path(0) == outside.path(0) and inside.digest() == outside.digest()


@pytest.mark.parametrize("name", LANDMARKS)
@pytest.mark.parametrize("kind", ["pickle", "json", "both"])
def test_landmarks(name: str, kind: str, tmp_path: Path) -> None:
    BUILDERS[name](tmp_path)
    truth = LANDMARKS[name]
    if kind != "pickle":
        (tmp_path / name / f"gnd_{name}.json").write_text(json.dumps(truth))
    if kind == "json":
        (tmp_path / name / f"gnd_{name}.pkl").unlink()
    database, queries, relevant = landmarks(name, str(tmp_path))
    assert [Path(path).stem for path in database.paths] == truth["imlist"] and database.labels is None
    assert [Path(path).stem for path in queries.paths] == truth["qimlist"]
    for found, entry in zip(relevant, truth["gnd"], strict=True):
        assert {key: values.tolist() for key, values in found.items()} == {key: entry[key] for key in ("easy", "hard", "junk")}
        assert {values.dtype for values in found.values()} == {np.dtype(np.int64)}
    left, top, right, bottom = (round(side) for side in truth["gnd"][0]["bbx"])
    whole = Image.open(tmp_path / name / "jpg" / f"{truth['qimlist'][0]}.jpg")
    assert queries.read(0).tobytes() == whole.crop((left, top, right, bottom)).tobytes()
    assert database.boxes is None and queries.boxes is not None and queries.boxes.shape == (len(queries), 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_miniature_lacks_nothing_but_images(layout: str, tmp_path: Path) -> None:
    problems = check_layout(layout, str(BUILDERS[layout](tmp_path)))
    assert len(problems) == len(LAYOUTS[layout].counts)
    assert all(line.startswith(f"{layout}: ") and line.endswith(" expected") for line in problems)
    if layout == "imagenet":
        assert problems[0] == "imagenet: train: 5 found, 1,281,167 expected"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_folder_is_no_data_set(layout: str, tmp_path: Path) -> None:
    [first, *rest] = check_layout(layout, str(tmp_path))
    assert str(tmp_path) in first and ("missing" in first or "no class folders" in first)
    assert len(rest) == (layout == "imagenet")
    if layout != "imagenet":
        read = fine_grained if layout in QUERIES else landmarks
        with pytest.raises(ValueError) as error:
            read(layout, str(tmp_path))
        assert str(error.value) == first


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


DAMAGES: list[tuple[str, Any, str]] = [
    (
        "cub200",
        lambda root: (root / "CUB_200_2011/images/101.White_Pelican/White_Pelican_0002_701.jpg").unlink(),
        "1 of 6 images that images.txt names are missing, the first .*White_Pelican_0002_701.jpg",
    ),
    (
        "cub200",
        lambda root: replaced(root / "CUB_200_2011/images.txt", "101.White_Pelican/", "White_Pelican/"),
        "folder White_Pelican has no class number",
    ),
    (
        "cub200",
        lambda root: replaced(root / "CUB_200_2011/images.txt", "2 001.Black", "2 extra 001.Black"),
        "images.txt, line 2: 3 columns instead of 2",
    ),
    ("cub200", lambda root: (root / "CUB_200_2011/images.txt").write_text(""), "images.txt lists no images"),
    (
        "cars196",
        lambda root: shutil.rmtree(root / "cars196/car_ims"),
        "6 of 6 images that cars_annos.mat names are missing, the first .*car_ims/000004.jpg",
    ),
    (
        "cars196",
        lambda root: (root / "cars196/cars_annos.mat").write_bytes(b"no matlab file at all" * 20),
        "cars_annos.mat holds no annotations with relative_im_path and class",
    ),
    (
        "sop",
        lambda root: replaced(root / "Stanford_Online_Products/Ebay_test.txt", "image_id class_id super_class_id path\n", ""),
        "Ebay_test.txt has no line 1 with the names image_id class_id super_class_id path",
    ),
    (
        "sop",
        lambda root: replaced(root / "Stanford_Online_Products/Ebay_test.txt", "100_3.JPG", "100_0.JPG"),
        "names table_final/251954012100_0.JPG more than once",
    ),
    (
        "inshop",
        lambda root: replaced(root / "Inshop_Clothes/Eval/list_eval_partition.txt", "8\n", "52712\n"),
        "list_eval_partition.txt announces 52712 images and lists 8",
    ),
    (
        "inshop",
        lambda root: replaced(root / "Inshop_Clothes/Eval/list_eval_partition.txt", "gallery", "galery "),
        "evaluation_status galery: known are train, query and gallery",
    ),
    (
        "inshop",
        lambda root: (root / "Inshop_Clothes/Img/img").rename(root / "Inshop_Clothes/Img/img_small"),
        "3 of 3 images that Eval/list_eval_partition.txt names are missing",
    ),
    ("folder", lambda root: (root / "cat").mkdir(), "class folder cat has no images"),
    (
        "folder",
        lambda root: write_image(root / "loose.png", "loose"),
        "loose.png and 0 other images in .* are not in a class folder",
    ),
    (
        "roxford5k",
        lambda root: (root / "roxford5k/jpg/oxford_000002.jpg").unlink(),
        "database: 1 of 12 images that the ground truth names are missing, the first .*oxford_000002.jpg",
    ),
    (
        "rparis6k",
        lambda root: (root / "rparis6k/gnd_rparis6k.pkl").write_bytes(pickle.dumps(LANDMARKS["rparis6k"])[:90]),
        "gnd_rparis6k.pkl",
    ),
    ("imagenet", lambda root: shutil.rmtree(root / "val"), "val is missing: give a folder with train/CLASS/IMAGE"),
    (
        "imagenet",
        lambda root: (root / "val/n01443537").rename(root / "val/n09999999"),
        "1 classes are not in val, the first n01443537",
    ),
    (
        "imagenet",
        lambda root: write_image(root / "val/ILSVRC2012_val_00000001.JPEG", "x"),
        "1 images are not in a class folder, the first ILSVRC2012_val_00000001.JPEG",
    ),
    ("imagenet", lambda root: (root / "train/n02000000").mkdir(), "train/n02000000: the class folder has no images"),
]


@pytest.mark.parametrize(("layout", "damage", "message"), DAMAGES, ids=[message for _, _, message in DAMAGES])
def test_what_is_wrong_is_reported(layout: str, damage: Any, message: str, tmp_path: Path) -> None:
    root = str(BUILDERS[layout](tmp_path))
    before = check_layout(layout, root)
    damage(tmp_path)
    found = [line for line in check_layout(layout, root) if line not in before]
    assert re.search(message, found[0]), found
    assert all("\n" not in line for line in found)
    if layout != "imagenet":
        read = fine_grained if layout in QUERIES else landmarks
        with pytest.raises(ValueError, match=message):
            read(layout, root)


def test_each_missing_file_is_named(tmp_path: Path) -> None:
    BUILDERS["roxford5k"](tmp_path)
    names = [f"{name}.jpg" for name in LANDMARKS["roxford5k"]["imlist"][2:5]]
    for name in names:
        (tmp_path / "roxford5k/jpg" / name).unlink()
    folder = tmp_path / "roxford5k/jpg"
    said = f"are missing, the first {folder / names[0]}, then jpg/{names[1]}, jpg/{names[2]}"
    assert check_layout("roxford5k", str(tmp_path))[0] == f"database: 3 of 12 images that the ground truth names {said}"


def test_imagenet_in_archives(tmp_path: Path) -> None:
    root = BUILDERS["imagenet"](tmp_path)
    expected = check_layout("imagenet", str(root))
    for split in ("train", "val"):
        shutil.make_archive(str(root / split), "tar", root / split)
        shutil.rmtree(root / split)
    assert check_layout("imagenet", str(root)) == expected and expected[0].startswith("imagenet: train: 5 found")
    (root / "val.tar").write_bytes(b"")
    assert "val.tar cannot be read as an archive" in check_layout("imagenet", str(root))[0]


def test_accents_of_class_folders_may_be_stored_in_two_ways(tmp_path: Path) -> None:
    """In train and val, but not in one of them."""
    root = BUILDERS["imagenet"](tmp_path)
    expected = check_layout("imagenet", str(root))
    composed, decomposed = "K\u00e4tzchen", "Ka\u0308tzchen"
    for split, name in (("train", composed), ("val", decomposed)):
        first = sorted((root / split).iterdir())[0]
        first.rename(first.with_name(name))
    assert check_layout("imagenet", str(root)) == expected
    shutil.copytree(root / "val" / decomposed, root / "val" / composed)
    said = r"class folders 'Ka\u0308tzchen' and 'K\xe4tzchen' have one name, with its accents stored in two ways"
    assert f"{root / 'val'}: {said}" in check_layout("imagenet", str(root))


def test_all_problems_are_listed_and_the_reader_says_how_many(tmp_path: Path) -> None:
    BUILDERS["inshop"](tmp_path)
    for part in ("01_1_front", "01_4_full"):  # a query and a gallery image
        (tmp_path / f"Inshop_Clothes/Img/img/MEN/Denim/id_00000080/{part}.jpg").unlink()
    first, second, *counts = check_layout("inshop", str(tmp_path))
    assert "queries: 1 of 3" in first and "gallery: 1 of 3" in second and len(counts) == 3
    with pytest.raises(ValueError, match=r"queries: 1 of 3 .*01_1_front.jpg \(and 1 more problems\)$"):
        fine_grained("inshop", str(tmp_path))


def test_other_files_do_not_matter_where_lists_say_what_belongs(tmp_path: Path) -> None:
    for layout, file in (
        ("cub200", "CUB_200_2011/images/101.White_Pelican/extra.jpg"),
        ("sop", "Stanford_Online_Products/fan_final/extra.JPG"),
    ):
        root = str(BUILDERS[layout](tmp_path))
        before, images = check_layout(layout, root), fine_grained(layout, root)[0]
        write_image(tmp_path / file, "extra")
        after = check_layout(layout, root)
        assert after == before and not before.notes
        assert after.notes == [f"1 images that no list names are not used, the first {tmp_path / file}"]
        assert fine_grained(layout, root)[0].digest() == images.digest()


def test_unknown_layouts() -> None:
    with pytest.raises(ValueError, match="no layout cub: known are cub200, cars196"):
        check_layout("cub", ".")
    with pytest.raises(ValueError, match="no layout roxford5k here: known are cub200, cars196, sop, inshop, folder"):
        fine_grained("roxford5k", ".")
    with pytest.raises(ValueError, match="no layout cub200 here: known are roxford5k, rparis6k"):
        landmarks("cub200", ".")


def test_counts(tmp_path: Path) -> None:
    queries, gallery = fine_grained("inshop", str(BUILDERS["inshop"](tmp_path)))
    assert gallery is not None
    counts = part_counts({"queries": queries, "gallery": gallery})
    assert counts == {"queries": 3, "gallery": 3, "classes": 2}
    assert differing_counts("inshop", counts | {"classes": 3_985}) == [
        "inshop: queries: 3 found, 14,218 expected",
        "inshop: gallery: 3 found, 12,612 expected",
    ]
    assert differing_counts("cub200", {"queries": 5_924, "classes": 100}) == []
    assert differing_counts("folder", {"queries": 1}) == []


def test_a_truncated_landmark_image_is_read_with_a_warning(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg", "a", size=(64, 64))
    whole = np.asarray(Image.open(tmp_path / "a.jpg"), np.int64)
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) * 3 // 4])
    strict = ImageSet(str(tmp_path), np.array(["a.jpg"]))
    with pytest.raises(ValueError, match="cannot be read"):
        strict.read(0)
    with pytest.warns(UserWarning, match="a.jpg cannot be read.*the readable part is used"):
        image = np.asarray(lenient(strict).read(0), np.int64)
    assert image.shape == (64, 64, 3) and np.array_equal(image[:8], whole[:8])
    assert np.abs(image[-8:] - whole[-8:]).max() > 20
    with pytest.raises(ValueError, match="cannot be read"):  # the exception was for that image only
        strict.read(0)
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be read"):
        lenient(strict).read(0)


# -- pickles


def is_plain(content: Any) -> bool:
    """Whether it has only containers, text, bytes, numbers, arrays and dtypes, and names allowed in
    pickles."""
    if type(content) is np.ndarray and content.dtype.hasobject:
        return all(map(is_plain, content.ravel().tolist()))
    if type(content) is dict:
        return all(map(is_plain, [*content, *content.values()]))
    if type(content) in (list, tuple, set, frozenset):
        return all(map(is_plain, content))
    kinds = (type(None), bool, int, float, str, bytes, bytearray, np.ndarray, np.generic, np.dtype)
    return isinstance(content, kinds) or content in ground_truth._CALLABLE.values()


def interpreter() -> list[Any]:
    """What a pickle might change silently: the modules, and the functions that it may call."""
    allowed = dict(ground_truth._CALLABLE)
    functions = [each for each in allowed.values() if inspect.isfunction(each)]
    return [set(sys.modules), allowed, [(each.__code__, each.__defaults__, dict(vars(each))) for each in functions]]


def effects(pickles: list[bytes], load: Callable[[io.BytesIO], Any] = load_plain_pickle) -> set[str]:
    """Side effects of loading pickles, besides returning plain data or raising.

    Files that it opens, modules, names, processes, code: whatever Python tells audit hooks. These
    can never be removed, so that it is loaded in a process of its own. EOFError if that crashes.
    """

    def watch() -> None:
        found: set[str] = set()
        watched = False
        for protocol in range(6):  # the codecs that plain data needs are imported by now
            load_plain_pickle(io.BytesIO(pickle.dumps(["ü", b"\xff", 0.5, np.arange(2), np.array(["a"])], protocol)))
        before = interpreter()
        sys.addaudithook(lambda event, _: found.add(event) if watched else None)
        for data in pickles:
            content, file = None, io.BytesIO(data)
            watched = True
            with contextlib.suppress(Exception):
                content = load(file)
            watched = False
            if not is_plain(content):
                found.add(f"makes a {type(content).__name__}")
            with contextlib.suppress(Exception):
                repr(content)  # reads all of it; text may have invalid letters
        if interpreter() != before:
            found.add("changes the interpreter")
        sender.send(found)

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=watch, daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_any_protocol(protocol: int, tmp_path: Path) -> None:
    content = {
        "list": [1, 2.5, "ü", None, True, b"\xff\x00", b"", (3,), {4}, frozenset([5])],
        "arrays": [
            np.arange(5),
            np.zeros((2, 3), np.float32),
            np.array([]),
            np.array(["a", "bc"]),
            np.array([[1], "x"], object),
        ],
        "scalars": [np.float64(1.5), np.int32(7), np.bool_(True), np.dtype("<f4")],
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    with (tmp_path / "a.pkl").open("rb") as file:
        found = load_plain_pickle(file)
    assert found["list"] == content["list"] and found["scalars"] == content["scalars"]
    for array, expected in zip(found["arrays"], content["arrays"], strict=True):
        assert array.dtype == expected.dtype and np.array_equal(array, expected)


def test_a_pickle_of_an_old_numpy_and_of_python_2(tmp_path: Path) -> None:
    """numpy 1 calls its module numpy.core.

    Python 2 wrote array bytes and all text as plain strings.
    """
    old = pickle.dumps({"a": np.arange(3)}, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old
    python2 = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\x07\xfftb."
    )
    for data, expected in ((old, {"a": np.arange(3)}), (python2, np.array([7, 255], np.uint8))):
        (tmp_path / "a.pkl").write_bytes(data)
        with (tmp_path / "a.pkl").open("rb") as file:
            found = load_plain_pickle(file)
        np.testing.assert_equal(found, expected)


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_other_orders(protocol: int, tmp_path: Path) -> None:
    """Byte order, axis order, objects with containers, None, shared objects: like the standard
    module."""
    shared = np.arange(3)
    content = [np.array([1, 2], ">i4"), np.asfortranarray(np.arange(6).reshape(2, 3)), np.array("ü"), np.array(5.0, ">f8")]
    content += [
        np.empty((0, 4), np.float32),
        np.array([[[1]], {"a": 2}, None], object),
        shared,
        shared,
        np.array([b"ab", b"c"]),
    ]
    content += [np.array(["x"], ">U3"), np.array([True]), np.zeros((2, 1, 3)).transpose(2, 0, 1), bytearray(b"xy")]
    data = pickle.dumps(content, protocol=protocol)
    found = load_plain_pickle(io.BytesIO(data))
    assert found[6] is found[7] and found[-1] == content[-1]
    assert all(np.array_equal(array, expected) for array, expected in zip(found[:-1], content[:-1], strict=True))
    for array, expected in zip(found[:-1], pickle.loads(data)[:-1], strict=True):
        assert array.dtype == expected.dtype and array.shape == expected.shape and np.array_equal(array, expected)


O, BYTES = b"cnumpy\ndtype\n(S'O'\ntR", b"C\x08" + b"\1" * 8  # eight bytes of the file as the address of an object
INT_STATE = b"(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"  # flags of 0: no object is in it
FORGED = {
    "ndarray": b"\x80\x03cnumpy\nndarray\n(K\x01\x85" + O + BYTES + b"tR.",
    "frombuffer": b"\x80\x03cnumpy.core.numeric\n_frombuffer\n(" + BYTES + O + b"K\x01\x85S'C'\ntR.",
    "scalar": b"\x80\x03cnumpy.core.multiarray\nscalar\n(" + O + BYTES + b"tR.",
    "flags": b"\x80\x03cnumpy.core.multiarray\nscalar\n(" + O + INT_STATE + BYTES + b"tR.",
    "state": b"\x80\x03cnumpy.core.multiarray\n_reconstruct\n(NNNtR(K\x01K\x01\x85" + O + INT_STATE + b"\x89" + BYTES + b"tb.",
    "short": b"\x80\x03cnumpy.core.multiarray\n_reconstruct\n(NNNtR(K\x01J\xff\xff\xff\x7f\x85cnumpy\ndtype\n(S'u1'\ntR\x89"
    + BYTES + b"tb.",
    "dtype": b"\x80\x03cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'V8'\ntR" + BYTES + b"tR.",
    "function": b"\x80\x03c_codecs\nencode\n(N}S'__defaults__'\n)stb.",
    "class": b"\x80\x03c__builtin__\nset\n)\x81.",
    "bytearray": b"\x80\x03c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "bytearray8": b"\x80\x05\x96\0\0\0\0\0\1\0\0abc.",
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_bytes_of_a_file_become_no_objects_and_no_gigabytes(name: str, tmp_path: Path) -> None:
    assert effects([FORGED[name]]) == set()
    (tmp_path / "gnd_rparis6k.pkl").write_bytes(FORGED[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"gnd_rparis6k\.pkl(: it|: the content|: the dtype| is broken|: an array)") as error:
        read_ground_truth(tmp_path, "rparis6k")
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_memo_far_away_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_plain_pickle(io.BytesIO(b"\x80\x02]r\xff\xff\xff\x7f.")) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_pickle_of_many_megabytes_is_refused_unread() -> None:
    with pytest.raises(pickle.UnpicklingError, match="more than 16,777,216 bytes"):
        load_plain_pickle(io.BytesIO(b"\x80\x02(" + b"]" * 2**24 + b"l."))


def test_broken_pickles_raise_and_do_nothing_else() -> None:
    """4,000 variants of a real one with bytes changed, cut or moved: the result is plain or an
    exception."""
    rng = np.random.default_rng(0)
    truth = LANDMARKS["rparis6k"] | {"arrays": [np.arange(5), np.array(["a", "bc"]), np.array([[1], {2}], object)]}
    broken = []
    for protocol in (0, 2, 4, 5):
        whole = pickle.dumps(truth, protocol=protocol)
        for _ in range(1000):
            data = bytearray(whole)
            for _ in range(rng.integers(1, 4)):
                start, length = rng.integers(len(data)), rng.integers(1, 5)
                other = rng.integers(len(data))
                data[start : start + length] = rng.choice(
                    np.array([bytes(rng.integers(0, 256, length, np.uint8)), bytes(data[other : other + length]), b""], object)
                )
            broken.append(bytes(data))
    assert effects(broken) == set()


class Malicious:
    """Its pickle calls any given function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "argument", "refused"),
    [
        (os.system, "touch {}", r"(posix|nt).system"),
        (eval, "open({!r}, 'w')", "builtins.eval"),
        (exec, "open({!r}, 'w')", "builtins.exec"),
        (open, "{}", r"_?io.open"),
        (getattr, "{}", "builtins.getattr"),
        (np.load, "{}", r"numpy.*load"),
        (Path, "{}", "pathlib.*Path"),
    ],
)
def test_a_malicious_pickle_is_refused_and_nothing_is_executed(
    function: Any, argument: str, refused: str, protocol: int, tmp_path: Path
) -> None:
    target, folder = tmp_path / "executed", tmp_path / "roxford5k"
    folder.mkdir()
    arguments = (argument.format(str(target)), "w") if function is open else (argument.format(str(target)),)
    content = LANDMARKS["roxford5k"] | {"extra": Malicious(function, *arguments)}
    data = pickle.dumps(content, protocol=protocol)
    (folder / "gnd_roxford5k.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=f"gnd_roxford5k.pkl: it wants to use {refused}, which plain data does not need"):
        read_ground_truth(folder, "roxford5k")
    assert effects([data]) == set() and not target.exists() and os.listdir(tmp_path) == ["roxford5k"]
    if function in (os.system, eval, exec):  # with the standard module it is executed
        told = effects([data], pickle.load)
        assert {"pickle.find_class", "os.system" if function is os.system else "open"} <= told and target.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cdino_simpool.layouts.ground_truth\nread_ground_truth\n.",  # our own functions are not plain data either
        b"c__main__\nx\n.",
        b"cnumpy._core.multiarray\nfromfile\n.",
        b"c_codecs\ndecode\n.",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
        b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.tofile\x93.",  # attributes of allowed names
        b"\x80\x02]U\x01aQ.",  # a persistent id
        b"\x80\x02\x82\x01.",  # an extension code
        b"",
        b"garbage",
    ],
)
def test_other_pickles_are_one_clear_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "gnd_rparis6k.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=r"gnd_rparis6k\.pkl") as error:
        read_ground_truth(tmp_path, "rparis6k")
    assert "\n" not in str(error.value) and effects([data]) == set()
    if b"rot13" in data:
        assert "bytes in the encoding rot13 are not supported" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda truth: truth.pop("qimlist"), "it has no 'qimlist'"),
        (lambda truth: truth["gnd"].pop(), "3 queries, but 2 entries in gnd"),
        (lambda truth: truth["gnd"][1].pop("bbx"), "it has no 'bbx'"),
        (lambda truth: truth["gnd"][1].pop("junk"), "it has no 'junk'"),
        (lambda truth: truth["gnd"][0].update(bbx=[5, 5, 4, 9]), "the box of query all_souls_000013 is"),
        (lambda truth: truth["gnd"][0].update(bbx=[1, 2, 3]), "the box of query"),
        (lambda truth: truth["gnd"][0].update(bbx=[10.1, 10.1, 10.4, 30]), "the box of query.*in pixels"),
        (lambda truth: truth["gnd"][0].update(bbx=[0, 0, 1e7, 1e7]), "the box of query.*in pixels"),
        (lambda truth: truth["gnd"][0].update(bbx=[0, 0, 10**400, 1]), "int too large"),
        (lambda truth: truth["gnd"][0].update(bbx=[0, float("nan"), 3, 1]), "the box of query"),
        (lambda truth: truth["imlist"].__setitem__(0, ["a"]), "imlist holds a list in place of a name"),
        (lambda truth: truth["gnd"][0].update(easy=[12]), "easy of query all_souls_000013 goes from 12 to 12.*images 0 to 11"),
        (lambda truth: truth["gnd"][0].update(hard=[-1]), "hard of query all_souls_000013 goes from -1"),
        (lambda truth: truth["gnd"][0].update(hard=[0.5]), "not a list of integers"),
        (lambda truth: truth.update(imlist=[], gnd=truth["gnd"]), "0 database images"),
    ],
)
def test_a_ground_truth_of_another_form(change: Any, message: str, tmp_path: Path) -> None:
    truth = json.loads(json.dumps(LANDMARKS["roxford5k"]))
    change(truth)
    (tmp_path / "gnd_roxford5k.json").write_text(json.dumps(truth))
    with pytest.raises(ValueError, match=f"gnd_roxford5k.json is not the ground truth of roxford5k: .*{message}"):
        read_ground_truth(tmp_path, "roxford5k")


def test_no_warning_where_all_is_well(tmp_path: Path) -> None:
    database, _, _ = landmarks("rparis6k", str(BUILDERS["rparis6k"](tmp_path)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        database.read(0)
