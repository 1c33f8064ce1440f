"""Distributed training of VAE-GANs over WebDataset shards.

>>> model = vaegan_dist.load("runs/seed-mlp")
>>> x = model.sample(64, seed=0)
>>> z = model.encode(x)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vaegan_dist.use import Model as Model
    from vaegan_dist.use import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load` and `Model`, fetched when first asked for: training imports this package without them."""
    if name in ("load", "Model"):
        from vaegan_dist import use

        return getattr(use, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
