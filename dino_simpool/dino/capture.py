"""Forward, loss and backward of a pass as one CUDA graph.

A step of a small network is thousands of short kernels, and a host queues them more slowly than a
GPU computes them. A graph is queued in one call. It reads and writes fixed places in memory: views
and temperature are copied there, and gradients are left there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

Pass = Callable[[Sequence[Tensor], float | Tensor], tuple[Tensor, Tensor]]
"""Of views and the teacher's temperature: adds to the gradients, and returns two tensors."""


class CapturedPass:
    """Does what `run` does with one graph, which the first call records.

    run: without synchronization of the host, on a GPU.   parameters: those whose gradients it
    makes.   buffers: what else it changes.   add: calls add to the gradients, otherwise they set
    them, which saves reading them.   A call with views of other shapes makes a new graph. The
    results are overwritten by the next call.
    """

    def __init__(self, run: Pass, parameters: Iterable[nn.Parameter], buffers: Sequence[Tensor], *, add: bool) -> None:
        self._run, self._parameters, self._buffers, self._add = run, list(parameters), buffers, add
        self._graph: torch.cuda.CUDAGraph | None = None
        self._views: list[Tensor] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def clear_gradients(self) -> None:
        """Puts the gradients in their places, and sets them to 0 unless a call does."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        if self._gradients and self._add:
            torch._foreach_zero_([gradient for _, gradient in self._gradients])

    def __call__(self, views: Sequence[Tensor], temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        """The results of `run`."""
        if self._graph is None or [v.shape for v in views] != [v.shape for v in self._views]:
            self._capture(views)
        assert self._graph is not None
        torch._foreach_copy_(self._views, list(views))
        self._temperature.fill_(temperature)
        self._graph.replay()
        return self._results

    def _capture(self, views: Sequence[Tensor]) -> None:
        """Record the pass, after three runs that compile, choose algorithms and fill caches.

        Nothing changes but the places of the gradients.
        """
        self._views = [view.clone() for view in views]
        self._temperature = torch.ones((), device=views[0].device)
        summed = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        before = [buffer.clone() for buffer in self._buffers]
        stream = torch.cuda.Stream(views[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng([views[0].device]), torch.cuda.stream(stream):
            for parameter in self._parameters:
                parameter.grad = None
            for _ in range(3):
                self._run(self._views, self._temperature)
            if not self._add:
                for parameter in self._parameters:
                    parameter.grad = None
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self._results = self._run(self._views, self._temperature)
            self._gradients = [(p, p.grad) for p in self._parameters if p.grad is not None]
        torch.cuda.current_stream().wait_stream(stream)
        self.clear_gradients()
        for parameter, old in zip(self._parameters, summed, strict=True):
            if old is not None and parameter.grad is not None:
                parameter.grad.copy_(old)
        for buffer, old in zip(self._buffers, before, strict=True):
            buffer.copy_(old)
