"""Fully connected networks: the tutorial's 784-128-20 system, for pictures of any size."""

import itertools
import math

from torch import Tensor, nn

from vaegan_dist.config import MlpModel
from vaegan_dist.models.layers import MinibatchStd, linear
from vaegan_dist.models.networks import Decoder, Discriminator, Encoder, ImageShape

SLOPE = 0.2


def _hidden(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers)


class MlpEncoder(Encoder):
    """pixels - hidden... - 2 x latent."""

    def __init__(self, model: MlpModel, image: ImageShape) -> None:
        super().__init__((model.latent_dim,))
        pixels = image.channels * image.height * image.width
        self.hidden = _hidden([pixels, *model.hidden])
        self.head = nn.Linear(model.hidden[-1], 2 * model.latent_dim)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.head(self.hidden(x.flatten(1))).chunk(2, dim=1)
        return mu, logvar


class MlpDecoder(Decoder):
    """latent - hidden (mirrored)... - pixels."""

    def __init__(self, model: MlpModel, image: ImageShape) -> None:
        super().__init__((model.latent_dim,), image)
        widths = [model.latent_dim, *reversed(model.hidden)]
        self.hidden = _hidden(widths)
        self.head = nn.Linear(widths[-1], image.channels * image.height * image.width)

    @property
    def last_layer(self) -> Tensor:
        return self.head.weight

    def pre_image(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.head(self.hidden(z))
        return pixels.view(-1, self.image.channels, self.image.height, self.image.width)


class MlpDiscriminator(Discriminator):
    """pixels - hidden... - (minibatch deviation) - 1; its layers are the hidden ones."""

    def __init__(self, model: MlpModel, image: ImageShape) -> None:
        super().__init__(image)
        widths = [math.prod((image.channels, image.height, image.width)), *model.discriminator_hidden]
        norm = model.discriminator_norm
        self.layers = nn.ModuleList(linear(norm, a, b) for a, b in itertools.pairwise(widths))
        self.activation = nn.LeakyReLU(SLOPE)
        self.deviation = MinibatchStd(model.minibatch_std) if model.minibatch_std else nn.Identity()
        self.head = linear(norm, widths[-1] + bool(model.minibatch_std), 1)
        self.depth = len(self.layers)
        self.independent = not model.minibatch_std

    def features(self, x: Tensor, layer: int) -> Tensor:
        hidden = x.flatten(1)
        for previous in self.layers[:layer]:
            hidden = self.activation(previous(hidden))
        features: Tensor = self.layers[layer](hidden)
        return features

    def logits_and_features(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        features = self.features(x, layer)
        hidden = self.activation(features)
        for following in self.layers[layer + 1 :]:
            hidden = self.activation(following(hidden))
        logits: Tensor = self.head(self.deviation(hidden))
        return logits.squeeze(1), features
