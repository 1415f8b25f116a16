"""Blocks run without padding, and from a boundary on, give the losses and gradients of the rest."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_ft.engine.base import EngineOptions
from dist_ft.engine.layer_modes import LayerModes
from dist_ft.engine.loss_module import LossModule
from dist_ft.engine.reference import ReferenceEngine
from dist_ft.engine.trunk_passes import TrunkPasses
from dist_ft.kernels.unpadded_attention import IMPLEMENTATION, RowRuns
from dist_ft.model.backbone import HeadSpec, MultiTaskModel, build_model
from dist_ft.model.flat_rows import FlatRows
from dist_ft.model.layer_groups import LayerGroup, find_layer_groups
from dist_ft.model.trunk import Trunk
from dist_ft.optim.param_groups import LearningRates, build_param_groups
from dist_ft.tasks.base import LossSum
from tests.helpers.phases import bitwise_equal
from tests.helpers.tiny import TinyBatch
from tests.helpers.tiny_models import DECODERS, tiny_config

UNPADDED = (
    "bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "distilbert",
    "electra", "modernbert", "mobilebert", "ernie", "gpt2", "gpt_neox", "opt", "llama", "mistral",
    "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "olmo", "olmo2", "phi", "phi3", "gemma",
    "gemma3_text", "cohere", "stablelm", "starcoder2", "granite", "smollm3", "bart", "mbart",
    "marian", "pegasus", "t5", "mt5", "umt5",
)  # fmt: skip
T5 = ("t5", "mt5", "umt5")
BOUNDARY_ALONE = ("gptj", "bloom", "falcon", "mpt", "rembert", "deberta-v2")
NEITHER = ("longt5", "xlnet", "fnet", "longformer")


def _model(name: str) -> tuple[MultiTaskModel, list[LayerGroup]]:
    config: Any = tiny_config(name)
    config.pad_token_id = 0
    kind = "AutoModelForSequenceClassification"
    if name in DECODERS:
        kind = "AutoModelForCausalLM"
    if config.is_encoder_decoder:
        kind = "AutoModelForSeq2SeqLM"
    heads = [HeadSpec("a", kind, {})]
    # T5 does not scale its scores: tiny random weights make rounding errors of 1e-5 in fp32.
    dtype = torch.float64 if name in T5 else torch.float32
    model = build_model(config, heads=heads, dtype=dtype, seed=0)
    return model, find_layer_groups(model)


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    mask = (torch.arange(11)[None] < torch.tensor([11, 7, 7, 4, 1])[:, None]).long()
    ids = torch.randint(3, 60, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def _gradients(model: MultiTaskModel, inputs: dict[str, Tensor], names: set[str]) -> Any:
    """Loss (over real tokens) and gradients of `names`."""
    for n, p in model.named_parameters():
        p.requires_grad_(n in names)
        p.grad = None
    config: Any = model.backbone.config
    extra = {"labels": inputs["input_ids"]} if config.is_encoder_decoder else {}
    logits = model("a", {**inputs, **extra})["logits"]
    if logits.dim() == 3:
        logits = logits * inputs["attention_mask"][..., None]
    loss = (logits * torch.linspace(-1, 1, logits.shape[-1])).sin().sum()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _same(one: Any, other: Any) -> None:
    assert abs(float(one[0] - other[0])) <= 1e-5 * max(1.0, abs(float(one[0])))
    assert one[1].keys() == other[1].keys()
    largest = max(float(g.abs().max()) for g in one[1].values())
    for name, gradient in one[1].items():
        assert float((gradient - other[1][name]).abs().max()) <= 1e-5 * max(1.0, largest), name


@pytest.mark.parametrize("name", UNPADDED + BOUNDARY_ALONE)
def test_losses_and_gradients_do_not_change(name: str) -> None:
    model, groups = _model(name)
    inputs = _inputs()
    everything = {n for n, _ in model.named_parameters()}
    plain = _gradients(model, inputs, everything)
    trunk = Trunk.find(model, groups=groups)
    expected = set() if name in UNPADDED else {"unpadded"}
    assert trunk.check().keys() == expected
    rows = FlatRows.of(inputs["attention_mask"])
    trunk.flat = name in UNPADDED
    trunk.prepare(rows)
    _same(plain, _gradients(model, inputs, everything))

    boundary = min(2, len(trunk.blocks) - 1)
    above = {n for g in groups[groups.index(_block(groups, boundary)) :] for n in g.parameters}
    trunk.prepare(None)
    frozen = _gradients(model, inputs, above)
    hidden = trunk.prefix(inputs, rows=rows, boundaries=[1, boundary])[boundary]
    trunk.prepare(rows)
    with trunk.starting_at(boundary, hidden):
        _same(frozen, _gradients(model, inputs, above))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_positions_of_a_tasks_own_reach_the_prefix(name: str) -> None:
    model, groups = _model(name)
    inputs = _inputs()
    inputs["position_ids"] = (3 + 2 * torch.arange(11)).expand(5, 11).contiguous()
    above = {n for g in groups[groups.index(_block(groups, 2)) :] for n in g.parameters}
    trunk = Trunk.find(model, groups=groups)
    assert not trunk.check()
    plain = _gradients(model, inputs, above)
    rows = FlatRows.of(inputs["attention_mask"])
    trunk.flat = True
    hidden = trunk.prefix(inputs, rows=rows, boundaries=[2])[2]
    trunk.prepare(rows)
    with trunk.starting_at(2, hidden):
        _same(plain, _gradients(model, inputs, above))


def _prefix_is_the_same(trunk: Trunk, mask: Tensor) -> None:
    """Compare what two blocks return without padding and with it."""
    ids = torch.randint(3, 60, mask.shape, generator=torch.Generator().manual_seed(2)) * mask
    inputs = {"input_ids": ids, "attention_mask": mask}
    found: list[Tensor] = []
    for flat in (False, True):
        trunk.flat = flat
        found.append(trunk.prefix(inputs, rows=FlatRows.of(mask), boundaries=[2])[2])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "gpt2", "llama", "t5"])
def test_rows_as_long_together_as_the_batch_is_wide_stay_what_they_are(name: str) -> None:
    """Of a batch whose longest row is kept already, only the others go through the prefix."""
    model, groups = _model(name)
    trunk = Trunk.find(model, groups=groups)
    trunk.check()
    _prefix_is_the_same(trunk, (torch.arange(8)[None] < torch.tensor([[5], [3]])).long())


@pytest.mark.parametrize("name", T5)
def test_a_position_bias_of_as_many_heads_as_rows_are_long_stays_what_it_is(name: str) -> None:
    model, groups = _model(name)
    trunk = Trunk.find(model, groups=groups)
    trunk.check()
    block: Any = trunk.blocks[0]
    heads = block.layer[0].SelfAttention.n_heads
    lengths = torch.tensor([[heads], [1], [heads]])
    _prefix_is_the_same(trunk, (torch.arange(heads)[None] < lengths).long())


def _block(groups: list[LayerGroup], index: int) -> LayerGroup:
    """The block, or what comes after the first stack if it has no more."""
    first = next(i for i, g in enumerate(groups) if g.kind == "block")
    return groups[first + index]


@pytest.mark.parametrize("name", NEITHER)
def test_a_model_that_can_not_is_found_out(name: str) -> None:
    model, groups = _model(name)
    trunk = Trunk.find(model, groups=groups)
    assert trunk.check().keys() == {"unpadded", "boundary"}
    plain = model("a", _inputs() | ({"labels": _inputs()["input_ids"]} if name == "longt5" else {}))
    assert torch.isfinite(plain["logits"]).all()  # it still runs as it did


def test_the_attention_is_the_models_own_again_without_rows() -> None:
    model, groups = _model("bert")
    config: Any = model.backbone.config
    own = config._attn_implementation
    trunk = Trunk.find(model, groups=groups)
    assert not trunk.check()
    trunk.flat = True
    trunk.prepare(FlatRows.of(_inputs()["attention_mask"]))
    assert config._attn_implementation == IMPLEMENTATION
    trunk.prepare(None)
    assert config._attn_implementation == own


def test_rows_are_found_wherever_their_padding_is() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]])
    rows = FlatRows.of(mask)
    assert rows.lengths == (2, 3, 1)
    value = torch.arange(9.0).view(3, 3, 1)
    assert rows.flatten(value).flatten().tolist() == [1, 2, 3, 4, 5, 8]
    assert torch.equal(rows.pad(rows.flatten(value)), value * mask[..., None])
    assert RowRuns.of([3, 3, 2, 3]).runs == ((2, 3), (1, 2), (1, 3))


def _loss(outputs: Any, targets: Any) -> LossSum:
    losses = torch.nn.functional.cross_entropy(outputs.logits, targets["labels"], reduction="none")
    return LossSum(losses.sum(), torch.tensor(len(losses)))


@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant"])
def test_recomputed_blocks_run_without_padding_too(mode: Any) -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointing in ("none", mode):
        model, groups = _model("bert")
        trunk = Trunk.find(model, groups=groups)
        assert not trunk.check()
        trunk.flat = True
        engine = ReferenceEngine(
            LossModule(model, {"a": _loss}),
            param_groups=build_param_groups(
                groups,
                dimensions={n: p.dim() for n, p in model.named_parameters()},
                rates=LearningRates(1e-2),
                weight_decay=0.1,
            ),
            options=EngineOptions(seed=1),
            modes=LayerModes.of(
                model,
                groups=groups,
                checkpointing=checkpointing,
                prefix_dropout=True,
                passes=TrunkPasses(trunk=trunk),
            ),
        )
        batch = TinyBatch(_inputs(), {"labels": torch.tensor([0, 1, 0, 1, 1])}, index=0)
        for step in range(3):
            engine.train_step(
                step,
                task="a",
                micro_batches=[batch],
                global_count=5,
                learning_rates={g.name: 1e-2 for g in groups},
            )
        found.append(engine.full_weights())
    assert bitwise_equal(*found)  # dropout draws included
