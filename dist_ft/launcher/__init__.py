"""Starts the ranks of a node, watches them from outside and starts them again."""
