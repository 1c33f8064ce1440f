"""The PatchGAN discriminator: a logit for every patch of a picture (Isola et al. 2017, arXiv 1611.07004)."""

from torch import Tensor, nn

from vaegan_dist.config import KlModel
from vaegan_dist.errors import ConfigError
from vaegan_dist.models.conv import Down, StagedDiscriminator
from vaegan_dist.models.networks import ImageShape

KERNEL, PADDING, WIDEST = 4, 1, 8


class PatchDiscriminator(StagedDiscriminator):
    """Convolutions 4x4 of stride 2, one of stride 1, and one to a logit; the first has no norm. Its layers are they."""

    patches = True
    independent = True

    def __init__(self, model: KlModel, image: ImageShape) -> None:
        super().__init__(image)
        count, base = model.discriminator_layers, model.discriminator_channels
        if min(image.height, image.width) >> count < 3:
            raise ConfigError(f"model.discriminator_layers={count} leaves no patch of pictures of {image}; use fewer")
        layers = []
        before = image.channels
        for index in range(count + 1):
            after = base * min(2**index, WIDEST)
            norm = model.discriminator_norm if index else "none"
            stride = 2 if index < count else 1
            layers.append(Down(before, after, KERNEL, norm, stride=stride, padding=PADDING))
            before = after
        self.layers = nn.ModuleList(layers)
        self.head = nn.Conv2d(before, 1, KERNEL, padding=PADDING)
        self.depth = len(layers)

    def judge(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        return logits
