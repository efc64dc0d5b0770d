"""Self-supervised pre-training of image encoders with DINO and SimPool."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"
_HOME = {
    "Encoder": "models.encoder",
    "build_encoder": "models.encoder",
    "SimPool": "models.pooling.simpool",
    "attach_simpool": "models.pooling.attach",
    "simpool_maps": "models.pooling.attach",
    "load_encoder": "checkpoint",
    "from_pretrained": "hub",
    "push_to_hub": "hub",
    "TrainConfig": "config",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """A public name, imported on first use, so that the package imports no torch."""
    if name not in _HOME:
        raise AttributeError(f"module dino_simpool has no attribute {name}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"dino_simpool.{_HOME[name]}"), name)
