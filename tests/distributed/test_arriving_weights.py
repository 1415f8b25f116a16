"""Weights that are still on their way: whoever reads them waits, and a forward pass no longer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dist_ft import dist
from dist_ft.engine import ds_gradients, ds_step, exchange
from dist_ft.engine.base import EngineOptions
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_arriving import ArrivingWeights
from dist_ft.engine.ds_config import DeepSpeedOptions, build_ds_config
from dist_ft.engine.ds_setup import set_up_deepspeed, start_engine
from dist_ft.model.backbone import HeadSpec, build_model
from dist_ft.model.layer_groups import find_layer_groups
from dist_ft.model.trunk import Trunk
from dist_ft.tasks.base import LossSum
from tests.helpers.phases import ALL, bitwise_equal, make_deepspeed, run
from tests.helpers.run_distributed import run_distributed
from tests.helpers.same_order import SameOrder
from tests.helpers.tiny import TinyBatch, TinyModel
from tests.helpers.tiny_models import tiny_config
from tests.helpers.trunk_engine import trunk_engine

TRAINS = {0: slice(None), 2: slice(2, None), 4: slice(None)}  # layer groups, from a step on


def _late(vectors: Sequence[Tensor], *, group: Any) -> Callable[[], None]:
    """Gather at once, but show NaN in the place of other ranks' weights until somebody waits."""
    exchange.gather(vectors, group=group)()
    arrived = [v.clone() for v in vectors]
    for vector in vectors:
        for rank, share in enumerate(vector.chunk(dist.world_size())):
            if rank != dist.rank():
                share.fill_(float("nan"))

    def finish() -> None:
        for vector, values in zip(vectors, arrived, strict=True):
            vector.copy_(values)

    return finish


def _loss(outputs: Any, targets: Any) -> LossSum:
    losses = torch.nn.functional.cross_entropy(outputs.logits, targets["labels"], reduction="sum")
    return LossSum(losses, torch.tensor(3))


def _batch() -> TinyBatch:
    rank = dist.rank()
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(rank))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return TinyBatch(inputs, {"labels": torch.tensor([0, 1, 2])}, rank)


def _engine(name: str, *, stage: int) -> tuple[DeepSpeedEngine, list[str]]:
    config = tiny_config(name)
    config.pad_token_id = 0
    heads = [HeadSpec("a", "AutoModelForSequenceClassification", {"num_labels": 3})]
    model = build_model(config, heads=heads, dtype=torch.float32, seed=0)
    groups = find_layer_groups(model)
    trunk = Trunk.find(model, groups=groups)
    engine = trunk_engine(model, groups=groups, trunk=trunk, loss=_loss, stage=stage, rate=1e-3)
    return engine, [g.name for g in groups if g.freezing_kind != "unused"]


def _whole(tensors: Any) -> bool:
    return not any(bool(t.isnan().any()) for t in tensors)


def _trained(name: str, *, stage: int) -> tuple[dict[str, Tensor], list[int]]:
    """Train, look at the weights in every way between steps; return what was under way when."""
    engine, names = _engine(name, stage=stage)
    under_way: list[int] = []
    arriving = engine._arriving
    block = next(iter(engine._modes.blocks.values()))
    for step in range(6):
        if step in TRAINS:
            engine.set_trainable(names[TRAINS[step]])
            block.register_forward_hook(lambda *_: under_way.append(len(arriving._pending)))
        rates = dict.fromkeys(names, 1e-3)
        done = engine.train_step(
            step, task="a", micro_batches=[_batch()], global_count=6, learning_rates=rates
        )
        assert done.refused is None
        if step == 1:
            loss, _ = engine.eval_forward("a", _batch())
            assert _whole([loss])
        if step == 3:
            assert _whole(t for s in engine.state().slices for t in s.values.values())
        if step == 5:
            assert _whole(engine.module.parameters())
    weights = engine.full_weights()
    engine.close()
    return weights, under_way


def _compare() -> None:
    for name, stage in itertools.product(("bert", "gpt2"), (1, 2)):
        expected, _ = _trained(name, stage=stage)
        with mock.patch.object(ds_step, "gather", _late), mock.patch.object(ds_step, "BUNDLE", 1):
            weights, under_way = _trained(name, stage=stage)
        if dist.rank() == 0:
            assert _whole(weights.values()), (name, stage)
            assert bitwise_equal(weights, expected), (name, stage)
        assert max(under_way) > 0, "no block began before all weights were there"


@pytest.mark.parametrize("world_size", [2, 3])
def test_nobody_reads_weights_that_have_not_arrived(world_size: int) -> None:
    run_distributed(_compare, world_size=world_size)


SCHEDULE = {0: ("block.3", "head.a", "head.b"), 2: ALL}


def _in_pieces() -> None:
    rank, world = dist.rank(), dist.world_size()
    for stage in (1, 2):
        expected = SameOrder(stage=stage, world_size=world).run(
            SCHEDULE, steps=range(5), micro_batches=2 * world
        )
        for bundle, under_way in ((1, 0), (300, 600), (1 << 20, 1 << 22)):
            with (
                mock.patch.object(ds_gradients, "BUNDLE", bundle),
                mock.patch.object(ds_gradients, "_UNDER_WAY", under_way),
            ):
                engine = make_deepspeed(
                    EngineOptions(max_grad_norm=0.0), zero_stage=stage, accumulation=2
                )
                run(engine, SCHEDULE, steps=range(5), micro_batches=2 * world, share=(rank, world))
                weights = engine.full_weights()
            if rank == 0:
                assert bitwise_equal(weights, expected), (stage, bundle)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_however_gradients_are_bundled_the_sums_are_those_of_one_process(world_size: int) -> None:
    run_distributed(_in_pieces, world_size=world_size)


class _Shuffled(TinyModel):
    """Runs blocks of one shape in another order on each rank."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        blocks = list(self.blocks)
        kept = self.blocks
        self.blocks = torch.nn.ModuleList(blocks[::-1] if dist.rank() else blocks)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.blocks = kept


class _ShuffledInSixteens(_Shuffled):
    """The same with as many weights in a block as BERT's have."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        width = self.embeddings.embedding_dim
        self.blocks = torch.nn.ModuleList(
            nn.Sequential(*(nn.Linear(width, width) for _ in range(8))) for _ in self.blocks
        )


def _other_orders() -> None:
    rank, world = dist.rank(), dist.world_size()
    for stage, model in ((1, _Shuffled), (2, _Shuffled), (2, _ShuffledInSixteens)):
        with mock.patch("tests.helpers.phases.TinyModel", model):
            engine = make_deepspeed(EngineOptions(), zero_stage=stage)
            engine.set_trainable(ALL)
            before = {n: w.clone() for n, w in engine.full_weights().items()}
            with pytest.raises(RuntimeError, match="different orders on the ranks"):
                run(engine, {}, steps=range(1), micro_batches=world, share=(rank, world))
            assert bitwise_equal(engine.full_weights(), before)


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_in_another_order_are_an_error_on_every_rank(world_size: int) -> None:
    run_distributed(_other_orders, world_size=world_size)


class _Shared(nn.Module):
    """Two parameters whose gradients autograd leaves as two views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Parameter(torch.zeros(2, 50_000)) for _ in range(2))

    def forward(self, scale: Tensor) -> Tensor:
        return ((self.one.view(-1) + self.other.view(-1)) * scale).sum()


def _shared_memory() -> None:
    set_up_deepspeed()
    for stage in (1, 2):
        model = _Shared()
        options = DeepSpeedOptions(stage, micro_batch_size=1, gradient_accumulation_steps=1)
        config = build_ds_config(EngineOptions(), deepspeed=options, trainable_elements=200_000)
        # A group each, so that every rank owns a part of both.
        adam = torch.optim.AdamW([{"params": [model.one]}, {"params": [model.other]}])
        engine = start_engine(model, optimizer=adam, config=config)
        gradients = ds_gradients.OwnedGradients.of(engine)
        assert gradients is not None
        rank, world = dist.rank(), dist.world_size()
        gradients.backward(model(torch.tensor(float(rank + 1))), last=True)
        assert not gradients._flats  # they go with what DeepSpeed keeps of them
        for found in engine.optimizer.averaged_gradients.values():
            expected = torch.full((100_000 // world,), world * (world + 1) / 2)
            assert torch.equal(torch.cat(list(found))[: len(expected)], expected), stage
        gradients.close()
        engine.destroy()


def test_gradients_that_share_memory_are_not_added_into_each_other() -> None:
    run_distributed(_shared_memory, world_size=2)


def test_weights_whose_exchange_failed_stay_out_of_reach() -> None:
    arriving, waited = ArrivingWeights(), []

    def fails() -> None:
        raise RuntimeError("a peer is gone")

    arriving.add({"head"}, lambda: waited.append("head"))
    arriving.add({"block.0"}, fails)
    arriving.add({"block.1"}, lambda: waited.append("block.1"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a peer is gone"):
            arriving.settle()
    assert waited == ["head"]
    arriving.give_up()
    arriving.settle()
    assert waited == ["head"]
