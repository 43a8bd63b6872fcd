"""A training step as one CUDA graph: a single launch in place of hundreds.

    with as_cuda_graph(step, [optD, optG], device) as launch:      # on the CPU, launch is step
        launch(inputs)

Python takes several times as long to launch the kernels of a step as a GPU takes to run them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

WARM_UP = 3  # steps without a graph: in the first, cuDNN tries its algorithms and Adam makes its moments


@contextmanager
def as_cuda_graph(step: Callable, optimizers: Sequence, device: torch.device) -> Iterator[Callable]:
    """`step`, or on CUDA a CudaGraph of it that lives until the end of the block.

    NCCL's group waits for all graphs that hold its kernels: leave the block before you destroy the group. reset() does
    not wait for a replay that runs; deleting the graph does on ROCm.
    """
    if device.type != "cuda":
        yield step
        return
    launch = CudaGraph(step, optimizers, device)
    try:
        yield launch
    finally:
        if launch.graph is not None:
            launch.graph.reset()


class CudaGraph:
    """Calls `step(inputs)` WARM_UP times, then records it and replays the recording.

    A replay has the bits of a plain call. `inputs` is a NamedTuple of tensors, on the CPU or on the GPU and of the same
    shapes and types in each call, or None. `optimizers` are those that the step uses.

    The first steps and the recording use one stream, as torch's documentation of CUDA graphs asks for: libraries such
    as hipBLASLt make a handle for each stream, which is an error during a recording.
    """

    def __init__(self, step: Callable, optimizers: Sequence[torch.optim.Optimizer], device: torch.device):
        self.step = step
        self.optimizers = optimizers
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.steps_without_graph = WARM_UP
        self.graph = None
        self.inputs = None

    def __call__(self, inputs: tuple) -> None:
        if self.inputs is None:
            recorded = (None if x is None else torch.empty_like(x, device=self.device) for x in inputs)
            self.inputs = type(inputs)(*recorded)
        for recorded, new in zip(self.inputs, inputs):
            if new is not None:
                recorded.copy_(new if new.is_cuda else new.pin_memory(), non_blocking=True)
        if self.steps_without_graph:
            self.steps_without_graph -= 1
            self.warm_up()
            return
        if self.graph is None:
            self.record()
        self.graph.replay()

    def warm_up(self) -> None:
        """A step without a graph, on the stream of the recording, after the work of the current stream."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.step(self.inputs)
        current.wait_stream(self.stream)

    def record(self) -> None:
        """Record the kernels of a step and the memory that they read and write. None of them runs."""
        self.graph = torch.cuda.CUDAGraph()
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group in groups:
            group["capturable"] = True  # Adam requires it during a recording and warns about it elsewhere
        # thread_local: other threads may allocate pinned memory, and NCCL's watchdog queries events meanwhile.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.step(self.inputs)
        for group in groups:
            group["capturable"] = False
