"""What one training step costs on a GPU: images per second, share of its matrix units' peak, kernels, memory.

A mode is timed in turns with the first of its table, round after round, each turn between two waits for the device;
what counts are medians. Every row is printed as soon as it is measured, and a mode that fails is a row with the first
line of its error. Modes that compile come last, beside the first again. `--device cpu` tries the same code on tiny
sizes. The last line of output is one JSON object.

Columns: GFLOP per image, counted in the plain step; share of the peak, that of a large matrix product in bf16, or in
tf32 for steps in fp32, since convolutions then run in tf32; kernels on the device and launches by the host, per step;
how much of the step the device works; memory, the most that was reserved over what there was before.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from step import LARSEN, RESULTS, SOFT_INTRO, Contender, gflop_per_image, ours, pythae, two_phase
from torch.profiler import ProfilerActivity, profile

from vaegan_dist.models import ImageShape
from vaegan_dist.training.memory import is_out_of_memory

BF16, FP32 = "training.mixed_precision=bf16", "training.mixed_precision=no"
GRAPHS, EACH = "training.cuda_graphs=true", "training.cuda_graphs=false"
TORCH_NORMS = "training.fused_norms=false"
WARM_UP = 12  # steps; graphs are captured in them
WARM_KINDS = 5  # of each kind of step, where a turn has several kinds
TURN_SECONDS = 0.12  # what the steps of one turn take together
LAZY = 16  # steps between two penalties of larsen-64: their mean is the cost
PROFILED = 2
HEAD = (
    "| step | images/s | times as fast as the first | GFLOP/image | share of peak | kernels | launches | busy | GiB |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Mode:
    """A way to make a step.

    Attributes:
        settings: overrides of the configuration.
        peer: instead of the product's own step, `two_phase` or `pythae` on its networks.
        at_once: steps of a turn; 0: as many as fill it.
    """

    name: str
    settings: tuple[str, ...] = ()
    peer: str = ""
    at_once: int = 0

    @property
    def compiled(self) -> bool:
        """It takes long to begin."""
        return any(setting.startswith("training.compile=") for setting in self.settings)

    @property
    def graphs(self) -> bool:
        return any(setting == GRAPHS or "reduce-overhead" in setting for setting in self.settings)


@dataclass(frozen=True)
class Case:
    """What is trained, in several modes; the first is what the others are compared with."""

    preset: str
    image: ImageShape
    batch: int
    modes: tuple[Mode, ...]
    settings: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.preset}, {self.image}, batch {self.batch}"

    def contender(self, mode: Mode, device: torch.device) -> Contender:
        if mode.peer == "two_phase":
            return two_phase(self.batch, device, bf16=True)
        if mode.peer == "pythae":
            return pythae(self.batch, device)
        return ours(self.preset, self.image, self.batch, *self.settings, *mode.settings, device=device)


@dataclass
class Row:
    """What was measured of one mode; None where it could not be."""

    case: str
    mode: str
    images_per_second: float | None = None
    times_as_fast: float | None = None
    gflop_per_image: float | None = None
    share_of_peak: float | None = None
    kernels: float | None = None
    launches: float | None = None
    busy: float | None = None
    gib: float | None = None
    error: str = ""

    def __str__(self) -> str:
        if self.error:
            return f"| {self.mode} | {self.error} | | | | | | | |"
        digits = {"images_per_second": 1, "kernels": 0, "launches": 0, "gflop_per_image": 3}
        cells = [
            "–" if value is None else f"{value:,.{digits.get(key, 2)}f}"
            for key, value in asdict(self).items()
            if key not in ("case", "mode", "error")
        ]
        return f"| {self.mode} | {' | '.join(cells)} |"


@dataclass
class Bench:
    """The device, its peaks, how long all may take, and what was said."""

    device: torch.device
    rounds: int
    seconds: float
    peaks: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    report: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def late(self) -> bool:
        return bool(self.seconds) and time.monotonic() - self.started > self.seconds

    def tell(self, part: str) -> None:
        self.report.append(part)
        print(part, flush=True)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def turn(self, contender: Contender, steps: int) -> float:
        """Seconds of a step: the mean of several in one go, from an idle device to an idle device."""
        self.wait()
        start = time.perf_counter()
        for _ in range(steps):
            contender()
        self.wait()
        return (time.perf_counter() - start) / steps

    def reserved(self, *, most: bool = False) -> float:
        """GiB that the allocator holds, now or at most: graphs keep theirs, whether it is in use or not."""
        if self.device.type != "cuda":
            return 0.0
        read = torch.cuda.max_memory_reserved if most else torch.cuda.memory_reserved
        return float(read(self.device)) / 2**30

    def release(self) -> None:
        """Free what the last mode held: graphs keep their memory until they are gone."""
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


@dataclass
class Reference:
    """The first mode of a case, which stays to take turns with the others."""

    run: Contender
    seconds: float


def modes(*wanted: str) -> tuple[Mode, ...]:
    """The modes by these names, in this order."""
    plain = "objective.r1=0"
    every = (
        Mode("bf16", (BF16, plain, EACH)),
        Mode("fp32", (FP32, plain, EACH)),
        Mode("bf16, graphs", (BF16, plain, GRAPHS)),
        Mode("bf16, torch's norms", (BF16, plain, EACH, TORCH_NORMS)),
        Mode("bf16, torch's norms, graphs", (BF16, plain, GRAPHS, TORCH_NORMS)),
        Mode("bf16, compile=default", (BF16, plain, EACH, "training.compile=default")),
        Mode("bf16, compile=reduce-overhead", (BF16, plain, EACH, "training.compile=reduce-overhead")),
        Mode("bf16, compile=default, graphs", (BF16, plain, "training.compile=default", GRAPHS)),
        Mode("bf16, R1 every 16 steps", (BF16, EACH), at_once=LAZY),
        Mode("bf16, R1 every 16 steps, graphs", (BF16, GRAPHS), at_once=LAZY),
        Mode("preset as it is", (EACH,)),
        Mode("preset as it is, graphs", (GRAPHS,)),
        Mode("two phases by hand, bf16", peer="two_phase"),
        Mode("pythae VAEGAN, fp32", peer="pythae"),
    )
    by_name = {mode.name: mode for mode in every}
    return tuple(by_name[name] for name in wanted)


OURS = ("bf16", "fp32", "bf16, graphs")
NORMS = ("bf16, torch's norms", "bf16, torch's norms, graphs")
COMPILED = ("bf16, compile=default",)
SMALL_COMPILED = ("bf16, compile=default, graphs", "bf16, compile=reduce-overhead")  # where launches count
LAZILY = ("bf16, R1 every 16 steps", "bf16, R1 every 16 steps, graphs")
BY_HAND, PYTHAE = "two phases by hand, bf16", "pythae VAEGAN, fp32"
SMALL = ("preset as it is", "preset as it is, graphs")


def cases(quick: bool, tiny: bool) -> Iterator[Case]:
    """All that is measured; `tiny` fits a CPU."""
    larsen: tuple[int, ...] = (64, 1024) if quick else (64, 256, 1024)
    kl: tuple[int, ...] = (12,) if quick else (12, 48)
    if tiny:
        larsen, kl = (2, 4), (2,)
    stages = ("channels", "decoder_channels", "discriminator_channels")
    narrow = ("model.hidden=16", *(f"model.{name}=[8,8,8]" for name in stages)) if tiny else ()
    for batch in larsen:
        lazily = LAZILY if batch == larsen[-1] else ()
        compiled = {larsen[0]: SMALL_COMPILED, larsen[-1]: COMPILED}.get(batch, ())
        wanted = (*OURS, *NORMS, *lazily, BY_HAND, PYTHAE, *compiled)
        yield Case("larsen-64", LARSEN, batch, modes(*wanted), narrow)
    shrunk = ("model.channels=[32,32,32,32]", "model.discriminator_channels=8") if tiny else ()
    picture = ImageShape(3, 64, 64) if tiny else ImageShape(3, 256, 256)
    started = ("objective.adversarial_start_images=0", *shrunk)
    for batch in kl:
        wanted = ("bf16", "bf16, graphs", *NORMS) if quick else (*OURS, *NORMS, *(COMPILED if batch == kl[0] else ()))
        yield Case("kl-f8-256", picture, batch, modes(*wanted), started)
    small = 8 if tiny else 128
    yield Case("digits-conv", ImageShape(1, 28, 28), small, modes(*SMALL), ("objective.r1=0",))
    yield Case("soft-intro-32", SOFT_INTRO, small, modes(*SMALL))


def in_order(every: Iterable[Case], only: str) -> Iterator[tuple[Case, list[Mode]]]:
    """Each case with the modes to measure now: its first, and the others in two passes, the slow ones last."""
    every = list(every)
    for compiled in (False, True):
        for case in every:
            chosen = [mode for mode in case.modes if mode.compiled == compiled and only in f"{case.title}: {mode.name}"]
            if chosen:
                yield case, list(dict.fromkeys([case.modes[0], *chosen]))


def product(a: torch.Tensor) -> Contender:
    def run() -> None:
        torch.mm(a, a)

    return run


def peaks(bench: Bench) -> dict[str, float]:
    """GFLOP/s of a large matrix product in each precision: the best of a few."""
    size = 8192 if bench.device.type == "cuda" else 512
    found = {}
    for kind, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32), ("fp32", torch.float32)):
        torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
        a = torch.randn(size, size, device=bench.device).to(dtype)
        found[kind] = 2 * size**3 / min(bench.turn(product(a), 4) for _ in range(5)) / 1e9
    return found


def device_work(events: list[dict[str, object]], steps: int) -> tuple[float, float, float]:
    """Kernels, launches and seconds of work on the device, per step, in the events of a chrome trace."""
    kinds = [(str(event.get("cat", "")), str(event.get("name", "")), event.get("dur", 0)) for event in events]
    kernels = sum(kind == "kernel" for kind, _, _ in kinds)
    launches = sum(kind in ("cuda_runtime", "cuda_driver") and "Launch" in name for kind, name, _ in kinds)
    busy = sum(float(str(took)) for kind, _, took in kinds if kind in ("kernel", "gpu_memcpy", "gpu_memset"))
    return kernels / steps, launches / steps, busy * 1e-6 / steps


def traced(bench: Bench, contender: Contender, steps: int) -> list[dict[str, object]]:
    """Events of so many steps on a GPU, by torch's profiler."""
    if bench.device.type != "cuda":
        return []
    with tempfile.TemporaryDirectory() as folder:
        bench.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            bench.turn(contender, steps)
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, object]] = json.loads(path.read_text())["traceEvents"]
    return events


def warm_up(bench: Bench, contender: Contender, mode: Mode) -> None:
    """The first steps, which allocate, choose kernels, compile and capture."""
    start = time.monotonic()
    steps = max(WARM_UP, WARM_KINDS * mode.at_once) if mode.graphs else WARM_UP
    for step in range(steps if bench.device.type == "cuda" else 1):
        contender()
        bench.wait()
        if step >= 3 and time.monotonic() - start > 2 and not mode.graphs:
            break


def timed(bench: Bench, contender: Contender, mode: Mode, reference: Reference | None) -> tuple[float, float]:
    """Median seconds of a step, and median over rounds of how many times as fast as the reference it is."""
    once = bench.turn(contender, mode.at_once or 1)
    steps = mode.at_once or max(1, min(64, round(TURN_SECONDS / once)))
    beside = 1 if reference is None else max(1, min(64, round(TURN_SECONDS / reference.seconds)))
    own, against = [], []
    for _ in range(bench.rounds):
        other = None if reference is None else bench.turn(reference.run, beside)
        own.append(bench.turn(contender, steps))
        against.append(1.0 if other is None else other / own[-1])
    return statistics.median(own), statistics.median(against)


def measure(bench: Bench, case: Case, mode: Mode, reference: Reference | None, row: Row) -> Reference:
    """Fill in a mode's row, but for what the profiler finds."""
    bench.release()
    before = bench.reserved()
    contender = case.contender(mode, bench.device)
    if not mode.compiled and not mode.graphs:
        row.gflop_per_image = gflop_per_image(contender, case.batch)
        # A lazy penalty falls into the first of its steps; the others are the same.
        rest = [gflop_per_image(contender, case.batch) for _ in range(mode.at_once - 1)]
        row.gflop_per_image = statistics.fmean([row.gflop_per_image, *rest])
    warm_up(bench, contender, mode)
    if bench.device.type == "cuda":
        row.gib = bench.reserved(most=True) - before
    seconds, row.times_as_fast = timed(bench, contender, mode, reference)
    row.images_per_second = case.batch / seconds
    return Reference(contender, seconds)


def look_inside(bench: Bench, made: Reference, mode: Mode, row: Row) -> None:
    """What the profiler finds; nothing where the machine has no counters for it."""
    steps = mode.at_once or PROFILED
    kernels, launches, busy = device_work(traced(bench, made.run, steps), steps)
    if kernels:
        row.kernels, row.launches, row.busy = kernels, launches, busy / made.seconds


def finish(bench: Bench, mode: Mode, row: Row, counted: dict[tuple[str, ...], float]) -> None:
    """What follows from the rest: captured and compiled steps do the operations of the plain step of their settings."""
    left_out = (GRAPHS, EACH, TORCH_NORMS)
    key = (mode.peer, *sorted(s for s in mode.settings if "compile" not in s and s not in left_out))
    if row.error:
        return
    if row.gflop_per_image is not None:
        counted[key] = row.gflop_per_image
    row.gflop_per_image = counted.get(key)
    if row.gflop_per_image is not None and row.images_per_second is not None:
        half = BF16 in mode.settings or "bf16" in mode.name
        rate = row.gflop_per_image * row.images_per_second
        row.share_of_peak = rate / bench.peaks["bf16" if half else "tf32"]


def first_line(error: BaseException) -> str:
    if is_out_of_memory(error):
        return "out of memory"
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.replace("|", "/")[:120]


def run_mode(
    bench: Bench, case: Case, mode: Mode, reference: Reference | None, counted: dict[tuple[str, ...], float]
) -> Reference | None:
    """Measure one mode and say so; None where it fails."""
    if bench.late or (mode.peer == "pythae" and find_spec("pythae") is None):
        bench.tell(f"| {mode.name} | left out: {'no time' if bench.late else 'not installed'} | | | | | | | |")
        return None
    row, made = Row(case.title, mode.name), None
    try:
        made = measure(bench, case, mode, reference, row)
        look_inside(bench, made, mode, row)
    except Exception as error:  # whatever a mode fails with, the others are measured
        if made is None:
            row.error = first_line(error)
        else:
            print(f"{mode.name}: no profile ({first_line(error)})", file=sys.stderr)
    finish(bench, mode, row, counted)
    bench.rows.append(row)
    bench.tell(str(row))
    return made


def run_case(bench: Bench, case: Case, chosen: list[Mode], counted: dict[tuple[str, ...], float]) -> None:
    """Measure modes one after the other, each in turns with the first."""
    bench.tell(f"\n{case.title}\n\n{HEAD}")
    reference = run_mode(bench, case, chosen[0], None, counted)
    for mode in chosen[1:]:
        run_mode(bench, case, mode, reference, counted)


def device_of(name: str) -> torch.device:
    """The device, or the end of the program in one line."""
    if name == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks/gpu.py needs a GPU, and torch sees none; --device cpu tries it on tiny sizes", file=sys.stderr
        )
        sys.exit(2)
    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer batches, modes and rounds, within 100 seconds")
    parser.add_argument("--only", default="", metavar="TEXT", help="what has this in 'PRESET, SIZE, batch N: MODE'")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per measurement")
    parser.add_argument("--seconds", type=float, default=0.0, help="begin no row later than this (--quick: 75)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--record", action="store_true", help=f"append the results to {RESULTS.name}")
    options = parser.parse_args()
    device = device_of(options.device)
    rounds, seconds = options.rounds, options.seconds
    if options.quick:
        rounds, seconds = min(rounds, 5), seconds or 75.0
    torch.manual_seed(0)
    bench = Bench(device, rounds, seconds)
    bench.peaks = peaks(bench)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, tiny sizes"
    bench.tell(
        f"\n## GPU step, {time.strftime('%Y-%m-%d')}\n\n{name}, torch {torch.__version__}. Medians of {rounds} rounds; "
        f"optimiser steps and the copy of the pictures included. A large matrix product reaches "
        f"{', '.join(f'{rate / 1e3:.1f} TFLOP/s in {kind}' for kind, rate in bench.peaks.items())}."
    )
    counted: dict[str, dict[tuple[str, ...], float]] = {}
    for case, chosen in in_order(cases(options.quick, device.type == "cpu"), options.only):
        run_case(bench, case, chosen, counted.setdefault(case.title, {}))
    if options.record:
        with RESULTS.open("a") as file:
            file.write("\n".join(bench.report) + "\n")
    figures = [{key: value for key, value in asdict(row).items() if value not in (None, "")} for row in bench.rows]
    print(json.dumps({"device": name, "torch": torch.__version__, "peak_gflops": bench.peaks, "rows": figures}))


if __name__ == "__main__":
    main()
