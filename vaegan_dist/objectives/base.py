"""What the training loop knows of an objective."""

from typing import cast

import torch
from torch import Tensor, nn

from vaegan_dist.config import NetworkName, ObjectiveSection, Phase
from vaegan_dist.errors import ConfigError
from vaegan_dist.models import Decoder, Discriminator, Encoder
from vaegan_dist.objectives.divergence import kl_numbers

Terms = dict[str, Tensor]
LATENT = "latent"  # mean over images of each latent unit's KL, mu and mu^2: `[3, units]`


class Objective(nn.Module):
    """Networks and losses of one phase: maps a batch to one scalar to call `.backward()` on.

    The scalar is a carrier of gradients, not a loss: every network that learns receives the gradient of its own loss
    from it, as a mean over the batch. The losses themselves are in the terms.

    Attributes:
        trained: networks that learn, in the order encoder, decoder, discriminator; the others do not require gradients.
        term_names: names of the terms that `forward` returns, in this order, always all of them; of all stages, where
            there are several.
        gated: networks that `held_back` may hold back.
        shared_terms: those of them whose means over all ranks `held_back` and `remember` ask for.
        memory: tensors that pass from step to step, and into checkpoints, by name.
        latent_units: units whose statistics `forward` returns as the further term `latent`; 0: it returns none.
    """

    trained: tuple[NetworkName, ...]
    term_names: tuple[str, ...]
    gated: tuple[NetworkName, ...] = ()
    shared_terms: tuple[str, ...] = ()
    latent_units: int = 0

    def __init__(
        self,
        phase: Phase,
        settings: ObjectiveSection,
        networks: nn.ModuleDict,
        used: tuple[NetworkName, ...],
        trainable: tuple[NetworkName, ...],
    ) -> None:
        super().__init__()
        wanted: tuple[str, ...] = phase.train or trainable
        for name in wanted:
            if name not in trainable:
                raise ConfigError(
                    f"phases.{phase.name}.train={name}: objective {phase.objective} does not train it; "
                    f"choose from {', '.join(trainable)}"
                )
        self.settings = settings
        self.memory: dict[str, Tensor] = {}
        self.trained = tuple(name for name in trainable if name in wanted)
        for key, network in networks.items():
            network.requires_grad_(key in self.trained)
            for parameter in network.parameters():
                parameter.grad = None
        self.networks = nn.ModuleDict({name: networks[name] for name in used})

    @property
    def encoder(self) -> Encoder:
        return cast(Encoder, self.networks["encoder"])

    @property
    def decoder(self) -> Decoder:
        return cast(Decoder, self.networks["decoder"])

    @property
    def discriminator(self) -> Discriminator:
        return cast(Discriminator, self.networks["discriminator"])

    @property
    def stages(self) -> tuple["Objective", ...]:
        """What one optimiser step runs one after the other: forward, backward, and the move of what the stage trains.

        Stages train disjoint sets of networks. Most objectives are their own single stage; one whose players must
        move in turn has several, and no `forward` itself.
        """
        return (self,)

    def focus(self) -> None:
        """Let exactly the trained networks require gradients; what trains in several stages asks for it before each."""
        for name, network in self.networks.items():
            network.requires_grad_(name in self.trained)

    def learns(self, name: NetworkName) -> bool:
        """Whether a network is trained in this phase."""
        return name in self.trained

    def noise_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Standard normal tensors that a batch of this many images needs; the first dimension counts images."""
        raise NotImplementedError

    def forward(self, x: Tensor, noise: dict[str, Tensor], images_seen: int) -> tuple[Tensor, Terms]:
        """One step's scalar and terms.

        Args:
            x: real pictures `[B, C, H, W]` in [-1, 1].
            noise: the tensors of `noise_shapes(B)`, this rank's rows.
            images_seen: images that the phase has seen before this step, over all ranks.

        Returns:
            A scalar whose one backward pass gives each trained network its own gradient, and detached scalar terms
            (means over this rank's batch).
        """
        raise NotImplementedError

    def graph_key(self, images_seen: int) -> tuple[float, ...]:
        """All that `forward` makes of `images_seen`: steps of equal keys do the same to what they are given."""
        return kl_numbers(self.settings, images_seen)

    def held_back(self, means: Terms) -> Terms:
        """`gated` networks with a flag 0 or 1: whether they may take no optimiser step now; equal on all ranks.

        Args:
            means: of `shared_terms` over the global batch.
        """
        return {}

    def remember(self, means: Terms, skip: Tensor) -> None:
        """Move `memory` on after a step, unless it was skipped (flag 1)."""

    def ordered(self, terms: Terms) -> Terms:
        """The terms in the order of `term_names`, detached, and the statistics of the latent units."""
        names = (*self.term_names, *([LATENT] if self.latent_units else []))
        if set(terms) != set(names):
            raise AssertionError(f"terms {sorted(terms)} differ from the promised {sorted(names)}")
        return {name: terms[name].detach() for name in names}


def uniform(normal: Tensor) -> Tensor:
    """Standard normal numbers -> uniform ones in [0, 1]."""
    share: Tensor = torch.special.ndtr(normal)
    return share
