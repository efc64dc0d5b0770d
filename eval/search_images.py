"""The same as `dino-simpool search`, as a script: python eval/search_images.py --index FEATURES --query IMAGE --out FOUND."""

from __future__ import annotations

import sys

from dino_simpool.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["search", *sys.argv[1:]]))
