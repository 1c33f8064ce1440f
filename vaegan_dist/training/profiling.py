"""What a step spends its time on, by torch's own profiler: a trace for its viewers and one page for people.

Steps are profiled one operation after the other, also where they are replayed as CUDA graphs otherwise.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from vaegan_dist.files import write_whole
from vaegan_dist.training.step import Step

FOLDER = "profile"
# The first steps of a phase allocate, tune kernels and start threads.
WARM_UP_STEPS = 10
OPERATORS = 20
FORWARD, BACKWARD, OPTIMIZER = "vaegan::forward", "autograd::engine::evaluate_function", "Optimizer.step"


@dataclass
class Times:
    """Seconds of the steps that were profiled, by the host's clock."""

    steps: int = 0
    total: float = 0.0
    data: float = 0.0
    communication: float = 0.0


@dataclass
class StepProfile:
    """Profiles `steps` steps of each phase on the rank that has it; with 0 it does nothing.

    Args:
        folder: the run's folder.
    """

    folder: Path
    steps: int
    device: torch.device
    _step: Step | None = None
    _waiting: int = 0
    _profiler: Any = None
    _hooks: list[Any] = field(default_factory=list)
    _ranges: list[Any] = field(default_factory=list)
    _times: Times = field(default_factory=Times)

    def begin(self, step: Step) -> None:
        """A phase begins."""
        self.close()
        if self.steps:
            self._step, self._waiting, self._times = step, WARM_UP_STEPS, Times()

    def after_step(self, total: float, data: float, communication: float) -> None:
        """A step ended, after so many seconds in all, waiting for its batch, and waiting for other ranks."""
        if self._step is None:
            return
        if self._profiler is None:
            self._waiting -= 1
            if self._waiting <= 0:
                self._start(self._step)
            return
        times = self._times
        times.steps, times.total = times.steps + 1, times.total + total
        times.data, times.communication = times.data + data, times.communication + communication
        if times.steps == self.steps:
            self.close()

    def close(self) -> None:
        """End a profile under way and write what it has."""
        profiler, step, self._profiler, self._step = self._profiler, self._step, None, None
        if profiler is None or step is None:
            return
        profiler.stop()
        step.replays = True
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        folder = self.folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"{step.phase.name}-trace.json.gz"))
        if self._times.steps:
            text = summary(profiler, self._times, step.phase.name, self.device)
            write_whole(folder / f"{step.phase.name}-summary.md", text.encode())

    def _start(self, step: Step) -> None:
        step.replays = False  # a graph has no parts
        for module in step.modules:
            self._hooks.append(module.register_forward_pre_hook(self._enter))
            self._hooks.append(module.register_forward_hook(self._leave))
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def _enter(self, module: object, inputs: object) -> None:
        self._ranges.append(record_function(FORWARD).__enter__())  # type: ignore[no-untyped-call]

    def _leave(self, module: object, inputs: object, output: object) -> None:
        self._ranges.pop().__exit__(None, None, None)


def summary(profiler: Any, times: Times, phase: str, device: torch.device) -> str:
    """One page: the shares of a step, and the operators that take most."""
    on_device = device.type == "cuda"
    totals = {"forward": 0.0, "backward": 0.0, "optimiser": 0.0}
    for event in profiler.events():
        part = _part(event)
        if part:
            microseconds = event.device_time_total if on_device else event.cpu_time_total
            totals[part] += microseconds * 1e-6
    rows = {**totals, "communication": times.communication, "data": times.data}
    rest = max(times.total - sum(rows.values()), 0.0)
    lines = [f"# Profile of phase {phase}", "", f"{times.steps} steps on {device}, mean of each:", ""]
    lines += ["| part | milliseconds | share |", "|---|---:|---:|"]
    for name, seconds in {**rows, "rest": rest, "whole step": times.total}.items():
        lines.append(f"| {name} | {1e3 * seconds / times.steps:.2f} | {100 * seconds / times.total:.1f}% |")
    lines += [
        "",
        f"Forward, backward and optimiser are times of the {'GPU' if on_device else 'CPU'}; communication is waiting "
        "for other workers that the backward pass does not hide; data is waiting for a batch; the rest is noise, "
        "gradient norms, averages and whatever stands between.",
        "",
        "```",
        profiler.key_averages().table(
            sort_by="self_device_time_total" if on_device else "self_cpu_time_total",
            row_limit=OPERATORS,
            max_name_column_width=48,
        ),
        "```",
        "",
        f"The trace beside this file ({phase}-trace.json.gz) opens in Perfetto and in chrome://tracing.",
        "",
    ]
    return "\n".join(lines)


def _part(event: Any) -> str:
    """What a profiled range counts as; empty for all inside of another that counts."""
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith((FORWARD, BACKWARD, OPTIMIZER)):
            return ""
        parent = parent.cpu_parent
    names = {FORWARD: "forward", BACKWARD: "backward", OPTIMIZER: "optimiser"}
    return next((part for name, part in names.items() if event.name.startswith(name)), "")
