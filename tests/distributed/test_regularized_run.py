"""Regularised losses, noise and dropout under ZeRO 0-3, and from the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor

from dist_ft.engine.adversary import FreeLB, Smart
from dist_ft.engine.base import Engine, EngineOptions, micro_batch_seed
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_config import DeepSpeedOptions
from dist_ft.engine.loss_module import InTraining, LossModule
from dist_ft.engine.objective import Cutoff, Objective
from dist_ft.model.backbone import HeadSpec, MultiTaskModel, build_model
from dist_ft.model.dropout import set_dropout
from dist_ft.model.embedding_noise import EmbeddingNoise
from dist_ft.model.hidden_mixup import HiddenMixup
from dist_ft.model.layer_groups import find_layer_groups
from dist_ft.model.word_embeddings import WordEmbeddings
from dist_ft.optim.averaging import Averaging
from dist_ft.optim.param_groups import LearningRates, ParamGroup, build_param_groups
from dist_ft.optim.penalties import PenaltyRules
from dist_ft.tasks.base import Choice
from dist_ft.tasks.output_regularization import OutputRegularizer
from dist_ft.tasks.text_classification import TextClassification
from dist_ft.train.checkpoint import CheckpointReader
from dist_ft.train.finished import evaluate, open_finished
from tests.helpers.drawn import drawn
from tests.helpers.phases import largest_difference, mean_difference
from tests.helpers.plain import mask
from tests.helpers.plain_objectives import PlainObjective
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny import TinyBatch
from tests.helpers.tiny_models import tiny_config
from tests.helpers.tiny_run import events, newest_checkpoint, state_hash, train, write_recipe

STEPS = 20
# A key's bias has no gradient (softmax drops what all keys share), so what Adam divides there is
# rounding, 1e-10, which an epsilon of 1e-8 and the pull to the start blow up to 4e-4 under ZeRO-3;
# every other parameter agrees to 1e-7 with either epsilon.
EPS = 1e-5
OPTIONS = EngineOptions(seed=5, eps=EPS, max_grad_norm=0.0)
L2_SP = 0.1

SMOOTH_TWICE = PlainObjective(smoothing=0.1, r_drop=2.0, neftune=5.0, penalty=0.05)
CUT_AND_SMOOTH = PlainObjective(cutoff=(0.3, 0.7, 1.3), smart=(3.0, 2, 1e-2, 2e-2, 1e-2))
FREE_AND_MIXED = PlainObjective(
    smoothing=0.1, freelb=(3, 0.1, 0.25, 0.1), mixup=(0.4, (0, 2)), cutoff=(0.2, 1.0, 1.0)
)


@dataclass(frozen=True)
class Case:
    """An objective, what is done to the weights beside it, and in which precision."""

    plain: PlainObjective
    mixout: float = 0.0
    ema: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    steps: int = STEPS

    def parts(self) -> int:
        """How many rules there are at once."""
        return sum(bool(v) for v in (*vars(self.plain).values(), self.mixout, self.ema))


@dataclass
class Expected:
    """What plain torch makes of a case; averages stand for the weights where there are none."""

    case: Case
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]


def _model() -> MultiTaskModel:
    heads = [HeadSpec("a", "AutoModelForSequenceClassification", {"num_labels": 3})]
    model = build_model(tiny_config("bert"), heads=heads, dtype=torch.float32, seed=0)
    groups = find_layer_groups(model)
    set_dropout(model, groups=groups, probabilities={"attention": 0.2, "hidden": 0.05})
    return model


def _param_groups(model: MultiTaskModel, *, mixout: float = 0.0) -> list[ParamGroup]:
    return build_param_groups(
        find_layer_groups(model),
        dimensions={n: p.dim() for n, p in model.named_parameters()},
        rates=LearningRates(1e-3),
        weight_decay=0.0,
        penalties=PenaltyRules(l2_sp=L2_SP, l2_sp_new=0.01, mixout=mixout),
    )


def _objective(plain: PlainObjective, model: MultiTaskModel, task: TextClassification) -> Objective:
    adversary = None
    if plain.smart is not None:
        weight, steps, size, radius, noise = plain.smart
        adversary = Smart(weight, steps=steps, step_size=size, radius=radius, noise=noise)
    elif plain.freelb is not None:
        steps, size, radius, init = plain.freelb
        adversary = FreeLB(steps=steps, step_size=size, radius=radius, init=init)
    mixup = None
    if plain.mixup is not None:
        alpha, blocks = plain.mixup
        groups = find_layer_groups(model)
        mixup = HiddenMixup(model, groups=groups, blocks=blocks, alpha=alpha)

    def squares(choices: Sequence[Choice]) -> Tensor:
        return plain.penalty * torch.stack([c.logits.float().square().sum() for c in choices]).sum()

    return Objective(
        OutputRegularizer(task.loss, task.choices, plain.smoothing, squares),
        r_drop=plain.r_drop,
        words=WordEmbeddings(model, key="test"),
        cutoff=None if plain.cutoff is None else Cutoff(*plain.cutoff),
        adversary=adversary,
        mixup=mixup,
    )


def _engine(case: Case, *, stage: int) -> Engine:
    model, plain = _model(), case.plain
    task = TextClassification(name="a", labels=("x", "y", "z"))
    noise = EmbeddingNoise(model, alpha=plain.neftune) if plain.neftune else None
    extra = InTraining({"a": _objective(plain, model, task)}, noise, frozenset({"a"}), {"a": 0.5})
    averaging = None if case.ema is None else Averaging("ema", decay=case.ema)
    return DeepSpeedEngine(
        LossModule(model, {"a": task.loss}, in_training=extra),
        param_groups=_param_groups(model, mixout=case.mixout),
        options=replace(OPTIONS, precision=case.precision, averaging=averaging),
        deepspeed_options=DeepSpeedOptions(
            zero_stage=stage, micro_batch_size=3, gradient_accumulation_steps=1
        ),
    )


def _batches(step: int) -> list[Any]:
    batches: list[Any] = []
    for index in range(2):
        draw = torch.Generator().manual_seed(100 * step + index)
        ids = torch.randint(3, 40, (3, 7), generator=draw)
        mask = torch.tensor([[1] * n + [0] * (7 - n) for n in (7, 4, 2)])
        labels = torch.randint(3, (3,), generator=draw)
        inputs = {"input_ids": ids, "attention_mask": mask}
        batches.append(TinyBatch(inputs, {"labels": labels}, index))
    return batches


def _trains(step: int, groups: Any) -> Any:
    """Return what trains from a step on: the top, everything, all but the bottom."""
    return {0: groups[-3:], 7: groups, 14: groups[1:]}.get(step)


def _written_out(case: Case) -> Expected:
    """Train in plain torch; the model computes in its precision, the optimizer updates fp32."""
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    model = _model().train().to(dtype)
    groups = _param_groups(model)
    working = dict(model.named_parameters())
    values = {n: p.detach().float().clone() for n, p in working.items()}
    start = {n: v.clone() for n, v in values.items()}
    averages: dict[str, Tensor] = {}
    optimizers = {
        g.name: torch.optim.AdamW([values[n] for n in g.parameters], lr=1e-3, eps=EPS,
                                  weight_decay=0.0)
        for g in groups
    }  # fmt: skip
    active: list[ParamGroup] = []
    for step in range(case.steps):
        names = _trains(step, [g.name for g in find_layer_groups(model)])
        if names is not None:
            active = [g for g in groups if g.layer_group in names]
            for name, group in ((n, g) for g in groups for n in g.parameters):
                working[name].requires_grad_(group in active)
        trained = [n for g in active for n in g.parameters]
        kept = {n: _kept(n, values[n], case.mixout, step=step) for n in trained}
        _publish(working, values, start, kept=kept, mixout=case.mixout)
        loss = torch.zeros(())
        for batch in _batches(step):
            torch.manual_seed(micro_batch_seed(OPTIONS.seed, step=step, index=batch.index))
            loss = loss + 0.5 * case.plain.loss(model, batch.inputs, batch.targets["labels"]) / 6
        model.zero_grad(set_to_none=True)
        loss.backward()
        for name in trained:
            gradient = working[name].grad
            assert gradient is not None
            if kept[name].min() < 1:
                gradient = gradient * kept[name] / (1 - case.mixout)
            values[name].grad = gradient.float() + _pull(name, values[name], start[name])
        for group in active:
            optimizers[group.name].step()
        if case.ema is not None:
            for name in trained:
                now = values[name].detach()
                averages[name] = now + case.ema * (averages.get(name, now) - now)
    return Expected(case, values, {**values, **averages})


@torch.no_grad()
def _publish(
    working: dict[str, Any],
    values: dict[str, Tensor],
    start: dict[str, Tensor],
    *,
    kept: dict[str, Tensor],
    mixout: float,
) -> None:
    """Write what the model computes with; mixed as in Lee et al. 2020 where not all is kept."""
    for name, value in values.items():
        k = kept.get(name)
        if k is None or k.min() == 1:
            working[name].copy_(value)
        else:
            mixed = k * value + (1 - k) * start[name] - mixout * start[name]
            working[name].copy_(mixed / (1 - mixout))


def _kept(name: str, value: Tensor, probability: float, *, step: int) -> Tensor:
    """1 where mixout keeps an element: all of them but in matrices of pre-trained linear layers."""
    if not probability or value.dim() < 2 or name.startswith(("heads.", "backbone.embeddings.")):
        return torch.ones_like(value)
    drawn_out = mask(OPTIONS.seed, step, name, value.numel(), probability)
    return 1.0 - torch.from_numpy(drawn_out).view_as(value).float()


def _pull(name: str, value: Tensor, start: Tensor) -> Tensor:
    """The gradient of the pull to the start, by autograd."""
    leaf = value.detach().clone().requires_grad_()
    if not name.startswith("heads."):
        loss = L2_SP / 2 * (leaf - start).square().sum()
    else:
        loss = 0.01 / 2 * leaf.square().sum() * (leaf.dim() > 1)
    return torch.autograd.grad(loss, leaf)[0]


def _train(engine: Engine, *, share: tuple[int, int], steps: int = STEPS) -> dict[str, Tensor]:
    module: Any = engine.module
    groups = [g.name for g in find_layer_groups(module.model)]
    for step in range(steps):
        names = _trains(step, groups)
        if names is not None:
            engine.set_trainable(names)
        engine.train_step(
            step,
            task="a",
            micro_batches=_batches(step)[share[0] :: share[1]],
            global_count=6,
            learning_rates=dict.fromkeys(groups, 1e-3),
        )
    return engine.full_weights()


def _follows(cases: list[tuple[Expected, tuple[int, ...]]]) -> None:
    share = (dist.get_rank(), dist.get_world_size())
    for expected, stages in cases:
        case = expected.case
        for stage in stages:
            engine = _engine(case, stage=stage)
            weights = _train(engine, share=share)
            with engine.averaged():
                averages = engine.full_weights()
            if dist.get_rank() == 0:
                assert largest_difference(weights, expected.weights) <= 1e-5, (stage, case)
                assert largest_difference(averages, expected.averages) <= 1e-5, (stage, case)


@st.composite
def _combinations(draw: Any) -> Case:
    adversary = draw(st.sampled_from(("none", "smart", "freelb")))
    plain = PlainObjective(
        smoothing=draw(st.sampled_from((0.0, 0.2))),
        # FreeLB's forwards take the place of R-Drop's.
        r_drop=0.0 if adversary == "freelb" else draw(st.sampled_from((0.0, 1.0))),
        neftune=draw(st.sampled_from((0.0, 5.0))),
        cutoff=draw(st.sampled_from((None, (0.5, 1.0, 2.0)))),
        smart=(1.0, 1, 1e-2, 2e-2, 1e-2) if adversary == "smart" else None,
        freelb=(2, 0.1, 0.6, 0.05) if adversary == "freelb" else None,
        mixup=draw(st.sampled_from((None, (1.0, (1,))))),
    )
    return Case(
        plain,
        mixout=draw(st.sampled_from((0.0, 0.3))),
        ema=draw(st.sampled_from((None, 0.8))),
    )


def test_objectives_equal_plain_torch_in_every_stage() -> None:
    plain = [SMOOTH_TWICE, CUT_AND_SMOOTH, FREE_AND_MIXED]
    cases = [(_written_out(Case(p)), (0, 1, 2, 3)) for p in plain]
    nothing = _written_out(Case(PlainObjective())).weights
    for expected, _ in cases:
        assert largest_difference(expected.weights, nothing) > 1e-3
    # Hypothesis begins with the simplest example, in which nothing would be combined.
    combinations = drawn(_combinations().filter(lambda c: c.parts() >= 4), count=5, start=8)
    for rule in ("freelb", "smart", "r_drop", "neftune", "cutoff", "mixup"):
        assert any(getattr(c.plain, rule) for c in combinations), rule
    assert any(c.mixout and c.ema for c in combinations)
    cases += [(_written_out(case), (i % 4,)) for i, case in enumerate(combinations)]
    run_distributed(_follows, cases)


# Past the first phase change; each objective on its own.
BF16_STEPS = 10
BF16_CASES = [
    (PlainObjective(smoothing=0.3), (3,)),
    (PlainObjective(r_drop=4.0), (2,)),
    (PlainObjective(neftune=30.0), (1,)),
    (PlainObjective(cutoff=(0.5, 2.0, 4.0)), (0,)),
    (PlainObjective(smart=(10.0, 1, 0.1, 0.1, 0.1)), (2,)),
    (PlainObjective(freelb=(2, 1.0, 3.0, 0.5)), (3,)),
    (PlainObjective(mixup=(1.0, (0, 2))), (0,)),
]


def _bf16_follows(
    cases: list[tuple[Expected, tuple[int, ...]]], nothing: dict[str, Tensor]
) -> None:
    share = (dist.get_rank(), dist.get_world_size())
    for expected, stages in cases:
        for stage in stages:
            engine = _engine(expected.case, stage=stage)
            weights = _train(engine, share=share, steps=BF16_STEPS)
            if dist.get_rank() == 0:
                error = mean_difference(weights, expected.weights)
                effect = mean_difference(nothing, expected.weights)
                # Gradients are rounded to bf16 after other sums than in the reference: 2e-5 to 4e-5
                # of a weight in these steps, where Adam moves one by up to 1e-3 in each. Without
                # the objective the weights would be twice as far away or more.
                assert error < min(6e-5, effect / 1.5), (stage, expected.case.plain, error, effect)


def test_each_objective_follows_plain_torch_in_bf16() -> None:
    def expected(plain: PlainObjective) -> Expected:
        return _written_out(Case(plain, precision="bf16", steps=BF16_STEPS))

    cases = [(expected(plain), stages) for plain, stages in BF16_CASES]
    run_distributed(_bf16_follows, cases, expected(PlainObjective()).weights)


def test_a_regularised_run_resumes_to_the_bit(tmp_path: Path) -> None:
    rules: dict[str, Any] = {
        "l2_sp": {"strength": 0.1, "heads": 0.01},
        "mixout": 0.3,
        "averaging": {"type": "ema", "decay": 0.5, "start": "1step"},
        "label_smoothing": 0.1,
        "adversarial": {"type": "freelb"},
        "cutoff": {"share": 0.2},
        "mixup": {"blocks": [1, 2]},
        "neftune_alpha": 5,
        "tasks": ["text"],
        "dropout": {"attention": 0.2, "embeddings": 0.1},
        "reinitialize_blocks": 1,
    }
    task = {
        "name": "text",
        "type": "text_classification",
        "data": {"train": "texts.jsonl", "validation": 0.2},
        "max_length": 32,
    }
    path = write_recipe(
        tmp_path,
        tasks=[task],
        regularization=rules,
        balancing={"weights": {"text": 0.5}},
        train={"max_duration": "6step"},
        checkpoint={"every": "2step"},
        optim={"weight_decay": 0},
    )
    train(path, ["name=whole"])
    train(path, ["name=halves"], stop_at=3, exit_code=75)
    train(path, ["name=halves"], resume=True)
    runs = tmp_path / "runs"
    assert state_hash(runs / "whole") == state_hash(runs / "halves")
    phases = [e for e in events(runs / "whole") if e["event"] == "phase"]
    # The noise on the embeddings is not in a kept prefix, so none is kept.
    assert [p["cached_blocks"] for p in phases] == [0] * len(phases)
    assert all(p["anchor_bytes_per_rank"] > 0 for p in phases)
    _scores_are_those_of_the_average(runs / "whole")


def _scores_are_those_of_the_average(run: Path) -> None:
    reader = CheckpointReader(newest_checkpoint(run))
    names = {name for kind, name in reader.saved() if kind == "average"}
    assert any(name.startswith("heads.") for name in names)
    scored = [e for e in events(run) if e["event"] == "eval"][-1]["metrics"]["loss"]
    again = evaluate(run)["text"]["validation"]["loss"]
    assert again == pytest.approx(scored, abs=1e-5)
    # Nearly the same, but not the newest weights' loss.
    _, parts, _, _ = open_finished(run)
    value = dict(parts.model.named_parameters())[min(names)].detach().flatten()
    newest = reader.read("weight", min(names), start=0, length=value.numel())
    assert newest is not None
    assert not torch.equal(value, newest)
