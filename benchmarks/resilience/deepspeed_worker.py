"""Plain DeepSpeed with its own checkpoints, run by torchrun; see `torchrun.py`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

SAVE_EVERY = 20


def work(folder: Path) -> None:
    """Train without end."""
    import deepspeed
    import torch

    deepspeed.init_distributed("gloo")
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.Linear(1024, 256))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()),
        config={"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 1},
                "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False},
    )  # fmt: skip
    if (folder / "latest").exists():
        engine.load_checkpoint(str(folder))
    while True:
        loss = engine(torch.randn(8, 256)).square().mean()
        engine.backward(loss)
        engine.step()
        time.sleep(0.02)
        if engine.global_rank == 0:
            with (folder / "steps.txt").open("a") as file:
                file.write(f"{engine.global_steps}\n")
        if engine.global_steps % SAVE_EVERY == 0:
            engine.save_checkpoint(str(folder))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
