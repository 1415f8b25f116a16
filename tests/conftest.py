"""Settings that must be in the environment before torch and deepspeed are imported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# DeepSpeed guesses the accelerator at import; a forked rank must not guess again.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# deepspeed.initialize imports torch's inductor from ZeRO-1 on, which takes seconds. Imported here,
# every forked rank has it already.
import torch._inductor.compile_fx  # noqa: F401 # pyright: ignore[reportUnusedImport]
