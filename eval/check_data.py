"""The same as `dino-simpool check-data`, as a script: python eval/check_data.py IMAGES."""

from __future__ import annotations

import sys

from dino_simpool.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["check-data", *sys.argv[1:]]))
