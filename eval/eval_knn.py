"""The same as `dino-simpool knn`, as a script: python eval/eval_knn.py --checkpoint RUN/last.pth --data DIR."""

from __future__ import annotations

import sys

from dino_simpool.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["knn", *sys.argv[1:]]))
