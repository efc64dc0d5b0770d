"""Shared by all tests: one thread, here and in every process that a test starts.

So the suite is as fast beside other work as alone, and sums come in one order: a run in a process equals the one in another.
"""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it

from pathlib import Path

import pytest
import torch
from PIL import EpsImagePlugin

torch.set_num_threads(1)
# A shell that starts the tests in the background has these ignored, and so would every process that a test stops.
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in ("SIGQUIT", "SIGHUP"):
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `gs` on the path that leaves a trace, which is returned; Pillow starts it to draw PostScript."""
    program, trace = tmp_path / "bin" / "gs", tmp_path / "started"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow remembers whether there is one
    return trace
