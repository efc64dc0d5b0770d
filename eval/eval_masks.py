"""The same as `dino-simpool masks`, as a script: python eval/eval_masks.py --checkpoint RUN/last.pth --data DIR."""

from __future__ import annotations

import sys

from dino_simpool.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["masks", *sys.argv[1:]]))
