"""Lightning's `BaseFinetuning` and the finetuning-scheduler, as their documentation uses them.

Both are optional (`pip install 'dist-ft[bench]'`) and are imported by name, so that this file can
be read, checked and imported without them.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from benchmarks.freezing import tiny
from benchmarks.freezing.outcome import Case, Recorder, copy_of
from benchmarks.freezing.tiny import Schedule, TinyTransformer

STRATEGIES = ("ddp", "ddp_find_unused_parameters_true")
MODULES = {"lightning": "lightning", "finetuning-scheduler": "finetuning_scheduler"}


def installed(package: str) -> bool:
    """Return whether a peer can be imported."""
    return importlib.util.find_spec(MODULES[package]) is not None


def load_lightning() -> None:
    """Import Lightning."""
    warnings.filterwarnings("ignore")
    importlib.import_module("lightning.pytorch")


def load_scheduler() -> None:
    """Import Lightning and the finetuning-scheduler."""
    load_lightning()
    importlib.import_module("finetuning_scheduler")


def make_module(*, requires_grad_only: bool) -> Any:
    """Return the LightningModule around the tiny model.

    Args:
        requires_grad_only: Give the optimizer only what trains, as `BaseFinetuning` asks.
    """
    lightning: Any = importlib.import_module("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = TinyTransformer(tasks=("a",))

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            del index
            loss, _ = self.model("a", {"input_ids": batch[0]}, {"labels": batch[1]})
            return loss / len(batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            wanted = [p for p in self.parameters() if p.requires_grad or not requires_grad_only]
            return tiny.adamw(wanted)

    return Module()


def modules_of(model: TinyTransformer, groups: frozenset[str]) -> Iterator[torch.nn.Module]:
    """Yield the modules of the named layer groups."""
    for name in sorted(groups):
        kind, _, which = name.partition(".")
        path = {"block": f"blocks.{which}", "head": f"heads.{which}"}.get(kind, kind)
        yield model.get_submodule(path)


def make_base_finetuning(schedule: Schedule) -> Any:
    """Return a `BaseFinetuning` callback that follows the schedule, one epoch per phase."""
    callbacks: Any = importlib.import_module("lightning.pytorch.callbacks")

    class Follow(callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            frozen = frozenset(tiny.groups(("a",))) - set(schedule[0].trainable)
            self.freeze(list(modules_of(pl_module.model, frozen)))

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 0:
                return
            before, now = (frozenset(schedule[i].trainable) for i in (epoch - 1, epoch))
            self.freeze(list(modules_of(pl_module.model, before - now)))
            thawed = list(modules_of(pl_module.model, now - before))
            if thawed:
                self.unfreeze_and_add_param_group(thawed, optimizer, lr=tiny.LR)

    return Follow()


def make_scheduler(schedule: Schedule) -> Any:
    """Return a `FinetuningScheduler` with the explicit schedule, by epochs, nothing restored."""
    package: Any = importlib.import_module("finetuning_scheduler")
    names = [f"model.{name}" for name, _ in TinyTransformer(tasks=("a",)).named_parameters()]
    phases: dict[int, dict[str, Any]] = {}
    trained: set[str] = set()
    for index, span in enumerate(schedule):
        # A phase lists what it adds; there is no way to list what it freezes again.
        added = set(span.trainable) - trained
        trained |= added
        phases[index] = {
            "params": [n for n in names if tiny.group_of(n.removeprefix("model.")) in added],
            "max_transition_epoch": index + 1,
            "lr": tiny.LR,
        }
    return package.FinetuningScheduler(
        ft_schedule=phases, epoch_transitions_only=True, restore_best=False, base_max_lr=tiny.LR
    )


def make_recording(recorder: Recorder) -> Any:
    """Return a callback that keeps the weights before training and after each epoch."""
    callbacks: Any = importlib.import_module("lightning.pytorch.callbacks")

    class Keep(callbacks.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            del trainer
            recorder.snapshots.append(copy_of(dict(pl_module.model.named_parameters())))

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.on_train_start(trainer, pl_module)

    return Keep()


def make_trainer(folder: str, *, strategy: Any, callbacks: list[Any], **settings: Any) -> Any:
    """Return a Trainer on this machine's CPUs that prints and logs nothing."""
    lightning: Any = importlib.import_module("lightning.pytorch")
    return lightning.Trainer(
        accelerator="cpu",
        strategy=strategy,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **settings,
    )


def run(
    recorder: Recorder,
    *,
    make_callback: Callable[[Schedule], Any],
    schedule: Schedule,
    strategy: str,
    requires_grad_only: bool,
) -> None:
    """Fit with a finetuning callback."""
    module = make_module(requires_grad_only=requires_grad_only)
    rows = TensorDataset(*tiny.data())
    # Lightning's own sampler would shuffle the rows, whatever the loader says.
    sampler = DistributedSampler(rows, shuffle=False)
    loader = DataLoader(rows, batch_size=tiny.ROWS_PER_RANK, sampler=sampler)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            folder,
            strategy=strategy,
            callbacks=[make_callback(schedule), make_recording(recorder)],
            devices=tiny.WORLD_SIZE,
            max_epochs=len(schedule),
            use_distributed_sampler=False,
        )
        trainer.fit(module, loader)


def run_under_deepspeed(recorder: Recorder, *, make_callback: Callable[[Schedule], Any]) -> None:
    """Record what the callback says to DeepSpeed's strategy.

    The callback is asked directly: on a CPU, Lightning's strategy itself wants CUDA before it
    comes to the callbacks.
    """
    strategies: Any = importlib.import_module("lightning.pytorch.strategies")
    exceptions: Any = importlib.import_module("lightning.pytorch.utilities.exceptions")
    callback = make_callback(tiny.THAW)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            folder, strategy=strategies.DeepSpeedStrategy(stage=2), callbacks=[callback], devices=1
        )
        try:
            callback.setup(trainer, make_module(requires_grad_only=True), "fit")
        except (NotImplementedError, exceptions.MisconfigurationException) as error:
            recorder.note = f"{type(error).__name__}: {error}"
        else:
            recorder.note = "accepted DeepSpeed"


def lightning_cases() -> list[Case]:
    """Return `BaseFinetuning` under DDP and DeepSpeed."""
    return _cases(
        "Lightning BaseFinetuning",
        make_callback=make_base_finetuning,
        schedule=tiny.THAW_AND_FREEZE,
        requires_grad_only=True,
    )


def scheduler_cases() -> list[Case]:
    """Return the finetuning-scheduler under DDP and DeepSpeed."""
    return _cases(
        "finetuning-scheduler",
        make_callback=make_scheduler,
        schedule=tiny.THAW,
        requires_grad_only=False,
        note="thaws only: its numbers are those after three phases",
    )


def _cases(
    system: str,
    *,
    make_callback: Callable[[Schedule], Any],
    schedule: Schedule,
    requires_grad_only: bool,
    note: str = "",
) -> list[Case]:
    call = partial(
        run, make_callback=make_callback, schedule=schedule, requires_grad_only=requires_grad_only
    )
    labels = {"system": system, "precision": "fp32"}
    return [
        *(Case(labels | {"setting": s}, partial(call, strategy=s), note=note) for s in STRATEGIES),
        Case(
            labels | {"setting": "DeepSpeed"},
            partial(run_under_deepspeed, make_callback=make_callback),
            world_size=1,
        ),
    ]
