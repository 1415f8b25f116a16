"""The systems that `freeze_correctness.py` compares, one file each."""
