"""Distributed fine-tuning strategies for pre-trained transformers."""

__version__ = "0.1.0"
