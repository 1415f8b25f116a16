"""Augmentation of raw samples at read time: deterministic in (seed, epoch, row), and aligned."""
