"""Checkpoints: nothing half-written, nothing foreign loaded, nothing matched loosely."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_simpool.checkpoint import (
    FORMAT,
    check_same_run,
    export_encoder,
    keep_state,
    load_encoder,
    newest_state,
    read_state,
    save_state,
)
from dino_simpool.config import ConfigError, from_dict, to_dict
from dino_simpool.config import TrainConfig as Config
from dino_simpool.dino.model import DinoHead, DinoModel
from dino_simpool.files import file_sha256, write_atomically
from dino_simpool.models.encoder import Encoder, build_encoder
from dino_simpool.models.weights import load_strict
from dino_simpool.results import model_record, unfinished_note

CONFIG = from_dict(
    Config,
    {
        "model": {
            "arch": "resnet18",
            "stem": "small",
            "width": 8,
            "depth": [1, 1],
            "image_size": 16,
            "gamma": 2,
            "mean": [0.1, 0.2, 0.3],
        },
        "head": {"out_dim": 8, "hidden_dim": 8, "bottleneck_dim": 4},
        "run": {"seed": 3},
    },
)


def network(seed: int) -> DinoModel:
    torch.manual_seed(seed)
    encoder = build_encoder(CONFIG.model)
    return DinoModel(encoder, DinoHead(encoder.embed_dim, 8, hidden_dim=8, bottleneck_dim=4))


def state(step: int = 0, **changes: Any) -> dict[str, Any]:
    """A small state of a run; student and teacher differ from each other and from their initialisation."""
    parts = {"student": network(10).state_dict(), "teacher": network(11).state_dict()}
    return {"config": to_dict(CONFIG), "step": step, "num_images": 3 * CONFIG.run.batch_size + 1, **parts, **changes}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# -- atomic writing


def test_failure_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_atomically(path, lambda file: file.write_text("old"))

    def fail(file: Path) -> None:
        assert file.parent == tmp_path, "another disk could not be renamed from"
        file.write_text("half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and names(tmp_path) == ["config.yaml"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def write(file: Path) -> None:
        file.write_text("new")
        assert path.read_text() == "old"

    write_atomically(path, write)
    assert path.read_text() == "new" and names(tmp_path) == ["a"]


def test_saving_that_fails_keeps_last_and_prev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save_state(tmp_path, state(step))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(value: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="no space left"):
        save_state(tmp_path, state(3))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rotation(tmp_path: Path) -> None:
    save_state(tmp_path, state(1))
    assert names(tmp_path) == ["last.pth"]
    save_state(tmp_path, state(2))
    save_state(tmp_path, state(3))
    assert names(tmp_path) == ["last.pth", "prev.pth"]
    assert [read_state(tmp_path / name)["step"] for name in ("last.pth", "prev.pth")] == [3, 2]
    keep_state(tmp_path, "epoch_0020.pth")
    assert (tmp_path / "epoch_0020.pth").read_bytes() == (tmp_path / "last.pth").read_bytes()


def test_the_new_names_are_on_the_disk_when_saving_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is flushed after the last rename, so that a power cut afterwards loses no step."""
    save_state(tmp_path, state(1))
    done: list[str] = []
    replace, fsync = os.replace, os.fsync

    def flushed(handle: int) -> None:
        fsync(handle)
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")

    monkeypatch.setattr(os, "replace", lambda source, target: (replace(source, target), done.append(Path(target).name)))
    monkeypatch.setattr(os, "fsync", flushed)
    save_state(tmp_path, state(2))
    assert done == ["file", ".last.pth.new", "folder", "prev.pth", "last.pth", "folder"]


@pytest.mark.parametrize("interrupted_at", [1, 2])
def test_a_kill_between_the_two_renames_loses_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_at: int
) -> None:
    for step in (1, 2):
        save_state(tmp_path, state(step))
    renames = []

    def replace(source: Path, target: Path) -> None:
        renames.append(target)
        if len(renames) > interrupted_at:
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path, state(3))
    monkeypatch.undo()
    found = newest_state(tmp_path, lambda text: None)
    assert found is not None and found["step"] == 2
    save_state(tmp_path, state(3))
    assert names(tmp_path) == ["last.pth", "prev.pth"] and read_state(tmp_path / "last.pth")["step"] == 3


# -- reading


def test_state_comes_back_as_plain_values_and_equal_tensors(tmp_path: Path) -> None:
    stored = state(
        7, optimizer={"state": {0: {"exp_avg": torch.arange(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}, best=-1.0
    )
    save_state(tmp_path, stored)
    found = read_state(tmp_path / "last.pth")
    assert found.pop("format") == FORMAT
    assert {key: value for key, value in found.items() if key not in ("student", "teacher", "optimizer")} == {
        "config": to_dict(CONFIG), "step": 7, "num_images": stored["num_images"], "best": -1.0,
    }  # fmt: skip
    for part in ("student", "teacher"):
        assert found[part].keys() == stored[part].keys()
        assert all(torch.equal(found[part][key], tensor) for key, tensor in stored[part].items())
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], torch.arange(3.0))
    assert from_dict(Config, found["config"]) == CONFIG


class Malicious:
    """Unpickled by torch.load without weights_only, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path: Path) -> None:
    proof = tmp_path / "was_here"
    torch.save({"format": FORMAT, "config": Malicious(proof)}, tmp_path / "last.pth")
    with pytest.raises(ValueError, match=r"last\.pth cannot be read .*mkdir"):
        read_state(tmp_path / "last.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        newest_state(tmp_path, lambda text: None)
    assert not proof.exists()
    torch.load(tmp_path / "last.pth", weights_only=False)
    assert proof.exists(), "the file does do harm where it is trusted"


@pytest.mark.parametrize("content", ["cut", "empty", "text", "list", "dict", "other format"])
def test_foreign_and_broken_files_are_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "last.pth"
    save_state(tmp_path, state())
    if content == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content in ("empty", "text"):
        path.write_text("" if content == "empty" else "not a checkpoint\n")
    else:
        torch.save({"list": [1], "dict": {"model": {}}, "other format": {"format": FORMAT + 1}}[content], path)
    with pytest.raises(ValueError) as caught:
        read_state(path)
    said = str(caught.value)
    assert said.startswith(f"{path} ") and "\n" not in said and len(said) < len(str(path)) + 300
    assert ("cannot be read" if content in ("cut", "empty", "text") else "is not a checkpoint of this tool") in said


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*last\.pth: give last\.pth, best\.pth"):
        read_state(tmp_path / "last.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_state(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"with model\.json beside it"):
        load_encoder(tmp_path / "backbone.safetensors")


def test_resuming_takes_last_else_prev_else_stops(tmp_path: Path) -> None:
    said: list[str] = []
    assert newest_state(tmp_path, said.append) is None
    for step in (1, 2):
        save_state(tmp_path, state(step))
    found = newest_state(tmp_path, said.append)
    assert found is not None and found["step"] == 2 and not said

    last = tmp_path / "last.pth"
    last.write_bytes(last.read_bytes()[:1000])
    found = newest_state(tmp_path, said.append)
    assert found is not None and found["step"] == 1
    assert len(said) == 1 and said[0].startswith(str(last)) and said[0].endswith("resuming from prev.pth instead")

    last.unlink()
    found = newest_state(tmp_path, said.append)
    assert found is not None and found["step"] == 1 and said[1:] == ["last.pth is missing; resuming from prev.pth"]

    (tmp_path / "prev.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="nothing to resume from"):  # and no new start over what there is
        newest_state(tmp_path, said.append)


def test_another_network_is_refused_and_other_changes_are_told() -> None:
    where = Path("OUT")
    saved = to_dict(CONFIG)
    assert check_same_run(to_dict(CONFIG), saved, where) == []
    assert check_same_run({**saved, "run": {**saved["run"], "out": "elsewhere"}}, saved, where) == []
    changed = {**saved, "optim": {**saved["optim"], "lr": 1.0}, "run": {**saved["run"], "epochs": 7}}
    assert check_same_run(changed, saved, where) == ["optim.lr: 0.0005 -> 1.0", "run.epochs: 100 -> 7"]
    for group, name, value in [("model", "width", 16), ("head", "out_dim", 9), ("optim", "name", "sgd")]:
        with pytest.raises(
            ValueError, match=rf"OUT holds a run of another model \({group}\.{name} .* -> {value}\): give another"
        ):
            check_same_run({**saved, group: {**saved[group], name: value}}, saved, where)


def test_another_order_of_images_is_refused() -> None:
    """Batch, seed and subset decide which images a step sees."""
    saved = to_dict(CONFIG)
    for group, name in [("run", "batch_size"), ("run", "seed"), ("data", "subset_per_class")]:
        with pytest.raises(ValueError, match=rf"OUT holds a run with another order of images \({group}\.{name} .* -> 77\)"):
            check_same_run({**saved, group: {**saved[group], name: 77}}, saved, Path("OUT"))


def test_a_run_from_before_an_option_existed_can_be_compared() -> None:
    saved = to_dict(CONFIG)
    older = {group: dict(options) for group, options in saved.items() if group != "teacher"}
    del older["run"]["threads"]
    assert check_same_run(saved, older, Path("OUT"))[0].startswith("teacher.momentum: None -> ")


def test_files_are_as_readable_as_the_user_lets_files_be(tmp_path: Path) -> None:
    def private(path: Path) -> None:
        path.touch(mode=0o600)

    mask = os.umask(0o022)
    try:
        write_atomically(tmp_path / "x", private)
    finally:
        os.umask(mask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


# -- loading weights


def test_strict_loading_names_the_keys() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    good = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    load_strict(model, good, source="x.pth")
    assert all(torch.equal(value, good[key]) for key, value in model.state_dict().items())

    bad = {
        "0.bias": good["0.bias"],
        "0.weight": torch.zeros(3, 5),
        "1.weight": good["1.weight"],
        "module.1.bias": good["1.bias"],
    }
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_strict(model, bad, source="x.pth")
    assert str(caught.value) == (
        "the weights of x.pth do not fit this model "
        "(1 missing: 1.bias; 1 unexpected: module.1.bias; 1 other shape: 0.weight (3, 5) for (3, 2))"
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "nothing is loaded by halves"
    with pytest.raises(ValueError, match=r"\(4 missing: 0\.weight, 0\.bias, 1\.weight, 1\.bias\)$"):
        load_strict(model, {}, source="x.pth")


def test_no_more_than_five_keys_are_named() -> None:
    with pytest.raises(ValueError, match=r"9 unexpected: k0, k1, k2, k3, k4\)"):
        load_strict(torch.nn.Module(), {f"k{i}": torch.zeros(1) for i in range(9)}, source="x.pth")


def features(encoder: Encoder) -> torch.Tensor:
    with torch.no_grad():
        return encoder(torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16))


def test_load_encoder_takes_the_weights_it_is_asked_for(tmp_path: Path) -> None:
    save_state(tmp_path, state())
    seen = {}
    for which, expected in (("teacher", network(11)), ("student", network(10)), ("untrained", network(CONFIG.run.seed))):
        random_state = torch.get_rng_state()
        encoder = load_encoder(tmp_path / "last.pth", which=which)  # type: ignore[arg-type]
        assert torch.equal(torch.get_rng_state(), random_state), "the caller's random numbers go on as they would"
        assert same_weights(encoder, expected.encoder), which
        assert not encoder.training and encoder.config == CONFIG.model
        assert all(parameter.device.type == "cpu" for parameter in encoder.parameters())
        seen[which] = features(encoder)
    assert torch.equal(
        load_encoder(tmp_path / "last.pth")(torch.zeros(1, 3, 16, 16)), network(11).encoder.eval()(torch.zeros(1, 3, 16, 16))
    )
    assert not torch.allclose(seen["teacher"], seen["student"]) and not torch.allclose(seen["teacher"], seen["untrained"])


def test_the_untrained_encoder_of_an_export_comes_from_its_seed(tmp_path: Path) -> None:
    export_encoder(tmp_path, network(11).encoder, seed=7)
    torch.manual_seed(7)
    assert same_weights(load_encoder(tmp_path / "backbone.safetensors", which="untrained"), build_encoder(CONFIG.model))


def test_the_epochs_behind_the_weights(tmp_path: Path) -> None:
    save_state(tmp_path, state(7))
    epochs = {which: load_encoder(tmp_path / "last.pth", which=which).epochs for which in ("teacher", "student", "untrained")}
    assert epochs == {"teacher": 7 / 3, "student": 7 / 3, "untrained": 0}
    save_state(tmp_path, state(7, num_images=1))  # no training makes it
    assert load_encoder(tmp_path / "last.pth").epochs is None
    export_encoder(tmp_path, network(11).encoder, epochs=7 / 3, num_images=9, images="5e1f")
    assert load_encoder(tmp_path / "backbone.safetensors").epochs == 7 / 3
    found = [load_encoder(tmp_path / "backbone.safetensors", which=which) for which in ("teacher", "untrained")]
    assert [(encoder.num_images, encoder.images) for encoder in found] == [(9, "5e1f"), (None, None)]
    export_encoder(tmp_path, network(11).encoder)
    assert load_encoder(tmp_path / "backbone.safetensors").epochs is None


def test_export_and_overrides(tmp_path: Path) -> None:
    teacher = network(11).encoder.eval()
    export_encoder(tmp_path, teacher)
    assert names(tmp_path) == ["backbone.safetensors", "model.json"]
    digest = hashlib.sha256((tmp_path / "backbone.safetensors").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "model.json").read_text()) == to_dict(CONFIG.model) | {
        "sha256": {"backbone.safetensors": digest}
    }
    encoder = load_encoder(tmp_path / "backbone.safetensors")
    assert same_weights(encoder, teacher) and encoder.config == CONFIG.model and not encoder.training
    assert torch.equal(features(encoder), features(teacher))

    other = load_encoder(tmp_path / "backbone.safetensors", gamma=3, min_over="batch")
    assert other.config.gamma == 3.0 and other.config.min_over == "batch" and same_weights(other, teacher)
    assert not torch.allclose(features(other), features(teacher))

    with pytest.raises(ValueError, match="has no student weights, only teacher"):
        load_encoder(tmp_path / "backbone.safetensors", which="student")
    with pytest.raises(ConfigError, match=r"unknown option gama: did you mean gamma\?"):
        load_encoder(tmp_path / "backbone.safetensors", gama=3)
    with pytest.raises(ConfigError, match="gamma is high: allowed is a number or null"):
        load_encoder(tmp_path / "backbone.safetensors", gamma="high")
    with pytest.raises(ValueError, match="do not fit this model"):
        load_encoder(tmp_path / "backbone.safetensors", width=16)


@pytest.mark.parametrize("broken", ["backbone.safetensors", "model.json"])
def test_broken_export_is_one_line(tmp_path: Path, broken: str) -> None:
    export_encoder(tmp_path, network(1).encoder)
    content = (tmp_path / broken).read_bytes()
    (tmp_path / broken).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"backbone\.safetensors is damaged|model\.json is not JSON") as caught:
        load_encoder(tmp_path / "backbone.safetensors")
    assert "\n" not in str(caught.value)


def test_an_option_that_this_version_does_not_know_is_an_error(tmp_path: Path) -> None:
    """Passed over, the encoder would compute something else than what was trained."""
    config = to_dict(CONFIG)
    save_state(tmp_path, state(config={**config, "model": {**config["model"], "gama": 2.0}}))
    with pytest.raises(ConfigError, match=r"unknown option gama: did you mean gamma\?"):
        load_encoder(tmp_path / "last.pth")
    export_encoder(tmp_path, network(1).encoder)
    (tmp_path / "model.json").write_text(json.dumps({**config["model"], "poool": "gap"}))
    with pytest.raises(ConfigError, match=r"unknown option poool: did you mean pool\?"):
        load_encoder(tmp_path / "backbone.safetensors")


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    teacher = network(11).state_dict()
    del teacher["encoder.pool.q.weight"]
    save_state(tmp_path, state(teacher=teacher))
    with pytest.raises(ValueError, match=r"do not fit this model \(1 missing: pool\.q\.weight\)"):
        load_encoder(tmp_path / "last.pth")
    assert same_weights(load_encoder(tmp_path / "last.pth", which="student"), network(10).encoder)


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    shutil.copyfile(tmp_path / "a", tmp_path / "b")
    assert file_sha256(tmp_path / "a") == file_sha256(str(tmp_path / "b"))


def test_weights_from_the_middle_of_a_run_are_said(tmp_path: Path) -> None:
    """By evaluators and tables; not of a finished run, nor where it is not known (version 0.1)."""
    for done, total, note in ((2.0, 4.0, "epoch 2 of 4"), (4.0, 4.0, ""), (2.0, None, "")):
        export_encoder(tmp_path, network(11).encoder, epochs=done, total_epochs=total)
        encoder = load_encoder(tmp_path / "backbone.safetensors")
        record = model_record(encoder, str(tmp_path / "backbone.safetensors"), "teacher")
        assert (record["epochs"], record["total_epochs"]) == (done, total)
        assert unfinished_note(record).endswith(note) and bool(unfinished_note(record)) == bool(note)
    assert unfinished_note(None) == ""
