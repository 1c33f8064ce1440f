"""The PatchGAN discriminator: a logit for every patch of a picture (Isola et al. 2017, arXiv 1611.07004)."""

from torch import Tensor, nn

from vaegan_dist.config import KlModel
from vaegan_dist.errors import ConfigError
from vaegan_dist.models.conv import Down
from vaegan_dist.models.networks import Discriminator, ImageShape

KERNEL, PADDING, WIDEST = 4, 1, 8


class PatchDiscriminator(Discriminator):
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
        return self.head(hidden).squeeze(1), features
