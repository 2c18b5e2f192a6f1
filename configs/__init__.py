"""Hydra configs: one file per command, and the groups ``task`` and ``sampler``."""
