"""Regularisation beside plain torch, and what a recipe may ask for."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from dist_ft.engine.adversary import FreeLB
from dist_ft.engine.base import EngineOptions
from dist_ft.engine.layer_modes import LayerModes
from dist_ft.engine.loss_module import InTraining, LossModule
from dist_ft.engine.objective import Objective, PassMemory
from dist_ft.engine.reference import ReferenceEngine
from dist_ft.engine.trunk_passes import TrunkPasses
from dist_ft.engine.turns import OwnTurn, work_of
from dist_ft.freezing.activation_cache import ActivationCache, CachedTask
from dist_ft.model.backbone import HeadSpec, MultiTaskModel, build_model
from dist_ft.model.dropout import largest_dropout, set_dropout
from dist_ft.model.embedding_noise import EmbeddingNoise
from dist_ft.model.layer_groups import find_layer_groups
from dist_ft.model.new_blocks import reinitialize_top
from dist_ft.model.trunk import Trunk
from dist_ft.optim.lr_schedules import LrSchedule
from dist_ft.optim.param_groups import LearningRates, build_param_groups
from dist_ft.recipe import RecipeError, load_recipe
from dist_ft.tasks.base import Choice
from dist_ft.tasks.output_regularization import OutputRegularizer, jensen_shannon
from dist_ft.tasks.question_answering import QuestionAnswering
from dist_ft.tasks.text_classification import TextClassification
from dist_ft.train.regularization import penalty_rules
from tests.helpers.phases import largest_difference
from tests.helpers.tiny import TinyBatch
from tests.helpers.tiny_models import tiny_config
from tests.helpers.tiny_run import write_recipe


def _model(architecture: str = "bert") -> MultiTaskModel:
    config = tiny_config(architecture)
    config.pad_token_id = 0
    heads = [HeadSpec("a", "AutoModelForSequenceClassification", {"num_labels": 3})]
    return build_model(config, heads=heads, dtype=torch.float32, seed=0)


INPUTS = {
    "input_ids": torch.arange(3, 24).view(3, 7),
    "attention_mask": torch.tensor([[1] * n + [0] * (7 - n) for n in (7, 4, 2)]),
}
LABELS = torch.tensor([0, 2, 1])
TASK = TextClassification(name="a", labels=("x", "y", "z"))


def test_r_drop_and_label_smoothing_equal_plain_torch() -> None:
    model = _model()
    special = Objective(OutputRegularizer(TASK.loss, TASK.choices, 0.1), r_drop=2.0)
    module = LossModule(model, {"a": TASK.loss}, in_training=InTraining({"a": special}))
    module.train()
    torch.manual_seed(1)
    loss, _ = module("a", INPUTS, {"labels": LABELS})
    torch.manual_seed(1)
    one, two = (model("a", INPUTS)["logits"] for _ in range(2))
    assert not torch.equal(one, two)
    plain = sum(cross_entropy(x, LABELS, label_smoothing=0.1, reduction="sum") for x in (one, two))
    p, q = one.log_softmax(-1), two.log_softmax(-1)
    divergence = kl_div(p, q, log_target=True, reduction="sum")
    divergence += kl_div(q, p, log_target=True, reduction="sum")
    torch.testing.assert_close(loss, plain / 2 + 2.0 * divergence / 2)
    extra = InTraining({"a": special}, weights={"a": 3.0})
    weighted = LossModule(model, {"a": TASK.loss}, in_training=extra).train()
    torch.manual_seed(1)
    torch.testing.assert_close(weighted("a", INPUTS, {"labels": LABELS})[0], 3.0 * loss)
    module = weighted.eval()
    score, outputs = module("a", INPUTS, {"labels": LABELS})
    torch.testing.assert_close(score, cross_entropy(outputs["logits"], LABELS, reduction="sum"))


def test_r_drop_of_spans_leaves_out_what_can_be_no_answer() -> None:
    task = QuestionAnswering(name="qa")
    targets = {
        "candidates": torch.tensor([[0, 1, 1, 0]]),
        "start_position": torch.tensor([1]),
        "end_position": torch.tensor([2]),
    }
    logits = torch.randn(4, 1, 4, requires_grad=True)
    outputs = [{"start_logits": a, "end_logits": b} for a, b in logits.view(2, 2, 1, 4)]
    special = Objective(OutputRegularizer(task.loss, task.choices), r_drop=1.0)
    forwards = iter(outputs)
    special(lambda: next(forwards), {}, targets, memory=PassMemory()).backward()
    gradient = logits.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert (gradient[..., [0, 3]] == 0).all()
    assert (gradient[..., 1:3] != 0).all()


def test_what_can_be_no_answer_has_no_part_in_the_gradient_of_a_divergence_either() -> None:
    logits = torch.randn(2, 2, 5)
    out = torch.tensor([True, False, False, True, False])
    gradients: list[Tensor] = []
    for masked in (True, False):
        one, two = (x.clone().requires_grad_() for x in logits)
        shown = [x.masked_fill(out, -torch.inf) if masked else x[:, ~out] for x in (one, two)]
        jensen_shannon(*([Choice(x, torch.zeros(2).long())] for x in shown)).backward()
        assert one.grad is not None
        gradients.append(one.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].any()


def test_a_gradient_too_large_for_fp16_moves_no_embedding() -> None:
    change = FreeLB().start(torch.ones(2, 3, dtype=torch.bool))
    change(torch.zeros(2, 3, 4))
    start = change.delta.detach().clone()
    change.delta.grad = torch.ones(2, 3, 4)
    change.delta.grad[1, 0, 0] = torch.inf
    FreeLB().ascend(change)
    assert torch.equal(change.delta[1], start[1])
    assert not torch.equal(change.delta[0], start[0])


def test_a_turn_without_a_term_of_the_loss_has_no_share_of_it() -> None:
    batch: Any = TinyBatch({}, {}, 1)
    [work] = work_of([OwnTurn("a", [batch], 0)])
    assert math.isfinite(work.share)


@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_pulls_go_to_the_start_of_what_is_pre_trained_and_to_zero_elsewhere(
    architecture: str,
) -> None:
    kind = "generation" if architecture == "t5" else "text_classification"
    config: Any = tiny_config(architecture)
    config.pad_token_id, config.tie_word_embeddings = 0, False
    classes = {"generation": "AutoModelForSeq2SeqLM"}
    auto_class = classes.get(kind, "AutoModelForSequenceClassification")
    heads = [HeadSpec("a", auto_class, {})]
    model = build_model(config, heads=heads, dtype=torch.float32, seed=0)
    groups = find_layer_groups(model)
    recipe: Any = SimpleNamespace(
        regularization=SimpleNamespace(
            l1=0.0, l2=0.0, mixout=0.1, reinitialize_blocks=None,
            l2_sp=SimpleNamespace(strength=0.3, heads=None),
        ),
        tasks=[SimpleNamespace(name="a", type=kind)],
    )  # fmt: skip
    fresh = {n for n, _ in model.named_parameters() if "pooler" in n}
    built = build_param_groups(
        groups, dimensions={n: p.dim() for n, p in model.named_parameters()},
        rates=LearningRates(1.0), weight_decay=0.0,
        penalties=penalty_rules(recipe, groups, fresh=fresh),
    )  # fmt: skip
    pulls = {g.name: (g.penalty.l2, g.penalty.l2_start, g.mixout) for g in built}
    to_zero = {n for n, (zero, start, _) in pulls.items() if zero == 0.3 and start == 0.0}
    assert all(start == 0.3 for n, (_, start, _) in pulls.items() if n.endswith("/decay")
               and n not in to_zero)  # fmt: skip
    if architecture == "t5":
        assert not to_zero
        assert pulls["head.a/decay"][1] == 0.3
    else:
        assert to_zero == {"pooler/decay", "head.a/decay"}
        assert pulls["pooler/decay"][2] == 0.0


def test_neftune_noise_has_its_size_in_training_alone() -> None:
    model = _model()
    noise = EmbeddingNoise(model, alpha=5.0)
    backbone: Any = model.backbone
    seen: list[torch.Tensor] = []
    words = backbone.get_input_embeddings()
    words.register_forward_hook(lambda _, args, out: seen.append(out.detach() - words.weight[args]))
    module = LossModule(
        model, {"a": TASK.loss}, in_training=InTraining(noise=noise, noisy=frozenset({"a"}))
    )
    with torch.no_grad():
        for mode in (True, False):
            module.train(mode)
            module("a", INPUTS, {"labels": LABELS})
    trained, scored = seen
    assert not scored.any()
    for row, tokens in enumerate((7, 4, 2)):
        size = 5.0 / (tokens * trained.shape[-1]) ** 0.5
        assert 0.9 * size < trained[row].abs().max() <= size


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5", "modernbert"])
def test_each_part_has_the_dropout_that_is_set(architecture: str) -> None:
    model = _model(architecture)
    groups = find_layer_groups(model)
    parts = {"embeddings": 0.0, "attention": 0.0, "hidden": 0.0}
    set_dropout(model, groups=groups, probabilities=parts)
    model.backbone.train()
    ids = {"input_ids": INPUTS["input_ids"]}
    ids |= {"decoder_input_ids": ids["input_ids"]} if architecture == "t5" else {}
    hidden = [model.backbone(**ids)[0] for _ in range(2)]
    assert torch.equal(*hidden)
    for part in parts:
        set_dropout(model, groups=groups, probabilities={**parts, part: 0.5})
        hidden = [model.backbone(**ids)[0] for _ in range(2)]
        assert not torch.equal(*hidden), part


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5", "modernbert"])
def test_the_largest_dropout_of_a_part_is_found(architecture: str) -> None:
    model = _model(architecture)
    groups = find_layer_groups(model)
    set_dropout(model, groups=groups, probabilities={"attention": 0.25, "hidden": 0.5})
    assert largest_dropout(model, groups=groups, part="attention") == 0.25
    assert largest_dropout(model, groups=groups, part="none such") == 0.0


def test_a_part_without_dropout_is_refused() -> None:
    model = _model("llama")
    with pytest.raises(ValueError, match=r"dropout\.hidden: LlamaModel has no dropout there"):
        set_dropout(model, groups=find_layer_groups(model), probabilities={"hidden": 0.1})


def test_new_blocks_are_drawn_and_the_others_stay() -> None:
    model, same = _model(), _model()
    with torch.no_grad():
        for parameter in (*model.parameters(), *same.parameters()):
            parameter.fill_(7.0)
            parameter._is_hf_initialized = True  # pyright: ignore - as from_pretrained leaves it
    groups = find_layer_groups(model)
    state = torch.get_rng_state()
    new = reinitialize_top(model, groups=groups, blocks=2, seed=1)
    reinitialize_top(same, groups=groups, blocks=2, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert new == tuple(g.name for g in groups if g.kind == "block")[-2:]
    expected = {n for g in groups if g.name in new for n in g.parameters}
    other = dict(same.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other[name])
        assert bool((parameter == 7.0).any()) == (name not in expected), name


def test_contradictions_are_refused(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)

    def errors(*overrides: str) -> str:
        changes = [f"regularization.{o}" if o[0] != "!" else o[1:] for o in overrides]
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, overrides=changes)
        assert len(caught.value.errors) == 1, caught.value.errors
        return caught.value.errors[0]

    assert "set optim.weight_decay=0" in errors("l2_sp={strength: 0.1}")
    assert "remove one" in errors("l2=0.1", "l2_sp={strength: 0.1}", "!optim.weight_decay=0")
    assert "task spans, whose classes" in errors("label_smoothing=0.1")
    regression = "!tasks.text.problem=regression"
    assert "task text, whose problem (regression)" in errors("r_drop=1", regression)
    assert "non_reentrant" in errors("r_drop=1", "!model.activation_checkpointing=reentrant")
    assert "did you mean 'tags'" in errors("r_drop=1", "tasks=[tag]").replace("tags?", "'tags'")
    assert "must be the name of a task" in errors("!balancing.weights={tag: 2}")
    bandit = ("!mixture={policy: bandit}", "!balancing.policy=uncertainty")
    assert "use mixture.reward: gain" in errors(*bandit)
    assert "none is set" in errors("tasks=[tags]")
    assert "nothing to keep" in errors("neftune_alpha=5", "!cache.policy=on")
    assert "nothing to keep" in errors("dropout={embeddings: 0.1}", "!cache.policy=on")
    assert "must be at most 4" in errors("reinitialize_blocks=5")
    freelb, smart = "adversarial={type: freelb}", "adversarial={type: smart}"
    text_only = "tasks=[text]"
    assert "two forwards of its own" in errors("r_drop=1", freelb)
    assert "lost in the rounding of bf16" in errors(smart, "!engine.precision=bf16", text_only)
    assert "label for each token" in errors("mixup={blocks: [1]}", "tasks=[text, tags]")
    recomputed = "!model.activation_checkpointing=non_reentrant"
    assert "would not mix again" in errors("mixup={blocks: [1]}", text_only, recomputed)
    assert "nothing to keep" in errors("cutoff={}", "!cache.policy=on")
    assert "must come before" in errors("averaging={type: swa, start: 24step}")
    load_recipe(path, overrides=["regularization.r_drop=1", "regularization.l1=0.1"])


@pytest.mark.parametrize("steps", [10, 37, 100])
def test_one_cycle_is_torchs(steps: int) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    expected = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=steps, cycle_momentum=False
    )
    schedule = LrSchedule("one_cycle", total_steps=steps)
    for step in range(steps):
        assert schedule.factor(step) == pytest.approx(expected.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        if step + 1 < steps:
            expected.step()


def test_wsd_is_constant_until_it_decays() -> None:
    schedule = LrSchedule("wsd", total_steps=100, warmup_steps=10, min_ratio=0.1, decay=0.2)
    factors = [schedule.factor(step) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:81] == [1.0] * 71
    assert factors[80:] == pytest.approx([1.0 - 0.9 * i / 20 for i in range(21)])


def _with_prefix(folder: Path | None) -> tuple[dict[str, torch.Tensor], int]:
    """Train with R-Drop over a frozen prefix; return the weights and its lowest block's runs."""
    model = _model()
    groups = find_layer_groups(model)
    trunk = Trunk.find(model, groups=groups)
    assert not trunk.check()
    trunk.flat = True
    passes = TrunkPasses(
        trunk=trunk,
        order=tuple(g.name for g in groups if g.kind != "head"),
        parameters={g.name: g.parameters for g in groups},
    )
    if folder is not None:
        passes.cache = ActivationCache(
            folder, {"a": CachedTask(np.array([7, 4, 2]))}, width=trunk.width,
            dtype=torch.float32, budget_bytes=10**6,
        )  # fmt: skip
    special = Objective(OutputRegularizer(TASK.loss, TASK.choices), r_drop=2.0)
    engine = ReferenceEngine(
        LossModule(model, {"a": TASK.loss}, in_training=InTraining({"a": special})),
        param_groups=build_param_groups(
            groups,
            dimensions={n: p.dim() for n, p in model.named_parameters()},
            rates=LearningRates(1e-2),
            weight_decay=0.1,
        ),
        options=EngineOptions(seed=1),
        modes=LayerModes.of(
            model, groups=groups, checkpointing="none", prefix_dropout=False, passes=passes
        ),
    )
    engine.set_trainable([g.name for g in groups[3:]])
    runs: list[None] = []
    trunk.blocks[0].register_forward_hook(lambda *_: runs.append(None))
    for step in range(4):
        engine.train_step(
            step,
            task="a",
            micro_batches=[TinyBatch(INPUTS, {"labels": LABELS}, 0, rows=np.arange(3))],
            global_count=3,
            learning_rates={g.name: 1e-2 for g in groups},
        )
    passes.discard()
    return engine.full_weights(), len(runs)


def test_both_forwards_of_r_drop_start_from_the_same_cached_prefix(tmp_path: Path) -> None:
    plain, plain_runs = _with_prefix(None)
    cached, cached_runs = _with_prefix(tmp_path)
    assert (plain_runs, cached_runs) == (8, 1)
    assert largest_difference(plain, cached) <= 1e-5
