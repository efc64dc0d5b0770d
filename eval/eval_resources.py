"""The same as `dino-simpool resources`, as a script: python eval/eval_resources.py --checkpoint RUN/last.pth."""

from __future__ import annotations

import sys

from dino_simpool.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["resources", *sys.argv[1:]]))
