"""Recipes from the configurations of other trainers, with a list of what they leave open."""
