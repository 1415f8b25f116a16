"""The version of dist_ft."""

__version__ = "0.1.0"
