"""The same as `dino-simpool extract`, as a script: python eval/extract_features.py --checkpoint CKPT --data DIR --out OUT."""

from __future__ import annotations

import sys

from dino_simpool.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["extract", *sys.argv[1:]]))
