"""`python -m dino_simpool` and `torchrun -m dino_simpool`: the same as the command dino-simpool."""

from dino_simpool.cli import main

raise SystemExit(main())
