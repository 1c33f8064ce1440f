"""One optimiser step: the global batch's own rows through the routed objective, then every trained network moves.

Nothing here waits for the device: terms are summed on it and read only when the loop logs.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vaegan_dist.config import NetworkName, Phase
from vaegan_dist.evaluation.pictures import to_float
from vaegan_dist.models.stateful import stateful_layers
from vaegan_dist.objectives import Objective, build_objective
from vaegan_dist.objectives.base import LATENT, Terms
from vaegan_dist.seeding import standard_normal
from vaegan_dist.training.compiled import compile_networks
from vaegan_dist.training.graphs import StepGraphs, captures
from vaegan_dist.training.schedule import ema_decay, rate_factor
from vaegan_dist.training.state import TrainState

LATENT_STATISTICS = ("latent_kl", "latent_mu", "latent_mu2")


class Step:
    """The step of one phase on one rank.

    The objective is one module in one DistributedDataParallel: its forward returns a scalar whose single backward
    gives every trained network its own gradient, so each parameter is reduced exactly once per step.
    """

    def __init__(self, state: TrainState, phase: Phase, rank: int, world_size: int) -> None:
        config = state.config
        self.state, self.phase, self.rank, self.world_size = state, phase, rank, world_size
        self.batch_size = config.training.batch_size
        self.rows = self.batch_size // world_size
        self.micro_batches = config.training.gradient_accumulation_steps
        # Nothing that an earlier phase left may be taken for a gradient of this one.
        state.networks.zero_grad(set_to_none=True)
        self.device = next(state.networks.parameters()).device
        self.dtype = next(state.networks.parameters()).dtype
        self.objective: Objective = build_objective(
            phase, config.objective_of(phase), state.networks, batch_size=self.batch_size
        )
        self.trained: tuple[NetworkName, ...] = self.objective.trained
        self.stages: tuple[Objective, ...] = self.objective.stages
        for stage in self.stages:
            state.recall(stage.memory)
        self.layers = {name: stateful_layers(state.networks[name]) for name in self.trained}
        self.compiled = compile_networks(state, self.objective)
        self.graphs: StepGraphs | None = None
        self.replays = True  # where there are graphs; a profiler looks into steps that are not
        self.ema_share: float | Tensor = 0.0
        if captures(config.training, self.device, world_size):
            self._read_numbers_from_device()
            self.graphs = StepGraphs(self.device)
        self.modules: list[nn.Module] = [self._wrapped(stage) for stage in self.stages]
        self.units = next((stage.latent_units for stage in self.stages if stage.latent_units), 0)
        self.term_names = (
            *self.objective.term_names,
            *(f"gated_{name}" for name in self.objective.gated),
            *(f"grad_norm_{name}" for name in self.trained),
            *(f"{what}.{unit}" for what in LATENT_STATISTICS for unit in range(self.units)),
            "skipped_steps",
        )
        self.sums = torch.zeros(len(self.term_names), dtype=torch.float64, device=self.device)
        self.steps = 0
        self.skipped_in_a_row = torch.zeros((), device=self.device)
        self.worst_in_a_row = torch.zeros((), device=self.device)

    def _wrapped(self, stage: Objective) -> nn.Module:
        """A stage in a DDP of its own, which reduces the parameters that the stage trains and no others."""
        if self.world_size == 1:
            return stage
        if len(self.stages) > 1:
            stage.focus()
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(stage, device_ids=ids, gradient_as_bucket_view=True, forward_sync_buffers=False)

    def __call__(self, images: Tensor) -> None:
        """Train on this rank's rows `[B / world_size, C, H, W]` of the next global batch (uint8)."""
        self.compiled.begin_step()
        self._set_numbers()
        if self.graphs is None or not self.replays:
            self._train_on(images.to(self.device, non_blocking=True), self._noise())
        else:
            seen = self.state.progress.phase_images
            key = tuple(stage.graph_key(seen) for stage in self.stages)
            self.graphs(self._train_on, key, images, self._noise())
        self.steps += 1

    def _train_on(self, images: Tensor, noise: dict[str, Tensor]) -> None:
        """All that the device does in a step: what it keeps, it writes in place, so that a graph can repeat it."""
        x = self._to_float(images)
        for name in self.trained:
            self.state.optimizers[name].zero_grad(set_to_none=self.world_size == 1)
        terms: list[Tensor] = []
        latent: list[Tensor] = []
        norms: dict[NetworkName, Tensor] = {}
        held: Terms = {}
        skip = torch.zeros((), device=self.device)
        for stage, module in zip(self.stages, self.modules, strict=True):
            if len(self.stages) > 1:
                stage.focus()
            each = [self._backward(stage, module, x, noise, index) for index in range(self.micro_batches)]
            of_stage, of_units = torch.stack(each).mean(0).tensor_split([len(stage.term_names)])
            terms.append(of_stage)
            latent.append(of_units)
            means = self._shared(stage, of_stage)
            held |= stage.held_back(means)
            norms |= {name: self._clip(name) for name in stage.trained}
            finite = torch.isfinite(torch.stack([norms[name] for name in stage.trained])).all()
            # A stage after a skipped one is skipped too.
            skip = torch.maximum(skip, 1.0 - finite.to(torch.float32))
            self._optimize(stage, skip, held)
            stage.remember(means, skip)
        self.state.update_ema(self.ema_share, skip)
        flags = [*(held[name] for name in self.objective.gated), *(norms[name] for name in self.trained)]
        self._accumulate([*terms, torch.stack(flags).to(torch.float64), *latent], skip)

    def _to_float(self, images: Tensor) -> Tensor:
        x = to_float(images, self.dtype)
        if self.state.config.training.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    def _set_numbers(self) -> None:
        """Learning rates of this step, and how far the average moves."""
        config, progress = self.state.config, self.state.progress
        budget = config.phase_images(self.phase)
        # The rate of a step is that of the images it will have seen, so that a warm-up never wastes a step at zero.
        images = progress.phase_images + self.batch_size
        factor = rate_factor(config.optimizer, images, budget + self.batch_size) * self.phase.learning_rate_scale
        factor *= config.training.rollback_rate_factor**progress.rollbacks
        for name in self.trained:
            group = self.state.optimizers[name].param_groups[0]
            group["lr"] = _set(group["lr"], config.optimizer.rate_of(name) * factor)
        decay = ema_decay(config.ema, progress.images_seen + self.batch_size, self.batch_size)
        self.ema_share = _set(self.ema_share, 1.0 - decay)

    def _read_numbers_from_device(self) -> None:
        """Keep these numbers where a captured step can read them anew."""
        self.ema_share = torch.zeros((), device=self.device)
        for name in self.trained:
            optimizer = self.state.optimizers[name]
            group = optimizer.param_groups[0]
            group["lr"], group["capturable"] = torch.zeros((), device=self.device), True
            # The first steps are not captured, and torch would advise against what the others need.
            optimizer._warned_capturable_if_run_uncaptured = True

    def _noise(self) -> dict[str, Tensor]:
        """This rank's rows of the global batch's noise: a function of (seed, purpose, images_seen), not of the rank."""
        start = self.rank * self.rows
        seed, seen = self.state.config.run.seed, self.state.progress.images_seen
        # After a rollback the same images meet other noise; without one the seed is as if there were no such thing.
        rollbacks = self.state.progress.rollbacks
        again = ("rollback", rollbacks) if rollbacks else ()
        drawn = {}
        for name, shape in self.objective.noise_shapes(self.batch_size).items():
            whole = standard_normal(shape, seed, "noise", name, seen, *again, device=self.device)
            drawn[name] = whole[start : start + self.rows].to(self.dtype)
        return drawn

    def _backward(self, stage: Objective, module: nn.Module, x: Tensor, noise: dict[str, Tensor], index: int) -> Tensor:
        """Gradients of one micro-batch, summed onto the others; returns its terms and unit statistics, stacked."""
        size = self.rows // self.micro_batches
        part = slice(index * size, (index + 1) * size)
        last = index == self.micro_batches - 1
        synchronise: AbstractContextManager[None] = nullcontext()
        if isinstance(module, DistributedDataParallel) and not last:
            synchronise = module.no_sync()
        with synchronise:
            with self._autocast():
                loss, terms = module(
                    x[part], {name: value[part] for name, value in noise.items()}, self.state.progress.phase_images
                )
            (loss / self.micro_batches).backward()
        scalars = torch.stack([terms[name].to(torch.float64) for name in stage.term_names])
        return torch.cat([scalars, terms[LATENT].to(torch.float64).flatten()]) if stage.latent_units else scalars

    def _shared(self, stage: Objective, terms: Tensor) -> Terms:
        """Means over all ranks of the terms that a stage decides by; no talk where it asks for none."""
        if not stage.shared_terms:
            return {}
        # Not by a list of indices, which would be copied to the device, and waited for.
        values = torch.stack([terms[stage.term_names.index(name)] for name in stage.shared_terms])
        if self.world_size > 1:
            dist.all_reduce(values)
        return dict(zip(stage.shared_terms, (values / self.world_size).unbind(), strict=True))

    def _autocast(self) -> AbstractContextManager[None]:
        enabled = self.state.config.training.mixed_precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _clip(self, network: NetworkName) -> Tensor:
        """Norm of a network's gradient, which is clipped where the configuration says so.

        DDP has already averaged it, so that every rank sees the same bits and decides alike whether it is finite.
        """
        gradients = [p.grad for p in self.state.networks[network].parameters() if p.grad is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        limit = self.state.config.optimizer.max_grad_norm
        if limit:
            torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _optimize(self, stage: Objective, skip: Tensor, held: Terms) -> None:
        """Move what a stage trains, but for networks that are held back; a skipped step moves nothing."""
        for name in stage.trained:
            optimizer = self.state.optimizers[name]
            # The fused kernel reads this flag on the device and leaves weights and moments alone when it is set.
            stays = torch.maximum(skip, held[name]) if name in held else skip
            optimizer.found_inf = stays  # type: ignore[attr-defined]
            optimizer.step()
            for layer in self.layers[name]:
                layer.advance(stays)

    def _accumulate(self, parts: list[Tensor], skip: Tensor) -> None:
        values = torch.cat(parts)
        # A skipped step counts as skipped and enters no mean.
        values = torch.where(skip > 0, torch.zeros_like(values), values)
        self.sums += torch.cat([values, skip.to(torch.float64).reshape(1)])
        self.skipped_in_a_row.add_(skip).mul_(skip)
        torch.maximum(self.worst_in_a_row, self.skipped_in_a_row, out=self.worst_in_a_row)

    def rates(self) -> dict[str, float]:
        """Learning rate of each trained network at the last step."""
        return {f"lr_{name}": float(self.state.optimizers[name].param_groups[0]["lr"]) for name in self.trained}


def _set(number: float | Tensor, value: float) -> float | Tensor:
    """The new value, in the tensor where there is one."""
    return number.fill_(value) if isinstance(number, Tensor) else value
