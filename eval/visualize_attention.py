"""The same as `dino-simpool attention`, as a script: python eval/visualize_attention.py --checkpoint LAST --data DIR."""

from __future__ import annotations

import sys

from dino_simpool.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["attention", *sys.argv[1:]]))
