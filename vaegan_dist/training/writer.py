"""What rank 0 leaves in the run's folder while it trains: history, pictures, curves, configuration."""

from collections import deque
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image
from torch import Tensor

from vaegan_dist.config import Config
from vaegan_dist.config_source import dump_yaml
from vaegan_dist.evaluation.pictures import comparison, grid, save_png, to_float, to_uint8
from vaegan_dist.files import write_whole
from vaegan_dist.models import latent_shape
from vaegan_dist.reporting.curves import plot_curves
from vaegan_dist.reporting.records import Record
from vaegan_dist.reporting.sinks import Fanout, Sink
from vaegan_dist.reporting.trackers import open_sinks
from vaegan_dist.seeding import standard_normal
from vaegan_dist.training.runtime import Runtime
from vaegan_dist.training.state import TrainState

COMPARED = 16
# Of each network's weights, taken evenly: enough for a histogram.
WEIGHTS_SHOWN = 20_000


class Writer:
    """Writes on rank 0; on every other rank each call does nothing.

    Args:
        resume_at: rows of the history past this image count belong to work that is redone and go (None: a new history).
    """

    def __init__(self, config: Config, folder: Path, runtime: Runtime, resume_at: int | None) -> None:
        self.config, self.folder, self.runtime = config, folder, runtime
        self.active = runtime.rank == 0
        self.sinks: Sink | None = None
        # What trackers say in threads of their own, until the next record.
        self.troubles: deque[str] = deque()
        if self.active:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "config.yaml", dump_yaml(config).encode())
            self.sinks = self._open_sinks(resume_at)

    def rewind(self, images_seen: int) -> None:
        """Forget the rows past an image count: their work is done again."""
        if self.sinks is not None:
            self.sinks.close()
            self.sinks = self._open_sinks(images_seen)

    def _open_sinks(self, resume_at: int | None) -> Sink:
        return Fanout(open_sinks(self.config, self.folder, resume_at, self.troubles.append))

    def log(self, record: Record) -> None:
        """One row of the history, and one message to whoever watches."""
        if self.sinks is not None:
            self.sinks.log(record)
            self.runtime.publish(record)
            while self.troubles:
                place: Record = {key: record[key] for key in ("images_seen", "phase") if key in record}
                self.log({"event": "warning", "message": self.troubles.popleft(), **place})

    def pictures(self, state: TrainState, originals: Tensor) -> None:
        """Samples and reconstructions of the averaged networks; the same z and originals every time.

        Args:
            originals: uint8 `[n, C, H, W]`, the pictures to reconstruct.
        """
        if self.sinks is None:
            return
        for name, image in self._sheets(state, originals).items():
            seen = state.progress.images_seen
            save_png(image, self.folder / "pictures" / f"{name}-{seen:012d}-{state.phase.name}.png")
            save_png(image, self.folder / f"{name}.png")
            self.sinks.pictures(name, image, seen)
        for name, values in distributions(state, originals).items():
            self.sinks.histogram(name, values, state.progress.images_seen)
        self.log({"event": "pictures", "images_seen": state.progress.images_seen, "phase": state.phase.name})

    @torch.no_grad()
    def _sheets(self, state: TrainState, originals: Tensor) -> dict[str, Image]:
        encoder, decoder = state.ema["encoder"], state.ema["decoder"]
        reference = next(decoder.parameters())
        shape = (self.config.reporting.samples, *latent_shape(self.config.model, state.image))
        z_prior = standard_normal(shape, self.config.run.seed, "samples")
        x_gen = decoder(z_prior.to(reference))
        x = to_float(originals.to(reference.device), reference.dtype)
        x_rec = decoder(encoder(x).mu)
        return {
            "samples": grid(to_uint8(x_gen)),
            "reconstructions": comparison(originals, to_uint8(x_rec)),
        }

    def draw_curves(self) -> None:
        """The history as a picture."""
        if self.active and self.config.reporting.curves:
            plot_curves(self.folder / "history.jsonl", self.folder / "curves.png")

    def close(self) -> None:
        """Flush everything."""
        if self.sinks is not None:
            self.sinks.close()
            while self.troubles:
                self.runtime.publish({"event": "warning", "message": self.troubles.popleft()})


@torch.no_grad()
def distributions(state: TrainState, originals: Tensor) -> dict[str, npt.NDArray[np.float32]]:
    """What is looked at as a histogram: posteriors of the compared pictures, and the weights of each network."""
    encoder = state.ema["encoder"]
    reference = next(encoder.parameters())
    posterior = encoder(to_float(originals.to(reference.device), reference.dtype))
    found = {"latent/mu": posterior.mu, "latent/logvar": posterior.logvar}
    for name, network in state.networks.items():
        weights = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
        found[f"weights/{name}"] = weights[:: max(weights.numel() // WEIGHTS_SHOWN, 1)]
    return {name: values.flatten().float().cpu().numpy() for name, values in found.items()}
