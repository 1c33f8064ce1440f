"""A trained model in use: loaded, evaluated, encoding data sets, exported."""

from vaegan_dist.use.model import Model, load

__all__ = ["Model", "load"]
