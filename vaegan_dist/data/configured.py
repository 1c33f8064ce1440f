"""The data set of a configuration."""

from vaegan_dist.config import DataSection
from vaegan_dist.data.dataset import ShardDataset, open_dataset


def open_configured(
    data: DataSection,
    split: str = "train",
    *,
    path: str | None = None,
    read: bool = True,
    counted_elsewhere: bool = False,
) -> ShardDataset:
    """Open a data set as the configuration says: where it is, its memory, its cache, its bad samples.

    Args:
        path: another data set than `data.path`, read in the same way.
        read: False to look at its manifest and shards only, without decoding it into memory.
        counted_elsewhere: as in `open_dataset`.

    Raises:
        InputError, DataError: as `open_dataset`.
    """
    return open_dataset(
        path or data.path,
        split,
        in_memory=data.in_memory if read else False,
        max_bad_samples=data.max_bad_samples,
        counted_elsewhere=counted_elsewhere,
        cache_dir=data.cache_dir,
        cache_bytes=data.cache_bytes,
    )
