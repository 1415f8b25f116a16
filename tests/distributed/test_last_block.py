"""Heads that get no more than they read train the same weights, under every ZeRO stage.

So does a last block that runs for first tokens only.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_ft import dist
from dist_ft.model.backbone import HeadSpec, build_model
from dist_ft.model.head_inputs import Form
from dist_ft.model.layer_groups import find_layer_groups
from dist_ft.model.trunk import Trunk
from dist_ft.tasks.base import LossSum
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny import TinyBatch
from tests.helpers.tiny_models import tiny_config
from tests.helpers.trunk_engine import trunk_engine

LENGTHS = np.array([[7, 4, 2], [6, 6, 3]])  # rows of each rank
# Trains all but the embeddings, then the last block and the head, the head alone, then all again.
FROZEN = (0, 0, 2, 2, 2, 3, 3, 3, 0)
HEADS = {
    "firsts": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
}


def _loss(outputs: Any, targets: Any) -> LossSum:
    logits, labels = outputs.logits.flatten(0, -2), targets["labels"].flatten()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return LossSum(losses, torch.tensor(3))


def _batch(form: str) -> TinyBatch:
    rank = dist.rank()
    mask = (torch.arange(7)[None] < torch.tensor(LENGTHS[rank])[:, None]).long()
    ids = torch.randint(3, 60, mask.shape, generator=torch.Generator().manual_seed(rank)) * mask
    inputs = {"input_ids": ids, "attention_mask": mask}
    labels = torch.tensor([0, 1, 2]) if form == "firsts" else torch.where(mask > 0, ids % 3, -100)
    return TinyBatch(inputs, {"labels": labels}, rank, rows=np.arange(3) + 3 * rank)


def _trained(
    form: Form, *, narrow: bool, stage: int, folder: Path | None = None
) -> dict[str, Tensor]:
    config: Any = tiny_config("bert")
    # With fewer tokens, fewer random numbers are drawn.
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    heads = [HeadSpec("a", HEADS[form], {"num_labels": 3})]
    model = build_model(config, heads=heads, dtype=torch.float32, seed=0)
    groups = find_layer_groups(model)
    trunk = Trunk.find(model, groups=groups)
    assert not trunk.check()
    trunk.flat = True
    if narrow:
        trunk.fit_to_heads(model, per_token=("a",))
        assert trunk.forms == {"a": form}
    tokens: list[int] = []
    if narrow:  # before the engine takes the model over, which lets no later hook live
        assert trunk.last is not None
        trunk.last.sublayer.register_forward_hook(lambda *call: tokens.append(call[2].shape[1]))
    engine = trunk_engine(
        model, groups=groups, trunk=trunk, loss=_loss, stage=stage, rate=1e-3, weight_decay=0.1,
        cache=None if folder is None else (folder, LENGTHS.flatten()),
    )  # fmt: skip
    before: int | None = None
    first = next(i for i, g in enumerate(groups) if g.kind == "block")
    for step, frozen in enumerate(FROZEN):
        if frozen != before:
            engine.set_trainable([g.name for g in groups[first + frozen :]])
            before = frozen
        rates = {g.layer_group: 1e-3 for g in engine._groups}
        engine.train_step(
            step, task="a", micro_batches=[_batch(form)], global_count=6, learning_rates=rates
        )
    if form == "firsts" and narrow:
        # One a row, but where it is frozen: what is kept of it is every token's.
        assert (*tokens[:5], tokens[-1]) == (3,) * 6
        found = [n == 3 for n in tokens]
        assert folder is not None or found == [frozen < 3 for frozen in FROZEN]
    weights = engine.full_weights()
    dist.barrier()
    engine._modes.passes.discard()
    engine.close()
    return weights


def _compare(folder: Path, form: Form) -> None:
    for stage in (0, 1, 2, 3):
        whole = _trained(form, narrow=False, stage=stage)
        narrow = _trained(form, narrow=True, stage=stage)
        cached = _trained(form, narrow=True, stage=stage, folder=folder / str(stage))
        assert whole.keys() == narrow.keys() == cached.keys()
        for name, value in whole.items():
            # Adam makes steps of a gradient that is nothing but rounding.
            torch.testing.assert_close(narrow[name], value, rtol=0, atol=2e-4, msg=name)
            assert torch.equal(cached[name], narrow[name]), (stage, name)


@pytest.mark.parametrize("form", HEADS)
def test_weights_and_cache_stay(tmp_path: Path, form: Form) -> None:
    run_distributed(_compare, tmp_path, form)
