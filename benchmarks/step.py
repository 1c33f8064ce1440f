"""Cost of one training step: GFLOP and images per second, side by side with peers on the same networks.

Contenders take turns, round after round; what counts are medians of the ratios within a round, so that a busy machine
slows all alike. The pythae library is left out, and said to be, where it is not installed (`pip install pythae`). Its
pause of a winning player is switched off, so that it trains all three networks in every step, as ours does. The last
line of output is one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaegan_dist.config_source import load_config
from vaegan_dist.models import ImageShape
from vaegan_dist.objectives.flops import FlopCounter
from vaegan_dist.training.state import create_state
from vaegan_dist.training.step import Step

RESULTS = Path(__file__).with_name("RESULTS.md")
LARSEN, SMALL_KL, SOFT_INTRO = ImageShape(3, 64, 64), ImageShape(3, 64, 64), ImageShape(1, 32, 32)
CPU = torch.device("cpu")
Contender = Callable[[], None]


def ours(preset: str, image: ImageShape, batch: int, *overrides: str, device: torch.device = CPU) -> Contender:
    """The product's own step: routed gradients, fused Adam, averages."""
    config = load_config(preset, overrides=[f"training.batch_size={batch}", *overrides])
    state = create_state(config, image, device, torch.float32)
    step = Step(state, config.phases[-1], 0, 1)
    images = torch.randint(0, 256, (batch, image.channels, image.height, image.width), dtype=torch.uint8)
    if device.type == "cuda":
        images = images.pin_memory()  # as the loader hands them over

    def run() -> None:
        step(images)
        state.progress.images_seen += batch
        state.progress.phase_images += batch

    return run


def larsen(batch: int, device: torch.device = CPU) -> nn.ModuleDict:
    """The networks that the peers train: those of the preset larsen-64, channels last, with torch's group norms."""
    config = load_config("larsen-64", overrides=[f"training.batch_size={batch}", "training.fused_norms=false"])
    return create_state(config, LARSEN, device, torch.float32).networks.requires_grad_(True)


def adam(network: nn.Module) -> torch.optim.Adam:
    """Adam; on a GPU in its fused form."""
    return torch.optim.Adam(network.parameters(), lr=3e-4, fused=next(network.parameters()).is_cuda or None)


def two_phase(batch: int, device: torch.device = CPU, bf16: bool = False) -> Contender:
    """As one writes it by hand: discriminator step on detached fakes, then autoencoder step through a frozen one."""
    networks = larsen(batch, device)
    encoder, decoder, discriminator = (networks[name] for name in ("encoder", "decoder", "discriminator"))
    optimizers = {name: adam(network) for name, network in networks.items()}
    x = (torch.rand(batch, 3, 64, 64, device=device) * 2 - 1).contiguous(memory_format=torch.channels_last)
    last = discriminator.depth - 1

    def judged_apart() -> tuple[Tensor, Tensor]:
        x_gen = decoder(torch.randn(batch, 128, device=device))
        return F.softplus(-discriminator(x)).mean() + F.softplus(discriminator(x_gen.detach())).mean(), x_gen

    def seen_through(x_gen: Tensor) -> Tensor:
        posterior = encoder(x)
        x_rec = decoder(posterior.sample(torch.randn(batch, 128, device=device)))
        with torch.no_grad():
            real = discriminator.features(x, last)
        difference = (discriminator.features(x_rec, last) - real).float()
        similarity = 0.5 * difference.square().flatten(1).sum(1).mean()
        kl = posterior.kl_per_dim().sum(1).mean()
        return similarity + kl + F.softplus(-discriminator(x_gen)).mean()

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, x_gen = judged_apart()
        optimizers["discriminator"].zero_grad()
        loss.backward()
        optimizers["discriminator"].step()
        discriminator.requires_grad_(False)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = seen_through(x_gen)
        for name in ("encoder", "decoder"):
            optimizers[name].zero_grad()
        loss.backward()
        for name in ("encoder", "decoder"):
            optimizers[name].step()
        discriminator.requires_grad_(True)

    return run


def pythae(batch: int, device: torch.device = CPU) -> Contender:
    """pythae's VAEGAN and its trainer's step, on our networks."""
    from pythae.models import VAEGAN, VAEGANConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseDiscriminator, BaseEncoder
    from pythae.trainers import CoupledOptimizerAdversarialTrainer

    networks = larsen(batch, device)
    last = networks["discriminator"].depth - 1

    class PythaeEncoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = networks["encoder"]

        def forward(self, x: Tensor) -> Any:
            posterior = self.network(x)
            return ModelOutput(embedding=posterior.mu, log_covariance=posterior.logvar)

    class PythaeDecoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = networks["decoder"]

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.network(z))

    class PythaeDiscriminator(BaseDiscriminator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = networks["discriminator"]
            self.depth = last + 2

        def forward(self, x: Tensor, output_layer_levels: list[int] | None = None) -> Any:
            if output_layer_levels is None:
                return ModelOutput(embedding=torch.sigmoid(self.network(x)))
            return ModelOutput(**{f"embedding_layer_{last + 1}": self.network.features(x, last)})

    settings = VAEGANConfig(input_dim=(3, 64, 64), latent_dim=128, reconstruction_layer=last + 1, margin=1e9)
    model = VAEGAN(settings, PythaeEncoder(), PythaeDecoder(), PythaeDiscriminator()).to(device)
    trainer = SimpleNamespace(**{f"{name}_optimizer": adam(network) for name, network in networks.items()})
    x = torch.rand(batch, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last)

    def run() -> None:
        output = model({"data": x})
        CoupledOptimizerAdversarialTrainer._optimizers_step(trainer, output)
        output.loss.item()

    return run


def autoencoder_two_phase(batch: int) -> Contender:
    """The autoencoder's step as diffusers' example writes it: an autoencoder pass, then a discriminator pass."""
    config = load_config("kl-f4-64", overrides=[f"training.batch_size={batch}"])
    networks = create_state(config, SMALL_KL, torch.device("cpu"), torch.float32).networks.requires_grad_(True)
    encoder, decoder, discriminator = (networks[name] for name in ("encoder", "decoder", "discriminator"))
    both = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-4)
    judge = adam(discriminator)
    x = torch.rand(batch, 3, 64, 64) * 2 - 1

    def run() -> None:
        posterior = encoder(x)
        x_rec = decoder(posterior.sample(torch.randn_like(posterior.mu)))
        rec = (x_rec - x).abs().flatten(1).sum(1).mean()
        adversarial = -discriminator(x_rec).mean()
        at_rec, at_adv = (
            torch.autograd.grad(loss, decoder.last_layer, retain_graph=True)[0] for loss in (rec, adversarial)
        )
        weight = (at_rec.norm() / (at_adv.norm() + 1e-4)).clamp(max=1e4)
        loss = rec + 1e-6 * posterior.kl_per_dim().sum(1).mean() + 0.5 * weight * adversarial
        both.zero_grad()
        loss.backward()
        both.step()
        judge.zero_grad()
        loss = F.relu(1 - discriminator(x)).mean() + F.relu(1 + discriminator(x_rec.detach())).mean()
        loss.backward()
        judge.step()

    return run


def introspective_by_hand(batch: int) -> Contender:
    """Soft-IntroVAE as its authors' loop has it: the encoder's losses, its step, then the decoder's on fresh passes."""
    config = load_config("soft-intro-32", overrides=[f"training.batch_size={batch}"])
    networks = create_state(config, SOFT_INTRO, torch.device("cpu"), torch.float32).networks
    encoder, decoder = networks["encoder"], networks["decoder"]
    optimizers = {"encoder": adam(encoder), "decoder": adam(decoder)}
    x, scale = torch.rand(batch, 1, 32, 32) * 2 - 1, 1 / 1024

    def bound(image: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled negative bound per image, the reconstruction, and the divergence."""
        posterior = encoder(image)
        again = decoder(posterior.sample(torch.randn_like(posterior.mu)))
        error, kl = 0.25 * (again - image).square().flatten(1).sum(1), posterior.kl_per_dim().sum(1)
        return scale * (error + weight * kl), again, kl

    def move(player: str, loss: Tensor) -> None:
        optimizers[player].zero_grad()
        loss.backward()
        optimizers[player].step()

    def run() -> None:
        z_prior = torch.randn(batch, 32)
        encoder.requires_grad_(True)
        decoder.requires_grad_(False)
        real, rec, _ = bound(x, 1.0)
        fakes = (decoder(z_prior), rec.detach())
        exponentials = [torch.exp(-2 * bound(fake.detach(), 256.0)[0]).mean() for fake in fakes]
        move("encoder", real.mean() + 0.25 * torch.stack(exponentials).sum())
        encoder.requires_grad_(False)
        decoder.requires_grad_(True)
        real, rec, _ = bound(x, 0.0)
        judged = [bound(fake, 0.0) for fake in (decoder(z_prior), rec)]
        loss = real.mean() + sum(0.5 * scale * kl.mean() + 0.5e-8 * error.mean() for error, _, kl in judged)
        move("decoder", loss)

    return run


def gflop_per_image(contender: Contender, batch: int) -> float:
    with FlopCounter() as counter:
        contender()
    return counter.total / batch / 1e9


def seconds(contender: Contender) -> float:
    start = time.perf_counter()
    contender()
    return time.perf_counter() - start


def peak(dtype: torch.dtype, size: int = 2048) -> float:
    """GFLOP/s of a large matrix product: the best of a few."""
    a = torch.randn(size, size).to(dtype)
    best = min(seconds(lambda: torch.mm(a, a)) for _ in range(6))
    return 2 * size**3 / best / 1e9


def measure(
    contenders: dict[str, Contender], batch: int, rounds: int, peaks: dict[str, float]
) -> dict[str, dict[str, float]]:
    """GFLOP per image, median images per second, and the median over rounds of the time against the first's.

    The peaks are taken in every round too, and the best kept: one taken while the machine was busy would be no peak.
    """
    cost = {name: gflop_per_image(contender, batch) for name, contender in contenders.items()}  # warms up as well
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            peaks[kind] = max(peaks[kind], peak(dtype))
        for name, contender in contenders.items():
            times[name].append(seconds(contender))
    first = times[next(iter(contenders))]
    return {
        name: {
            "gflop_per_image": cost[name],
            "images_per_second": batch / statistics.median(own),
            "time_against_ours": statistics.median(t / f for t, f in zip(own, first, strict=True)),
        }
        for name, own in times.items()
    }


def table(title: str, results: dict[str, dict[str, float]]) -> str:
    rows = [f"\n{title}\n\n| step | GFLOP/image | images/s | ours is … times as fast |\n|---|---|---|---|"]
    rows += [
        f"| {name} | {r['gflop_per_image']:.2f} | {r['images_per_second']:.1f} | {r['time_against_ours']:.2f} |"
        for name, r in results.items()
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller batches and fewer rounds, within 4 minutes")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--rounds", type=int, default=9, help="rounds per measurement")
    parser.add_argument("--record", action="store_true", help=f"append the results to {RESULTS.name}")
    options = parser.parse_args()
    batch, rounds = (
        (min(options.batch, 8), min(options.rounds, 3)) if options.quick else (options.batch, options.rounds)
    )
    torch.manual_seed(0)
    vaegan: dict[str, Contender] = {
        "ours, prior": ours("larsen-64", LARSEN, batch, "objective.r1=0"),
        "ours, prior + reconstruction": ours(
            "larsen-64", LARSEN, batch, "objective.r1=0", "objective.fakes=prior+reconstruction"
        ),
        "ours, prior, bf16": ours("larsen-64", LARSEN, batch, "objective.r1=0", "training.mixed_precision=bf16"),
        "two phases by hand, prior": two_phase(batch),
    }
    peer = find_spec("pythae") is not None
    if peer:
        vaegan["pythae VAEGAN, prior"] = pythae(batch)
    else:
        print("pythae is not installed: left out", flush=True)
    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    versions = f", pythae {metadata.version('pythae')}" if peer else ""
    report: list[str] = []
    peaks = {"fp32": 0.0, "bf16": 0.0}

    def tell(part: str) -> None:
        report.append(part)
        print(part, flush=True)

    tell(
        f"\n## Step, {time.strftime('%Y-%m-%d')}\n\n{machine}{versions}. Batch {batch}, medians of {rounds} rounds; "
        f"optimiser steps included. Load average at the start {os.getloadavg()[0]:.1f}."
    )
    results = measure(vaegan, batch, rounds, peaks)
    tell(table("Larsen 64×64, 50.7 M parameters", results))
    kl = {
        "ours": ours("kl-f4-64", SMALL_KL, batch, "objective.adversarial_start_images=0"),
        "two passes by hand": autoencoder_two_phase(batch),
    }
    autoencoder = measure(kl, batch, rounds, peaks)
    tell(table("Preset kl-f4-64 (hinge, adaptive weight)", autoencoder))
    soft = {"ours": ours("soft-intro-32", SOFT_INTRO, batch), "by hand": introspective_by_hand(batch)}
    introspective = measure(soft, batch, rounds, peaks)
    tell(table("Preset soft-intro-32 (introspective)", introspective))
    shares = {
        kind: r["gflop_per_image"] * r["images_per_second"] / peaks[kind]
        for kind, r in (("fp32", results["ours, prior"]), ("bf16", results["ours, prior, bf16"]))
    }
    tell(
        f"\nMatrix product of 2048: {peaks['fp32']:.0f} GFLOP/s in fp32, {peaks['bf16']:.0f} in bf16; ours, prior, "
        f"reaches {shares['fp32']:.2f} of it in fp32 and {shares['bf16']:.2f} in bf16."
    )
    if options.record:
        with RESULTS.open("a") as file:
            file.write("\n".join(report) + "\n")
    line = {
        "gflop_per_image_prior": results["ours, prior"]["gflop_per_image"],
        "gflop_per_image_paper": results["ours, prior + reconstruction"]["gflop_per_image"],
        "images_per_second_prior": results["ours, prior"]["images_per_second"],
        "speed_vs_two_phases": results["two phases by hand, prior"]["time_against_ours"],
        "speed_vs_pythae": results["pythae VAEGAN, prior"]["time_against_ours"] if peer else None,
        "gflop_per_image_pythae": results["pythae VAEGAN, prior"]["gflop_per_image"] if peer else None,
        "gflop_per_image_autoencoder": autoencoder["ours"]["gflop_per_image"],
        "speed_vs_autoencoder_by_hand": autoencoder["two passes by hand"]["time_against_ours"],
        "gflop_per_image_introspective": introspective["ours"]["gflop_per_image"],
        "speed_vs_introspective_by_hand": introspective["by hand"]["time_against_ours"],
        "share_of_peak_fp32": shares["fp32"],
        "share_of_peak_bf16": shares["bf16"],
        "batch": batch,
    }
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}))


if __name__ == "__main__":
    main()
