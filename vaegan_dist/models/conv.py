"""Convolutional networks after Larsen et al. 2016 (arXiv 1512.09300, table 1), with norms that treat images apart."""

import itertools

from torch import Tensor, nn

from vaegan_dist.config import ConvModel
from vaegan_dist.errors import ConfigError
from vaegan_dist.models.layers import MinibatchStd, norm_layer
from vaegan_dist.models.networks import Decoder, Discriminator, Encoder, ImageShape

SLOPE = 0.2


def _low_resolution(key: str, stages: int, image: ImageShape) -> tuple[int, int]:
    """Size after `stages` halvings, or an error that says which number of stages fits."""
    fits = 0
    while not any(size % 2 ** (fits + 1) for size in (image.height, image.width)):
        fits += 1
    if stages > fits:
        remedy = f"use at most {fits} entries in {key}" if fits else "use pictures of even size, or model.network=mlp"
        raise ConfigError(
            f"model.network=conv with {stages} stages in {key} cannot halve pictures of {image} that often; {remedy}, "
            f"or prepare the data at a size divisible by {2**stages}"
        )
    return image.height >> stages, image.width >> stages


class Down(nn.Module):
    """Convolution (stride 2 by default) - norm - activation, with the convolution's own output on request."""

    def __init__(self, before: int, after: int, kernel: int, norm: str, stride: int = 2, padding: int = -1) -> None:
        super().__init__()
        padding = kernel // 2 if padding < 0 else padding
        self.conv = nn.Conv2d(before, after, kernel, stride=stride, padding=padding)
        self.norm = norm_layer(norm, after)
        self.activation = nn.LeakyReLU(SLOPE)

    def finish(self, features: Tensor) -> Tensor:
        """Norm and activation of the convolution's output."""
        activated: Tensor = self.activation(self.norm(features))
        return activated

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.conv(x))


class Up(nn.Module):
    """Transposed convolution that doubles the resolution - norm - activation."""

    def __init__(self, before: int, after: int, kernel: int, norm: str) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(before, after, kernel, stride=2, padding=kernel // 2, output_padding=1)
        self.norm = norm_layer(norm, after)
        self.activation = nn.LeakyReLU(SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.activation(self.norm(self.conv(x)))
        return activated


class ConvEncoder(Encoder):
    """Stages of stride 2, a fully connected layer, 2 x latent."""

    def __init__(self, model: ConvModel, image: ImageShape) -> None:
        super().__init__((model.latent_dim,))
        height, width = _low_resolution("model.channels", len(model.channels), image)
        channels = [image.channels, *model.channels]
        stages = [Down(a, b, model.kernel_size, model.norm) for a, b in itertools.pairwise(channels)]
        self.stages = nn.Sequential(*stages)
        self.hidden = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels[-1] * height * width, model.hidden),
            norm_layer(model.norm, model.hidden),
            nn.LeakyReLU(SLOPE),
        )
        self.head = nn.Linear(model.hidden, 2 * model.latent_dim)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.head(self.hidden(self.stages(x))).chunk(2, dim=1)
        return mu, logvar


class ConvDecoder(Decoder):
    """A fully connected layer to the low resolution, stages that double it, a convolution to the picture."""

    def __init__(self, model: ConvModel, image: ImageShape) -> None:
        super().__init__((model.latent_dim,), image)
        stages = model.decoder_channels or (*reversed(model.channels[:-1]), max(model.channels[0] // 2, 1))
        key = "model.decoder_channels" if model.decoder_channels else "model.channels"
        height, width = _low_resolution(key, len(stages), image)
        base = model.channels[-1]
        channels = [base, *stages]
        self.base = (base, height, width)
        self.stem = nn.Linear(model.latent_dim, base * height * width)
        self.stem_norm = nn.Sequential(norm_layer(model.norm, base), nn.LeakyReLU(SLOPE))
        ups = [Up(a, b, model.kernel_size, model.norm) for a, b in itertools.pairwise(channels)]
        self.stages = nn.Sequential(*ups)
        self.head = nn.Conv2d(channels[-1], image.channels, model.kernel_size, padding=model.kernel_size // 2)

    @property
    def last_layer(self) -> Tensor:
        return self.head.weight

    def pre_image(self, z: Tensor) -> Tensor:
        low = self.stem_norm(self.stem(z).view(-1, *self.base))
        pre_image: Tensor = self.head(self.stages(low))
        return pre_image


class StagedDiscriminator(Discriminator):
    """A discriminator that walks down stages of convolutions and then judges."""

    layers: nn.ModuleList

    def judge(self, hidden: Tensor) -> Tensor:
        """Output of the last stage -> logits with one channel, `[B, 1, ...]`."""
        raise NotImplementedError

    def features(self, x: Tensor, layer: int) -> Tensor:
        for stage in self.layers[:layer]:
            x = stage(x)
        last = self.layers[layer]
        assert isinstance(last, Down)
        features: Tensor = last.conv(x)
        return features

    def logits_and_features(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        features = self.features(x, layer)
        last = self.layers[layer]
        assert isinstance(last, Down)
        hidden = last.finish(features)
        for stage in self.layers[layer + 1 :]:
            hidden = stage(hidden)
        return self.judge(hidden).squeeze(1), features


class ConvDiscriminator(StagedDiscriminator):
    """(Stem at full resolution,) stages of stride 2, a fully connected layer, 1; its layers are the convolutions."""

    def __init__(self, model: ConvModel, image: ImageShape) -> None:
        super().__init__(image)
        height, width = _low_resolution("model.discriminator_channels", len(model.discriminator_channels), image)
        kernel, norm = model.kernel_size, model.discriminator_norm
        layers = []
        before = image.channels
        if model.discriminator_stem:
            layers.append(Down(before, model.discriminator_stem, kernel, "none", stride=1))
            before = model.discriminator_stem
        for after in model.discriminator_channels:
            layers.append(Down(before, after, kernel, norm))
            before = after
        self.layers = nn.ModuleList(layers)
        self.deviation = MinibatchStd(model.minibatch_std) if model.minibatch_std else nn.Identity()
        self.hidden = nn.Sequential(
            nn.Flatten(),
            nn.Linear((before + bool(model.minibatch_std)) * height * width, model.discriminator_hidden),
            norm_layer(norm, model.discriminator_hidden),
            nn.LeakyReLU(SLOPE),
        )
        self.head = nn.Linear(model.discriminator_hidden, 1)
        self.depth = len(self.layers)
        self.independent = not model.minibatch_std

    def judge(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(self.deviation(hidden)))
        return logits
