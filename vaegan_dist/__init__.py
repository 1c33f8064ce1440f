"""Distributed training of VAE-GANs over WebDataset shards."""

__version__ = "0.1.0"
