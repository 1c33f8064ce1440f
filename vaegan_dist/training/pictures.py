"""The pictures of a data set as networks see them."""

from vaegan_dist.data.dataset import ShardDataset
from vaegan_dist.data.manifest import Manifest
from vaegan_dist.errors import InputError
from vaegan_dist.models import ImageShape


def image_of(manifest: Manifest) -> ImageShape:
    """Size of a data set's pictures."""
    return ImageShape(channels=manifest.channels, height=manifest.height, width=manifest.width)


def require_size(dataset: ShardDataset, image: ImageShape, path: str) -> None:
    """Refuse pictures that the model does not take."""
    found = image_of(dataset.manifest)
    if found != image:
        raise InputError(
            f"data set '{path}' has pictures of {found.width}x{found.height}x{found.channels}, the model "
            f"takes {image.width}x{image.height}x{image.channels}; prepare it with --resolution {image.height} "
            f"--channels {image.channels}"
        )
