"""Shared by all tests: one thread, so that the suite is as fast beside other work as alone, and sums come in one order."""

import torch

torch.set_num_threads(1)
