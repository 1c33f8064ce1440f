"""What binds a run on 8 to 1,024 GPUs: the formulas of docs/scaling.md over a preset's counted parts.

`python benchmarks/scaling.py --preset larsen-64 --image 3x64x64 --share 0.3 --network 50`. Parameters and FLOPs are
counted here; every rate is an argument, so put in what `vaegan-dist check-cluster` and a run of your own have measured.
The last line is one JSON object.
"""

import argparse
import json
from dataclasses import asdict, dataclass

from vaegan_dist.config_source import load_config
from vaegan_dist.models import ImageShape
from vaegan_dist.training.describe import describe_model

GRADIENT_BYTES = 4  # float32, whatever autocast does
OPTIMIZER_BYTES = 40  # read gradient, weight, two moments and average; write the last four
CHECKPOINT_BYTES = 16  # weight, average, two moments
BACKWARD = 2 / 3  # of a step's arithmetic, during which gradients travel


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU and of what it shares. Bytes and operations per second."""

    flops: float  # peak times the share that the step reaches
    memory: float  # of the GPU
    network: float  # bus bandwidth for each GPU between nodes
    latency: float  # seconds of one hop
    storage: float  # of the object store or file system, for all nodes together
    cores: float  # images per second that the cores beside one GPU decode


@dataclass(frozen=True)
class Point:
    """One number of GPUs. Seconds per step but where said."""

    gpus: int
    compute: float
    network: float
    step: float
    images_per_second: float
    efficiency: float  # against as many GPUs that need not talk
    data_bytes_per_second: float
    bound_by: str


def point(gpus: int, images: int, parameters: int, flops: float, image_bytes: float, machine: Machine) -> Point:
    """The model of docs/scaling.md for `images` per GPU and step."""
    compute = images * flops / machine.flops
    update = OPTIMIZER_BYTES * parameters / machine.memory
    ring = 2 * (gpus - 1) / gpus * GRADIENT_BYTES * parameters / machine.network if gpus > 1 else 0.0
    network = ring + 2 * (gpus - 1).bit_length() * machine.latency
    alone = compute + update
    step = compute * (1 - BACKWARD) + max(compute * BACKWARD, network) + update
    rates = {
        "arithmetic" if network <= compute * BACKWARD else "network": gpus * images / step,
        "decoding": gpus * machine.cores,
        "storage": machine.storage / image_bytes,
    }
    bound_by, rate = min(rates.items(), key=lambda item: item[1])
    return Point(
        gpus=gpus,
        compute=compute,
        network=network,
        step=gpus * images / rate,
        images_per_second=rate,
        efficiency=rate / (gpus * images / alone),
        data_bytes_per_second=rate * image_bytes,
        bound_by=bound_by,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="larsen-64")
    parser.add_argument("--image", default="3x64x64", help="channels x height x width (default: 3x64x64)")
    parser.add_argument("--images", type=int, default=64, help="per GPU and step (default: 64)")
    parser.add_argument("--image-bytes", type=float, default=2_500, help="of a picture in its shard (default: 2500)")
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of a GPU (default: 989, H100 in bf16)")
    parser.add_argument("--share", type=float, default=0.3, help="of the peak that the step reaches (default: 0.3)")
    parser.add_argument("--memory", type=float, default=3_350, help="GB/s of a GPU's memory (default: 3350)")
    parser.add_argument("--network", type=float, default=50, help="GB/s for each GPU between nodes (default: 50)")
    parser.add_argument("--latency", type=float, default=20, help="microseconds of a hop (default: 20)")
    parser.add_argument("--storage", type=float, default=10, help="GB/s of the store, for all nodes (default: 10)")
    parser.add_argument("--decode", type=float, default=20_000, help="images/s of one core (default: 20000)")
    parser.add_argument("--cores", type=float, default=8, help="beside each GPU (default: 8)")
    options = parser.parse_args()
    channels, height, width = map(int, options.image.split("x"))
    shape = ImageShape(channels=channels, height=height, width=width)
    plan = describe_model(load_config(options.preset), shape)
    flops, parameters = max(phase.flops_per_image for phase in plan.phases), sum(plan.parameters.values())
    machine = Machine(
        flops=options.peak * 1e12 * options.share,
        memory=options.memory * 1e9,
        network=options.network * 1e9,
        latency=options.latency * 1e-6,
        storage=options.storage * 1e9,
        cores=options.decode * options.cores,
    )
    points = [
        point(2**power, options.images, parameters, flops, options.image_bytes, machine) for power in range(3, 11)
    ]
    gradients = GRADIENT_BYTES * parameters
    print(
        f"{options.preset}: {parameters / 1e6:.1f} M parameters, {gradients / 1e6:.0f} MB of gradients a step, "
        f"{flops / 1e9:.2f} GFLOP per image, checkpoint {CHECKPOINT_BYTES * parameters / 1e6:.0f} MB\n"
    )
    print("| GPUs | compute ms | network ms | step ms | images/s | efficiency | data MB/s | bound by |")
    print("|---|---|---|---|---|---|---|---|")
    for each in points:
        print(
            f"| {each.gpus:,} | {each.compute * 1e3:.2f} | {each.network * 1e3:.2f} | {each.step * 1e3:.2f} | "
            f"{each.images_per_second:,.0f} | {each.efficiency:.0%} | {each.data_bytes_per_second / 1e6:,.0f} | "
            f"{each.bound_by} |"
        )
    hidden = 2 * gradients / machine.network / (BACKWARD * flops / machine.flops)
    print(f"\nThe network is hidden behind the backward pass from {hidden:.0f} images per GPU on.\n")
    figures = {"parameters": parameters, "gradient_bytes": gradients, "gflop_per_image": flops / 1e9}
    print(json.dumps({**figures, "images_to_hide_network": hidden, "points": [asdict(each) for each in points]}))


if __name__ == "__main__":
    main()
