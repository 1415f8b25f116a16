"""Settings that must be in the environment before torch and deepspeed are imported."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# DeepSpeed guesses the accelerator at import; a forked rank must not guess again.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# What a suite in the background, or one under nohup, was started with ignored would stay ignored in
# what it starts and signals.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# deepspeed.initialize imports torch's inductor from ZeRO-1 on, which takes seconds. Imported here,
# every forked rank has it already.
import torch._inductor.compile_fx  # noqa: F401 # pyright: ignore[reportUnusedImport]
