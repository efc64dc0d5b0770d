"""convert: round trips, exports under other runtimes, timm's names, and folders of the Hub."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torchvision.models import VisionTransformer

import dino_simpool.timm_models  # noqa: F401 (registers its models)
from dino_simpool import cli, convert, hub
from dino_simpool.checkpoint import export_encoder, load_encoder
from dino_simpool.config import ModelConfig
from dino_simpool.convert import graphs
from dino_simpool.dino.model import DinoHead, DinoModel
from dino_simpool.files import file_sha256
from dino_simpool.models.encoder import build_encoder
from dino_simpool.models.weights import load_official, to_official

TINY: dict[str, dict[str, Any]] = {
    "vit": {"arch": "vit_tiny", "width": 48, "heads": 3, "depth": 2, "image_size": 64, "gamma": 1.25, "beta": True,
            "pos_interp": "dino"},
    "resnet": {"arch": "resnet18", "width": 8, "image_size": 64, "gamma": 2.0},
    "convnext": {"arch": "convnext_tiny", "width": 8, "depth": (1, 1, 2, 1), "image_size": 64, "gamma": 2.0},
    "vit cls": {"arch": "vit_tiny", "width": 48, "heads": 3, "depth": 2, "image_size": 64, "pool": "cls"},
    "vit gap": {"arch": "vit_tiny", "width": 48, "heads": 3, "depth": 2, "image_size": 64, "pool": "gap"},
    "convnext gap": {"arch": "convnext_tiny", "width": 8, "depth": (1, 1, 2, 1), "image_size": 64, "pool": "gap"},
    "resnet gap": {"arch": "resnet18", "depth": (1, 1, 1, 1), "image_size": 64, "pool": "gap"},
}  # fmt: skip


def network(kind: str, seed: int, *, batch_norm: bool = False) -> DinoModel:
    torch.manual_seed(seed)
    encoder = build_encoder(ModelConfig(**TINY[kind]))
    model = DinoModel(encoder, DinoHead(encoder.embed_dim, 20, hidden_dim=24, bottleneck_dim=8, batch_norm=batch_norm))
    with torch.no_grad():
        for value in model.parameters():  # nothing is where it starts, such as biases of 0
            value.add_(0.1 * torch.randn_like(value))
    return model.eval()


def official(path: Path, kind: str) -> Path:
    """A file as main_dino.py writes it."""
    normed = kind == "resnet"
    student, teacher = (to_official(network(kind, seed, batch_norm=normed).state_dict()) for seed in (1, 2))
    torch.save(
        {
            "student": {f"module.{name}": value for name, value in student.items()},
            "teacher": {("module." if normed else "") + name: value for name, value in teacher.items()},
            "optimizer": {"param_groups": []},
            "epoch": 7,
            "args": argparse.Namespace(arch="x", gamma=TINY[kind].get("gamma"), patch_size=16, epochs=100),
            "dino_loss": {"center": torch.randn(1, 20)},
        },
        path,
    )
    return path


def exported(out: Path, kind: str) -> Path:
    out.mkdir()
    export_encoder(out, network(kind, 3).encoder)
    return out / "backbone.safetensors"


def run(*arguments: Any) -> int:
    return cli.main(["convert", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext"])
def test_official_to_ours_and_back_is_bit_equal(tmp_path: Path, kind: str) -> None:
    """Student, teacher, head, prefixes, center and epoch, through files."""
    path = official(tmp_path / "checkpoint.pth", kind)
    options = ["--model.heads", "3"] if kind == "vit" else []
    assert run("--checkpoint", path, "--to", "ours", "--out", tmp_path / "ours", *options) == 0
    assert run("--checkpoint", tmp_path / "ours" / "weights.pth", "--to", "official", "--out", tmp_path / "back") == 0
    back = tmp_path / "back" / "checkpoint.pth"
    # As the official scripts read it, with the torch of their time.
    before, after = (torch.load(file, map_location="cpu", weights_only=False) for file in (path, back))
    for part in ("student", "teacher"):
        assert before[part].keys() == after[part].keys()
        assert all(torch.equal(value, after[part][name]) for name, value in before[part].items())
    assert after["epoch"] == 7 and torch.equal(before["dino_loss"]["center"], after["dino_loss"]["center"])
    assert after["args"].gamma == TINY[kind]["gamma"] and load_official(back)["args"] == after["args"]
    images = torch.randn(2, 3, 64, 64)
    for which, seed in (("student", 1), ("teacher", 2)):
        encoder = network(kind, seed, batch_norm=kind == "resnet").encoder
        found = load_encoder(tmp_path / "ours" / "weights.pth", which=which)  # type: ignore[arg-type]
        assert torch.equal(found(images), encoder(images))
    assert load_encoder(tmp_path / "ours" / "backbone.safetensors").epochs == 7
    record = json.loads((tmp_path / "back" / "convert.json").read_text())
    assert record["to"] == "official" and record["config"]["checkpoint"].endswith("weights.pth")


@pytest.mark.parametrize("to", ["onnx", "program"])
@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext", "vit cls"])
def test_graphs_agree_with_the_encoder(tmp_path: Path, kind: str, to: str) -> None:
    """Two sizes and two batch sizes; each read again here, and not only by the command."""
    path = exported(tmp_path / "run", kind)
    sizes = [(64, 64), (96, 80)]
    encoder = load_encoder(path)
    for number, size in enumerate(sizes):
        out = tmp_path / f"{number}"
        if number and not encoder.config.is_vit:
            out = tmp_path / "0"  # the same file takes any size
        else:
            assert run("--checkpoint", path, "--to", to, "--out", out, f"--size=[{size[0]},{size[1]}]") == 0
        for batch in (1, 4):
            images = torch.randn(batch, 3, *size)
            expected = [encoder(images), encoder.tokens(images), encoder.attention(images)]
            if to == "onnx":
                found = graphs.run_onnx(out / "encoder.onnx", images)
            else:
                found = graphs.run_program(out / "encoder.pt2", images)
            for ours, theirs in zip(expected, found, strict=True):
                assert ours.shape == theirs.shape
                assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()


def test_outputs_of_onnx_have_names(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert run("--checkpoint", exported(tmp_path / "run", "resnet"), "--to", "onnx", "--out", tmp_path / "out") == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "encoder.onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["feature", "tokens", "attention"]
    [found] = session.run(["feature"], {"images": torch.zeros(1, 3, 64, 64).numpy()})
    assert found.shape == (1, 64)


def test_a_graph_that_differs_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported(tmp_path / "run", "vit")
    real = graphs.run_program
    monkeypatch.setattr(graphs, "run_program", lambda path, images: [x * 1.001 for x in real(path, images)])
    assert run("--checkpoint", path, "--to", "program", "--out", tmp_path / "out") == 1
    assert "differs from the encoder by 0.001" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", TINY)
def test_timm_takes_what_is_written_for_it(tmp_path: Path, kind: str) -> None:
    path = exported(tmp_path / "run", kind)
    if kind in ("resnet",):
        assert convert.timm_call(ModelConfig(**TINY[kind]))[0] == "resnet18_simpool"
    assert run("--checkpoint", path, "--to", "timm", "--out", tmp_path / "out") == 0
    call = json.loads((tmp_path / "out" / "convert.json").read_text())["to load"].rpartition("; ")[2]
    model = eval(call, {"timm": timm}).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), load_encoder(path)(images), rtol=1e-4, atol=1e-5)


def test_registered_models_are_like_those_of_timm() -> None:
    for name, width in (("vit_tiny_simpool", 192), ("resnet18_simpool", 512), ("convnext_tiny_simpool", 768)):
        model = timm.create_model(name, num_classes=10).eval()
        images = torch.randn(1, 3, 64, 64)
        features = model.forward_features(images)
        assert model(images).shape == (1, 10) and model.num_features == width
        assert model.forward_head(features, pre_logits=True).shape == (1, width)
        assert torch.equal(model(images), model.fc(model.forward_head(features, pre_logits=True)))
        model.reset_classifier(0)
        assert torch.equal(model(images), model.encoder(images)) and model.attention(images).ndim == 3
        assert timm.data.resolve_model_data_config(model)["mean"] == ModelConfig().mean
        assert model.get_submodule(model.default_cfg["first_conv"]).weight.shape[1] == 3
    assert "vit_small_simpool" in timm.list_models("*_simpool")


def test_weights_with_other_options_are_refused() -> None:
    model = timm.create_model("vit_tiny_simpool", depth=1)
    state = timm.create_model("vit_tiny_simpool", depth=1, gamma=2.0).state_dict()
    with pytest.raises(ValueError, match=r"other options than gamma 1\.25: give timm\.create_model gamma=2\.0"):
        model.load_state_dict(state)
    assert timm.create_model("vit_tiny_simpool", depth=1, gamma="none").encoder.pool.gamma is None
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(0, "avg")


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("vit gap", ["--to", "official"], "this one has gap"),
        ("vit", ["--to", "official", "--which", "untrained"], "which untrained has no file"),
        ("vit", ["--to", "timm", "--size", "[64,64]"], "size is for onnx and program"),
    ],
)
def test_what_cannot_be_said_elsewhere_is_refused(
    tmp_path: Path, kind: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--checkpoint", exported(tmp_path / "run", kind), "--out", tmp_path / "out", *arguments) in (1, 2)
    assert words in capsys.readouterr().err


def test_what_an_official_file_does_not_say_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the options of the note it is read as the encoder that it is of, and without them as another."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 64, "depth": 1, "heads": 2, "image_size": 32, "num_heads": 2, "gamma": 2.0}
    encoder = build_encoder(ModelConfig(**sizes, mean=(0.5, 0.5, 0.5))).eval()
    export_encoder(tmp_path, encoder)
    assert run("--checkpoint", tmp_path / "backbone.safetensors", "--to", "official", "--out", tmp_path / "official") == 0
    options = "--model.gamma 2.0 --model.num_heads 2 --model.heads 2 --model.pos_interp size --model.mean '[0.5, 0.5, 0.5]'"
    assert f"the file does not say, or is read as published without: {options}\n" in capsys.readouterr().err
    path, images = tmp_path / "official" / "checkpoint.pth", torch.randn(2, 3, 32, 32)
    given: dict[str, Any] = {"gamma": 2.0, "num_heads": 2, "heads": 2, "pos_interp": "size", "mean": [0.5, 0.5, 0.5]}
    assert torch.equal(load_encoder(path, **given)(images), encoder(images))
    assert not torch.equal(load_encoder(path)(images), encoder(images))


@pytest.mark.parametrize("to", ["ours", "official"])
def test_files_of_torchvision_can_be_converted(tmp_path: Path, to: str) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(image_size=32, patch_size=8, num_layers=1, num_heads=1, hidden_dim=64, mlp_dim=256).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    assert run("--checkpoint", tmp_path / "vit.pth", "--to", to, "--out", tmp_path / "out") == 0
    model.heads = torch.nn.Sequential()
    written, images = tmp_path / "out" / convert.FILES[to][0], torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(load_encoder(written)(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_published_model_needs_no_such_note(tmp_path: Path) -> None:
    official(tmp_path / "a.pth", "convnext")
    assert run("--checkpoint", tmp_path / "a.pth", "--to", "official", "--out", tmp_path / "out") == 0
    notes = json.loads((tmp_path / "out" / "convert.json").read_text())["notes"]
    assert notes == ["no optimizer: the official script begins with a new one"]


def test_the_file_of_the_weights_of_an_encoder_of_timm_is_recorded(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), file)
    options = ("--checkpoint", "timm:resnet10t", "--weights", file, "--to", "program", "--size", "[32,32]")
    assert run(*options, "--out", tmp_path / "out") == 0
    model = json.loads((tmp_path / "out" / "convert.json").read_text())["model"]
    assert (model["weights"], model["sha256"]) == (str(file), file_sha256(file))


def test_files_that_are_there_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = exported(tmp_path / "run", "vit")
    before = path.read_bytes()
    assert run("--checkpoint", path, "--to", "ours", "--out", tmp_path / "run") == 1
    assert "exists: give another --out" in capsys.readouterr().err and path.read_bytes() == before


def test_a_folder_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = network("vit", 3).encoder
    encoder.epochs, encoder.num_images, encoder.init = 100.0, 1000, {"checkpoint": "start.pth"}
    results = tmp_path / "results"
    results.mkdir()
    record = {"evaluator": "knn", "dataset": "imagenet", "split": "val", "metrics": {"top1": 61.234}, "model": None}
    (results / "knn.json").write_text(json.dumps(record))
    sent: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
            assert private and exist_ok
            return f"https://huggingface.co/{repo}"

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
            for path in Path(folder_path).iterdir():
                (tmp_path / "repo").mkdir(exist_ok=True)
                (tmp_path / "repo" / path.name).write_bytes(path.read_bytes())
            sent["repo"] = repo_id

    monkeypatch.setattr(hub, "HfApi", Api)
    assert hub.push_to_hub(encoder, "me/mine", results=results, private=True, license="mit").endswith("me/mine")
    assert sent["repo"] == "me/mine"
    card = (tmp_path / "repo" / "README.md").read_text()
    assert "| knn | imagenet | val | none | top1 | 61.23 |" in card and "license: mit" in card and "epochs 100" in card
    found, images = hub.from_pretrained(tmp_path / "repo"), torch.randn(1, 3, 64, 64)
    assert torch.equal(found(images), encoder(images)) and found.epochs == 100
    assert found.init == encoder.init
    with pytest.raises(ValueError, match=r"timm:resnet10t is timm's own model"):
        hub.push_to_hub(load_encoder("timm:resnet10t", weights="random"), "me/other")


def test_a_hub_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", away)
    with pytest.raises(FileNotFoundError, match=r"me/mine is no folder here, .*no network.*USER/NAME"):
        hub.from_pretrained("me/mine")
    with pytest.raises(ValueError, match="holds no results"):
        hub.model_card(network("vit", 1).encoder, name="x", results=tmp_path)
