"""A training step as one CUDA graph: a single launch in place of hundreds.

Python takes several times as long to launch the kernels of a step as a GPU takes to run them.
"""

from collections.abc import Callable

import torch

from support.checkpoint import TrainState

WARM_UP = 3  # steps without a graph: in the first, cuDNN tries its algorithms and Adam makes its moments


class CudaGraph:
    """Calls `step(state, autocast, *inputs)` WARM_UP times, then records it and replays the recording.

    A replay has the bits of a plain call. `inputs` are tensors on the GPU, of the same shapes in each step.
    """

    def __init__(self, step: Callable):
        self.step, self.steps_without_graph = step, WARM_UP
        self.graph = self.inputs = None

    def __call__(self, state: TrainState, autocast: torch.autocast, *inputs: torch.Tensor) -> None:
        if self.steps_without_graph:
            self.steps_without_graph -= 1
            # The step must return nothing: autograd nodes that outlive it are tied to this stream, and a recording,
            # which uses another stream, fails when it meets them.
            self.step(state, autocast, *inputs)
            return
        if self.graph is None:
            self.record(state, autocast, *inputs)
        for recorded, new in zip(self.inputs, inputs):
            recorded.copy_(new)
        self.graph.replay()

    def record(self, state: TrainState, autocast: torch.autocast, *inputs: torch.Tensor) -> None:
        """Record the kernels of a step and the memory that they read and write. None of them runs."""
        self.graph, self.inputs = torch.cuda.CUDAGraph(), [torch.empty_like(x) for x in inputs]
        groups = [*state.optD.param_groups, *state.optG.param_groups]
        for group in groups:
            group["capturable"] = True  # Adam requires it during a recording and warns about it elsewhere
        # thread_local: another thread may allocate pinned memory for the next batch meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.step(state, autocast, *self.inputs)
        for group in groups:
            group["capturable"] = False
