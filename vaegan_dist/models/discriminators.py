"""Discriminators that stand beside those of the network's own kind: PatchGAN and residual."""

import itertools
import math

from torch import Tensor, nn
from torch.nn import functional as F

from vaegan_dist.config import ConvModel, KlModel
from vaegan_dist.errors import ConfigError
from vaegan_dist.models.conv import Down, Stage, StagedDiscriminator
from vaegan_dist.models.group_norm import SLOPE, activated, convolved
from vaegan_dist.models.layers import MinibatchStd, SelfAttention, conv2d, linear, norm_layer
from vaegan_dist.models.networks import ImageShape

KERNEL, PADDING, WIDEST = 4, 1, 8


class PatchDiscriminator(StagedDiscriminator):
    """A logit for every patch of a picture (Isola et al. 2017, arXiv 1611.07004).

    Convolutions 4x4 of stride 2, one of stride 1, and one to a logit; the first has no norm. Its layers are they.
    """

    patches = True

    def __init__(self, model: KlModel, image: ImageShape) -> None:
        super().__init__(image)
        count, norm = model.discriminator_layers, model.discriminator_norm
        if model.minibatch_std:
            raise ConfigError(
                f"model.minibatch_std={model.minibatch_std}: a discriminator of patches has no place for it; "
                f"set it to 0, or model.discriminator=residual"
            )
        if min(image.height, image.width) >> count < 3:
            raise ConfigError(f"model.discriminator_layers={count} leaves no patch of pictures of {image}; use fewer")
        layers = []
        before = image.channels
        for index, after in enumerate(kl_widths(model, count + 1)):
            own = norm if index or norm == "spectral" else "none"
            stride = 2 if index < count else 1
            layers.append(Down(before, after, KERNEL, own, stride=stride, padding=PADDING))
            before = after
        self.layers = nn.ModuleList(layers)
        self.head = conv2d(norm, before, 1, KERNEL, padding=PADDING)
        self.depth = len(layers)
        self.independent = norm != "batch"

    def judge(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        return logits


def kl_widths(model: KlModel, stages: int) -> list[int]:
    """Channels of the discriminator's stages: doubled by each, up to eight times as many."""
    return [model.discriminator_channels * min(2**index, WIDEST) for index in range(stages)]


class FromPicture(Stage):
    """1x1 convolution from the picture's channels - activation."""

    def __init__(self, before: int, after: int, norm: str) -> None:
        super().__init__()
        self.conv = conv2d(norm, before, after, 1)

    def raw(self, x: Tensor) -> Tensor:
        raw: Tensor = self.conv(x)
        return raw

    def finish(self, raw: Tensor) -> Tensor:
        return activated(raw, "leaky_relu")


class ResidualStage(Stage):
    """(two 3x3 convolutions + a 1x1 one beside them) / sqrt 2, at half the resolution (Karras et al. 2020, figure 7).

    The sum has no activation of its own, so `raw` is the output (but for attention).
    """

    def __init__(self, before: int, after: int, norm: str, *, attention: bool) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv2d(norm, before, before, 3, padding=1), norm_layer(norm, before)
        self.conv2, self.norm2 = conv2d(norm, before, after, 3, padding=1), norm_layer(norm, after)
        self.shortcut = conv2d(norm, before, after, 1, bias=False)
        self.attention = SelfAttention(after, norm) if attention else nn.Identity()

    def raw(self, x: Tensor) -> Tensor:
        hidden = convolved(self.conv1, self.norm1, x, "leaky_relu")
        hidden = F.avg_pool2d(convolved(self.conv2, self.norm2, hidden, "leaky_relu"), 2)
        beside: Tensor = self.shortcut(F.avg_pool2d(x, 2))
        return (hidden + beside) * math.sqrt(0.5)

    def finish(self, raw: Tensor) -> Tensor:
        attended: Tensor = self.attention(raw)
        return attended


class ResidualDiscriminator(StagedDiscriminator):
    """The residual discriminator of StyleGAN2 (Karras et al. 2020, arXiv 1912.04958, figure 7 and appendix B).

    1x1 convolution from the picture, residual stages, minibatch standard deviation, 3x3 convolution, a fully connected
    layer, 1. Two things of theirs are simpler here: the resolution is halved by averaging 2x2 pixels instead of their
    [1, 3, 3, 1] filter, and weights are drawn with their scale instead of being multiplied by it at run time.
    """

    def __init__(
        self,
        image: ImageShape,
        *,
        stem: int,
        channels: tuple[int, ...],
        hidden: int,
        norm: str,
        minibatch_std: int,
        attention: tuple[int, ...] = (),
    ) -> None:
        super().__init__(image)
        stages = len(channels)
        if image.height % 2**stages or image.width % 2**stages:
            raise ConfigError(
                f"model.discriminator=residual with {stages} stages cannot halve pictures of {image} that often; use "
                f"fewer, or prepare the data at a size divisible by {2**stages}"
            )
        self.layers = nn.ModuleList([FromPicture(image.channels, stem, norm if norm == "spectral" else "none")])
        for level, (a, b) in enumerate(itertools.pairwise((stem, *channels)), start=1):
            self.layers.append(ResidualStage(a, b, norm, attention=image.height >> level in attention))
        last, size = channels[-1], (image.height >> stages) * (image.width >> stages)
        self.deviation = MinibatchStd(minibatch_std) if minibatch_std else nn.Identity()
        self.end = Down(last + bool(minibatch_std), last, 3, norm, stride=1)
        self.hidden = nn.Sequential(nn.Flatten(), linear(norm, last * size, hidden), nn.LeakyReLU(SLOPE))
        self.head = linear(norm, hidden, 1)
        self.depth = len(self.layers)
        self.independent = not minibatch_std and norm != "batch"

    def judge(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(self.end(self.deviation(hidden))))
        return logits


def residual_for_conv(model: ConvModel, image: ImageShape) -> ResidualDiscriminator:
    """The residual discriminator with the keys of network `conv`."""
    return ResidualDiscriminator(
        image,
        stem=model.discriminator_stem or model.discriminator_channels[0],
        channels=model.discriminator_channels,
        hidden=model.discriminator_hidden,
        norm=model.discriminator_norm,
        minibatch_std=model.minibatch_std,
        attention=model.attention,
    )


def residual_for_kl(model: KlModel, image: ImageShape) -> ResidualDiscriminator:
    """The residual discriminator with the keys of network `kl`: as wide as that of patches."""
    widths = kl_widths(model, model.discriminator_layers + 1)
    return ResidualDiscriminator(
        image,
        stem=widths[0],
        channels=tuple(widths[1:]),
        hidden=widths[-1],
        norm=model.discriminator_norm,
        minibatch_std=model.minibatch_std,
    )
