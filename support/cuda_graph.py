"""A step as one CUDA graph."""

from collections.abc import Callable

import torch

from support.checkpoint import State


class CudaGraph:
    """update_networks(), recorded after some steps as it is, and from then on replayed by a single launch.

    From Python, its hundreds of kernels take several times as long to launch as they take to run.
    """

    def __init__(self, step: Callable):
        self.step = step
        self.warm_up = 3  # steps; in the first, cuDNN tries its algorithms and the Adams make their moments
        self.graph = self.inputs = None

    def __call__(self, state: State, autocast: torch.autocast, *inputs: torch.Tensor) -> None:
        if self.warm_up:
            self.warm_up -= 1
            self.step(state, autocast, *inputs)  # nothing of it may outlive it: autograd keeps to its stream
            return
        if self.graph is None:
            self.record(state, autocast, *inputs)
        for kept, new in zip(self.inputs, inputs):
            kept.copy_(new)
        self.graph.replay()

    def record(self, state: State, autocast: torch.autocast, *inputs: torch.Tensor) -> None:
        """Notes the kernels and the memory that they read and write; nothing is run."""
        self.graph, self.inputs = torch.cuda.CUDAGraph(), [torch.empty_like(x) for x in inputs]
        groups = [*state.optD.param_groups, *state.optG.param_groups]
        for group in groups:
            group["capturable"] = True  # Adam asks for it here, and warns of it elsewhere
        # Other threads may go on: where files are read, one of them pins the next batch.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.step(state, autocast, *self.inputs)
        for group in groups:
            group["capturable"] = False
