"""The same as `dino-simpool linear`, as a script: python eval/eval_linear.py --checkpoint RUN/last.pth --data DIR."""

from __future__ import annotations

import sys

from dino_simpool.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["linear", *sys.argv[1:]]))
