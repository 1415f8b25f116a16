"""The training run: build, loop, checkpoint, evaluate, export."""
