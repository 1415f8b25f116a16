"""Executes optimizer steps and phase changes: plain torch, and DeepSpeed ZeRO 0-3."""
