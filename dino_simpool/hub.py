"""Encoders on the Hugging Face Hub: the export of a run, and a model card made from its results.

A repository or folder holds backbone.safetensors, model.json and README.md (the card).
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from dino_simpool import __version__
from dino_simpool.checkpoint import export_encoder, load_encoder
from dino_simpool.config import to_dict
from dino_simpool.files import NUMBER, Fields, read_json, write_atomically
from dino_simpool.models.encoder import TRAINING, Encoder
from dino_simpool.models.foreign import TimmEncoder

FILES = ("backbone.safetensors", "model.json")
RESULT: Fields = {"evaluator": str, "dataset?": str, "split?": str, "metrics": dict, "model?": dict}


def from_pretrained(name: str | Path, *, revision: str | None = None, **overrides: Any) -> Encoder:
    """The encoder of a folder, or of a repository on the Hub, in evaluation mode.

    revision: branch, tag or commit of the repository. overrides: as for `load_encoder`.
    FileNotFoundError in one line if there is none, or no way to the Hub.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=list(FILES)))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise FileNotFoundError(
                f"{name} is no folder here, and the Hub does not give it ({type(error).__name__}: {reason}): give "
                f"a folder with {' and '.join(FILES)}, or the name of a repository, USER/NAME"
            ) from error
    return load_encoder(folder / FILES[0], **overrides)


def push_to_hub(
    encoder: Encoder, repo: str, *, results: str | Path | None = None, license: str | None = None, private: bool = False
) -> str:
    """Write an encoder with its model card to a repository of the Hub, USER/NAME, which is made if
    it does not exist. Returns its address. results: a folder with the results of a run, for the
    card. license: of the weights, as the Hub names it. You must be logged in (`hf auth login`)."""
    with TemporaryDirectory() as temporary:
        write_folder(encoder, temporary, name=repo, results=results, license=license)
        api = HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=temporary, commit_message=f"Encoder of dino_simpool {__version__}")
    return str(address)


def write_folder(
    encoder: Encoder, folder: str | Path, *, name: str, results: str | Path | None = None, license: str | None = None
) -> None:
    """Write what `push_to_hub` sends to a folder, from which `from_pretrained` reads it.
    ValueError for a model of timm."""
    if isinstance(encoder, TimmEncoder):
        raise ValueError(f"{encoder.config.arch} is timm's own model, which timm itself puts on the Hub: give one of this tool")
    card = model_card(encoder, name=name, results=results, license=license)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    export_encoder(folder, encoder, **{name: getattr(encoder, name) for name in TRAINING})
    write_atomically(folder / "README.md", lambda path: path.write_text(card, encoding="utf-8"))


def model_card(encoder: Encoder, *, name: str, results: str | Path | None = None, license: str | None = None) -> str:
    """The text of a model card: how to load the encoder, its options, its training, and the metrics
    of every results/*.json. ValueError for a folder without results or a broken one."""
    config = encoder.config
    data = ModelCardData(
        library_name="dino_simpool",
        pipeline_tag="image-feature-extraction",
        license=license,
        tags=["dino", config.pool, "self-supervised"],
    )
    known = {"epochs": encoder.epochs, "of epochs": encoder.total_epochs, "images": encoder.num_images}
    training = ", ".join(f"{key} {value:,.6g}" for key, value in known.items() if value is not None)
    lines = [
        f"# {name}",
        "",
        f"{config.arch} with {config.pool}, features of {encoder.embed_dim} numbers, made with dino_simpool {__version__}.",
        "",
        "```python",
        "from dino_simpool import from_pretrained",
        "",
        f'encoder = from_pretrained("{name}")  # encoder(images), encoder.attention(images)',
        "```",
        "",
        f"Training: {training or 'not known'}. Options of the model:",
        "",
        "```json",
        json.dumps(to_dict(config)),
        "```",
        "",
        *_results_table(results),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines).rstrip() + "\n"))


def _results_table(results: str | Path | None) -> list[str]:
    if results is None:
        return ["No results were given."]
    paths = sorted(Path(results).glob("*.json"))
    if not paths:
        raise ValueError(f"{results} holds no results (*.json): give the folder results/ of a run, or none")
    rows = []
    for path in paths:
        remedy = "give a folder with results only"
        record = read_json(path, RESULT, what="a result of this tool", remedy=remedy)
        which = (record.get("model") or {}).get("which", "none")
        where = f"{path.stem} | {record.get('dataset')} | {record.get('split')} | {which}"
        rows += [f"| {where} | {metric} | {x:.2f} |" for metric, x in record["metrics"].items() if isinstance(x, NUMBER)]
    head = ["| result | data | split | weights | metric | value |", "|---|---|---|---|---|---|"]
    return ["## Results", "", "Metrics are in percent unless their name says otherwise.", "", *head, *rows]
