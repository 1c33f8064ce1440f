"""Whole optimiser steps as CUDA graphs: one launch instead of one for each of hundreds of kernels.

A graph repeats what it saw when it was captured, reading and writing the same memory. So pictures and noise go through
buffers that stay, numbers that move from step to step (learning rates, the average's share) are tensors, and steps that
take something else from the host (`Objective.graph_key`) have graphs of their own.
"""

from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from vaegan_dist.config import TrainingSection
from vaegan_dist.errors import ConfigError

WARM_STEPS = 3  # in which libraries choose their kernels and optimisers make their states
MOST_GRAPHS = 16
MOST_COUNTED = 256

Body = Callable[[Tensor, dict[str, Tensor]], None]


def captures(settings: TrainingSection, device: torch.device, world_size: int) -> bool:
    """Whether steps are to be captured: by default where one worker trains alone, on a GPU.

    Raises:
        ConfigError: asked for where it cannot be done.
    """
    if settings.cuda_graphs is None:
        return device.type == "cuda" and world_size == 1 and settings.compile in ("no", "default")
    if settings.cuda_graphs and device.type != "cuda":
        raise ConfigError(
            "training.cuda_graphs=true: this worker has no GPU; set cluster.gpus_per_worker=1, or leave it unset"
        )
    if settings.cuda_graphs and world_size > 1:
        raise ConfigError(
            f"training.cuda_graphs=true: {world_size} workers exchange gradients, which a graph does not hold; "
            f"leave it unset, or set cluster.workers=1"
        )
    return settings.cuda_graphs


class StepGraphs:
    """Runs a step's body: the first few times of each kind as it is, then by replaying its graph.

    Holds no reference to the body, which is a method of the step that holds this: a step that is left gives its memory
    back at once.
    """

    def __init__(self, device: torch.device) -> None:
        # Warm-up and capture share a stream, so that no node of autograd's waits for another one during capture.
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.met: Counter[Hashable] = Counter()
        self.inputs: dict[str, Tensor] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Body, key: Hashable, images: Tensor, noise: dict[str, Tensor]) -> None:
        """One step.

        Args:
            body: computes on the tensors that it is given; whatever it keeps, it writes in place.
            key: all that the body takes from the host beside its arguments.
            images, noise: of the same shapes every time.
        """
        self._fill({"images": images, **{f"noise.{name}": value for name, value in noise.items()}})
        if key not in self.graphs and not self._capture_now(key):
            self._on_stream(lambda: self._run(body))
            return
        if key not in self.graphs:
            self._on_stream(lambda: self._capture(body, key))
        self.graphs[key].replay()

    def _fill(self, given: dict[str, Tensor]) -> None:
        for name, value in given.items():
            if name not in self.inputs:
                self.inputs[name] = torch.empty_like(value, device=self.stream.device)
            self.inputs[name].copy_(value, non_blocking=True)

    def _capture_now(self, key: Hashable) -> bool:
        """Whether this kind of step is warm and returns often enough to be worth a graph."""
        if len(self.met) > MOST_COUNTED:  # a schedule under way gives every step a key of its own
            self.met.clear()
        self.met[key] += 1
        return self.met[key] > WARM_STEPS and len(self.graphs) < MOST_GRAPHS

    def _on_stream(self, work: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            work()
        current.wait_stream(self.stream)

    def _run(self, body: Body) -> None:
        noise = {name.removeprefix("noise."): value for name, value in self.inputs.items() if name != "images"}
        body(self.inputs["images"], noise)

    def _capture(self, body: Body, key: Hashable) -> None:
        """Record the body without running it. Other threads, which read data, may use the GPU meanwhile."""
        graph = torch.cuda.CUDAGraph()
        # The graphs run one after the other and leave nothing for each other, so they share their memory.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            self._run(body)
        self.graphs[key] = graph
