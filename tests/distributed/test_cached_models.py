"""Decoders and the encoder of an encoder-decoder start from a cached prefix under ZeRO-3, too."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_ft import dist
from dist_ft.engine.base import PrefixCounts
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.model.backbone import HeadSpec, build_model
from dist_ft.model.layer_groups import find_layer_groups
from dist_ft.model.trunk import Trunk
from dist_ft.tasks.base import LossSum
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny import TinyBatch
from tests.helpers.tiny_models import tiny_config
from tests.helpers.trunk_engine import trunk_engine

LENGTHS = np.array([[7, 4, 2], [6, 6, 3]])  # rows of each rank
FROZEN = {"llama": 2, "gpt2": 2, "t5": 1}  # blocks


def _loss(outputs: Any, targets: Any) -> LossSum:
    logits = outputs.logits.flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(
        logits, targets["labels"].flatten(), reduction="sum", ignore_index=-100
    )
    return LossSum(losses, torch.tensor(1))


def _batch() -> TinyBatch:
    rank = dist.rank()
    generator = torch.Generator().manual_seed(rank)
    mask = (torch.arange(7)[None] < torch.tensor(LENGTHS[rank])[:, None]).long()
    ids = torch.randint(3, 60, mask.shape, generator=generator) * mask
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return TinyBatch(inputs, {"labels": labels}, rank, rows=np.arange(3) + 3 * rank)


def _engine(name: str, folder: Path | None, *, stage: int) -> tuple[DeepSpeedEngine, Trunk, Any]:
    """Return an engine that trains above a frozen prefix, its trunk, and its batch."""
    config: Any = tiny_config(name)
    config.pad_token_id = 0
    seq2seq = config.is_encoder_decoder
    kind = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
    heads = [HeadSpec("a", kind, {})]
    model = build_model(config, heads=heads, dtype=torch.float32, seed=0)
    groups = find_layer_groups(model)
    trunk = Trunk.find(model, groups=groups)
    assert not trunk.check()
    trunk.flat = True
    engine = trunk_engine(
        model, groups=groups, trunk=trunk, loss=_loss, stage=stage, rate=1e-2,
        cache=None if folder is None else (folder, LENGTHS.flatten()),
    )  # fmt: skip
    first = next(i for i, g in enumerate(groups) if g.kind == "block") + FROZEN[name]
    engine.set_trainable([g.name for g in groups[first:]])
    batch = _batch()
    if seq2seq:
        batch.inputs["labels"] = batch.targets["labels"]
    return engine, trunk, batch


def _step(engine: DeepSpeedEngine, step: int, batch: TinyBatch) -> PrefixCounts:
    rates = {g.layer_group: 1e-2 for g in engine._groups}
    return engine.train_step(
        step, task="a", micro_batches=[batch], global_count=30, learning_rates=rates
    ).prefix


def _trained(name: str, folder: Path | None) -> tuple[dict[str, Tensor], int, int]:
    """Train under ZeRO-3; return the weights, runs of the lowest block, rows found."""
    engine, trunk, batch = _engine(name, folder, stage=3)
    runs: list[None] = []
    trunk.blocks[0].register_forward_hook(lambda *_: runs.append(None))
    found = sum(_step(engine, step, batch).found for step in range(4))
    dist.barrier()
    engine._modes.passes.discard()
    weights = engine.full_weights()
    engine.close()
    return weights, len(runs), found


def _compare(folder: Path) -> None:
    for name in FROZEN:
        plain, runs, found = _trained(name, None)
        assert (runs, found) == (4, 0), name
        cached, runs, found = _trained(name, folder / name)
        assert (runs, found) == (1, 9), name
        assert plain.keys() == cached.keys()
        for parameter, value in plain.items():
            assert torch.equal(value, cached[parameter]), (name, parameter)
    for stage in (0, 2):
        _drop(folder / f"dropped-{stage}", stage=stage)


def _held(engine: DeepSpeedEngine) -> int:
    return sum(p.untyped_storage().nbytes() for p in engine._module.parameters())


def _drop(folder: Path, *, stage: int) -> None:
    """The blocks of a prefix leave and come back; the embeddings, tied to the head, stay."""
    plain, _, batch = _engine("gpt2", None, stage=stage)
    for step in range(13):
        _step(plain, step, batch)
    expected = plain.eval_forward("a", batch)[0]
    engine, trunk, batch = _engine("gpt2", folder, stage=stage)
    before = _held(engine)
    blocks = sum(p.nbytes for block in trunk.blocks[:2] for p in block.parameters())
    positions = trunk.root.get_submodule("wpe")
    blocks += sum(p.nbytes for p in positions.parameters())
    parked = [_step(engine, step, batch).parked_bytes for step in range(12)]
    assert parked == [0] * 8 + [blocks] * 4
    assert before - _held(engine) == blocks
    engine.state()  # a checkpoint
    assert _held(engine) == before
    assert _step(engine, 12, batch).parked_bytes == 0
    assert torch.equal(engine.eval_forward("a", batch)[0], expected)
    own, other = engine.full_weights(), plain.full_weights()
    assert all(torch.equal(own[name], value) for name, value in other.items())
    assert [_step(engine, step, batch).parked_bytes for step in range(13, 24)][-1] == blocks
    whole, here = ([p.numel() for p in e.module.parameters()] for e in (plain, engine))
    assert whole == here
    dist.barrier()
    engine._modes.passes.discard()
    for one in (engine, plain):
        one.close()


def test_cached_equals_uncached_and_its_weights_can_go(tmp_path: Path) -> None:
    run_distributed(_compare, tmp_path)
