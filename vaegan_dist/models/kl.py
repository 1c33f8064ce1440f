"""The latent-diffusion autoencoder: pictures to a small picture of latents and back (Rombach et al. 2022, 2112.10752).

Modules carry the names of diffusers' AutoencoderKL, so that weights go over without loss (`diffusers_layout.py`).
"""

import itertools

from torch import Tensor, nn
from torch.nn import functional as F

from vaegan_dist.config import KlModel
from vaegan_dist.errors import ConfigError
from vaegan_dist.models.group_norm import GroupNorm, convolved
from vaegan_dist.models.networks import Decoder, Encoder, ImageShape
from vaegan_dist.models.precision import without_autocast

NORM_EPS = 1e-6


def latent_size(model: KlModel, image: ImageShape) -> tuple[int, int, int]:
    """Channels, height and width of z, or an error that names the key."""
    halvings = len(model.channels) - 1
    if image.height % 2**halvings or image.width % 2**halvings:
        raise ConfigError(
            f"model.network=kl with {len(model.channels)} entries in model.channels halves pictures {halvings} times, "
            f"which {image} does not allow; use fewer entries, or prepare the data at a size divisible by {2**halvings}"
        )
    for channels in model.channels:
        if channels % model.norm_groups:
            raise ConfigError(
                f"model.norm_groups={model.norm_groups} does not divide the {channels} in model.channels; "
                f"choose a divisor of every entry"
            )
    return model.latent_channels, image.height >> halvings, image.width >> halvings


def _norm(model: KlModel, channels: int) -> GroupNorm:
    return GroupNorm(model.norm_groups, channels, eps=NORM_EPS)


class ResnetBlock(nn.Module):
    """x + (norm - SiLU - 3x3) twice; a 1x1 convolution where the channels change."""

    def __init__(self, model: KlModel, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = _norm(model, before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = _norm(model, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, after, 1) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = convolved(self.conv1, self.norm2, self.norm1(x, "silu"), "silu")
        changed: Tensor = self.conv2(hidden)
        same: Tensor = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return same + changed


class Attention(nn.Module):
    """x + self-attention of one head over the positions of a picture (Vaswani et al. 2017, equation 1)."""

    def __init__(self, model: KlModel, channels: int) -> None:
        super().__init__()
        self.group_norm = _norm(model, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        positions = self.group_norm(x).flatten(2).transpose(1, 2)
        query, key, value = (to(positions).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))
        attended: Tensor = self.to_out[0](F.scaled_dot_product_attention(query, key, value).squeeze(1))
        return x + attended.transpose(1, 2).reshape(batch, channels, height, width)


class Downsampler(nn.Module):
    """Halves the resolution: one row and column of zeros at the end, 3x3 with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return halved


class Upsampler(nn.Module):
    """Doubles the resolution: nearest neighbour, 3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):  # which would widen the picture, and gain nothing
            doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
        larger: Tensor = self.conv(doubled)
        return larger


class Block(nn.Module):
    """Residual blocks at one resolution, then the change to the next."""

    def __init__(
        self, model: KlModel, before: int, after: int, layers: int, *, down: bool = False, up: bool = False
    ) -> None:
        super().__init__()
        widths = [before, *[after] * layers]
        self.resnets = nn.ModuleList(ResnetBlock(model, a, b) for a, b in itertools.pairwise(widths))
        self.downsamplers = nn.ModuleList([Downsampler(after)] if down else [])
        self.upsamplers = nn.ModuleList([Upsampler(after)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in itertools.chain(self.resnets, self.downsamplers, self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """Residual block - attention - residual block, at the lowest resolution."""

    def __init__(self, model: KlModel, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(model, channels)])
        self.resnets = nn.ModuleList([ResnetBlock(model, channels, channels) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x)))
        return hidden


class KlEncoder(Encoder):
    """Blocks that halve the resolution, mid block, moments of z at every position."""

    def __init__(self, model: KlModel, image: ImageShape) -> None:
        super().__init__(latent_size(model, image))
        widths = [model.channels[0], *model.channels]
        last = len(model.channels) - 1
        self.conv_in = nn.Conv2d(image.channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Block(model, a, b, model.layers_per_block, down=index < last)
            for index, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.mid_block = MidBlock(model, widths[-1])
        self.conv_norm_out = _norm(model, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * model.latent_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(2 * model.latent_channels, 2 * model.latent_channels, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.conv_in(x)
        for block in self.down_blocks:
            hidden = block(hidden)
        hidden = self.conv_out(self.conv_norm_out(self.mid_block(hidden), "silu"))
        mu, logvar = self.quant_conv(hidden).chunk(2, dim=1)
        return mu, logvar


class KlDecoder(Decoder):
    """Mid block, blocks that double the resolution, a convolution whose output is the picture itself."""

    bounded = False

    def __init__(self, model: KlModel, image: ImageShape) -> None:
        super().__init__(latent_size(model, image), image)
        widths = [model.channels[-1], *reversed(model.channels)]
        last = len(model.channels) - 1
        self.post_quant_conv = nn.Conv2d(model.latent_channels, model.latent_channels, 1)
        self.conv_in = nn.Conv2d(model.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(model, widths[0])
        self.up_blocks = nn.ModuleList(
            Block(model, a, b, model.layers_per_block + 1, up=index < last)
            for index, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.conv_norm_out = _norm(model, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], image.channels, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        return self.conv_out.weight

    def pre_image(self, z: Tensor) -> Tensor:
        hidden = self.mid_block(self.conv_in(self.post_quant_conv(z)))
        for block in self.up_blocks:
            hidden = block(hidden)
        picture: Tensor = self.conv_out(self.conv_norm_out(hidden, "silu"))
        return picture
