"""Whole fine-tuning runs beside those of other trainers."""
