"""Optimizer, parameter groups, learning rates, regularisation."""
