"""Convolutional networks after Larsen et al. 2016 (arXiv 1512.09300, table 1), by default with group norms."""

import itertools

from torch import Tensor, nn

from vaegan_dist.config import ConvModel
from vaegan_dist.errors import ConfigError
from vaegan_dist.models.group_norm import SLOPE, convolved, normalised
from vaegan_dist.models.layers import MinibatchStd, SelfAttention, conv2d, conv_transpose2d, linear, norm_layer
from vaegan_dist.models.networks import Decoder, Discriminator, Encoder, ImageShape


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


def check_attention(model: ConvModel, image: ImageShape) -> None:
    """Every height in `attention` must be one that a stage of some network has."""
    stages = max(len(model.channels), len(model.decoder_channels or ()), len(model.discriminator_channels))
    heights = [image.height >> stage for stage in range(stages + 1)]
    for height in model.attention:
        if height not in heights:
            raise ConfigError(
                f"model.attention={height}: no stage of pictures of {image} has that height; "
                f"choose from {', '.join(map(str, heights))}"
            )


class Stage(nn.Module):
    """A part of a discriminator whose output before its norm and activation can be asked for."""

    def raw(self, x: Tensor) -> Tensor:
        """Output before norm and activation."""
        raise NotImplementedError

    def finish(self, raw: Tensor) -> Tensor:
        """Norm and activation of `raw`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.raw(x))


class Down(Stage):
    """Convolution (stride 2 by default) - norm - activation (- self-attention)."""

    def __init__(
        self,
        before: int,
        after: int,
        kernel: int,
        norm: str,
        stride: int = 2,
        padding: int = -1,
        *,
        attention: bool = False,
    ) -> None:
        super().__init__()
        padding = kernel // 2 if padding < 0 else padding
        self.conv = conv2d(norm, before, after, kernel, stride=stride, padding=padding)
        self.norm = norm_layer(norm, after)
        self.attention = SelfAttention(after, norm) if attention else nn.Identity()

    def raw(self, x: Tensor) -> Tensor:
        raw: Tensor = self.conv(x)
        return raw

    def finish(self, raw: Tensor) -> Tensor:
        finished: Tensor = self.attention(normalised(self.norm, raw, "leaky_relu"))
        return finished

    def forward(self, x: Tensor) -> Tensor:
        finished: Tensor = self.attention(convolved(self.conv, self.norm, x, "leaky_relu"))
        return finished


class Up(nn.Module):
    """Transposed convolution that doubles the resolution - norm - activation (- self-attention)."""

    def __init__(self, before: int, after: int, kernel: int, norm: str, *, attention: bool = False) -> None:
        super().__init__()
        self.conv = conv_transpose2d(norm, before, after, kernel, stride=2, padding=kernel // 2, output_padding=1)
        self.norm = norm_layer(norm, after)
        self.attention = SelfAttention(after, norm) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        finished: Tensor = self.attention(convolved(self.conv, self.norm, x, "leaky_relu"))
        return finished


class ConvEncoder(Encoder):
    """Stages of stride 2, a fully connected layer, 2 x latent."""

    def __init__(self, model: ConvModel, image: ImageShape) -> None:
        super().__init__((model.latent_dim,))
        height, width = _low_resolution("model.channels", len(model.channels), image)
        channels = [image.channels, *model.channels]
        self.stages = nn.Sequential(
            *(
                Down(a, b, model.kernel_size, model.norm, attention=image.height >> level in model.attention)
                for level, (a, b) in enumerate(itertools.pairwise(channels), start=1)
            )
        )
        self.hidden = nn.Sequential(
            nn.Flatten(),
            linear(model.norm, channels[-1] * height * width, model.hidden),
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
        self.stem = linear(model.norm, model.latent_dim, base * height * width)
        self.stem_norm = nn.ModuleList([norm_layer(model.norm, base)])  # stem_norm.0 in checkpoints
        self.stages = nn.Sequential(
            *(
                Up(a, b, model.kernel_size, model.norm, attention=height << level in model.attention)
                for level, (a, b) in enumerate(itertools.pairwise(channels), start=1)
            )
        )
        self.head = nn.Conv2d(channels[-1], image.channels, model.kernel_size, padding=model.kernel_size // 2)

    @property
    def last_layer(self) -> Tensor:
        return self.head.weight

    def pre_image(self, z: Tensor) -> Tensor:
        low = normalised(self.stem_norm[0], self.stem(z).view(-1, *self.base), "leaky_relu")
        pre_image: Tensor = self.head(self.stages(low))
        return pre_image


class StagedDiscriminator(Discriminator):
    """A discriminator that walks down stages and then judges; its layers are the stages."""

    layers: nn.ModuleList

    def judge(self, hidden: Tensor) -> Tensor:
        """Output of the last stage -> logits with one channel, `[B, 1, ...]`."""
        raise NotImplementedError

    def features(self, x: Tensor, layer: int) -> Tensor:
        for stage in self.layers[:layer]:
            x = stage(x)
        return self._stage(layer).raw(x)

    def logits_and_features(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        features = self.features(x, layer)
        hidden = self._stage(layer).finish(features)
        for stage in self.layers[layer + 1 :]:
            hidden = stage(hidden)
        return self.judge(hidden).squeeze(1), features

    def _stage(self, layer: int) -> Stage:
        stage = self.layers[layer]
        assert isinstance(stage, Stage)
        return stage


class ConvDiscriminator(StagedDiscriminator):
    """(Stem at full resolution,) stages of stride 2, a fully connected layer, 1; its layers are the convolutions."""

    def __init__(self, model: ConvModel, image: ImageShape) -> None:
        super().__init__(image)
        height, width = _low_resolution("model.discriminator_channels", len(model.discriminator_channels), image)
        kernel, norm = model.kernel_size, model.discriminator_norm
        layers = []
        before = image.channels
        if model.discriminator_stem:
            stem_norm = "spectral" if norm == "spectral" else "none"
            layers.append(Down(before, model.discriminator_stem, kernel, stem_norm, stride=1))
            before = model.discriminator_stem
        for level, after in enumerate(model.discriminator_channels, start=1):
            layers.append(Down(before, after, kernel, norm, attention=image.height >> level in model.attention))
            before = after
        self.layers = nn.ModuleList(layers)
        self.deviation = MinibatchStd(model.minibatch_std) if model.minibatch_std else nn.Identity()
        self.hidden = nn.Sequential(
            nn.Flatten(),
            linear(norm, (before + bool(model.minibatch_std)) * height * width, model.discriminator_hidden),
            norm_layer(norm, model.discriminator_hidden),
            nn.LeakyReLU(SLOPE),
        )
        self.head = linear(norm, model.discriminator_hidden, 1)
        self.depth = len(self.layers)
        self.independent = not model.minibatch_std and norm != "batch"

    def judge(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(self.deviation(hidden)))
        return logits
