"""A trial's training step on the driver, which asks it for names and for a rate; the driver may have no GPU."""

import torch

from vaegan_dist.config import Config
from vaegan_dist.config_source import with_changes
from vaegan_dist.data.manifest import Manifest
from vaegan_dist.training.pictures import image_of
from vaegan_dist.training.state import create_state
from vaegan_dist.training.step import Step

# Settings that a step is refused for without a GPU, as one is that the driver makes for a trial that has one.
PLAIN = {"training.cuda_graphs": None, "training.fused_norms": None, "training.compile": "no"}


def last_step(config: Config, manifest: Manifest) -> Step:
    """The step of the last phase on this machine's CPU, neither compiled nor captured."""
    plain = with_changes(config, PLAIN)
    state = create_state(plain, image_of(manifest), torch.device("cpu"), torch.float32)
    return Step(state, plain.phases[-1], 0, 1)
