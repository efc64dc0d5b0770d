"""Shared by all tests: one thread, here and in every process that a test starts.

So the suite is as fast beside other work as alone, and sums come in one order: a run in a process equals the one in another.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it

import torch

torch.set_num_threads(1)
