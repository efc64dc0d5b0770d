"""The same as `dino-simpool submit`, as a script: python launch/submit.py --gpus 8 --time 72h -- train --config ..."""

from __future__ import annotations

import sys

from dino_simpool.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["submit", *sys.argv[1:]]))
