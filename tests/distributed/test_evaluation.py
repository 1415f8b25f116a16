"""Evaluation on two ranks, with partitioned weights and texts of different lengths."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from dist_ft.data.loader import MicroBatch
from dist_ft.data.shards import ShardedDataset
from dist_ft.dist import World
from dist_ft.engine.base import Engine, EngineOptions
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_config import DeepSpeedOptions
from dist_ft.engine.loss_module import LossModule
from dist_ft.engine.reference import ReferenceEngine
from dist_ft.model.backbone import HeadSpec, build_model
from dist_ft.model.layer_groups import find_layer_groups
from dist_ft.optim.param_groups import LearningRates, build_param_groups
from dist_ft.tasks.generation import Generation
from dist_ft.train.evaluate import EvalData, Scores, evaluate_task
from tests.helpers.batches import prepared
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny_models import tiny_config
from tests.helpers.tiny_tokenizers import byte_level

TOKENIZER = byte_level()
TASK = Generation(name="gen", max_length=40, max_target_length=8, max_new_tokens=10)
# Odd numbers leave a rank a filler, which generates too; a single row leaves one nothing else.
SIZES = (1, 5, 6)


def _scores(engine: Engine, folders: list[Path], *, synced: bool) -> list[Scores]:
    module: Any = engine.module
    world = World(
        rank=torch_dist.get_rank() if synced else 0,
        local_rank=0,
        world_size=torch_dist.get_world_size() if synced else 1,
    )

    def generate(batch: MicroBatch) -> list[str]:
        return TASK.generate(module.model, batch=replace(batch), tokenizer=TOKENIZER, synced=synced)

    return [
        evaluate_task(
            EvalData(
                task=TASK,
                split="validation",
                dataset=ShardedDataset(folder, verify="size"),
                spec=TASK.collate_spec(TOKENIZER, evaluation=True),
                micro_batch_size=2,
                generate=generate,
            ),
            forward=engine.eval_forward,
            world=world,
        )
        for folder in folders
    ]


def _engine(end: int | None, stage: int | None) -> Engine:
    config = tiny_config("llama")
    config.vocab_size = len(TOKENIZER)
    config.eos_token_id = end
    heads = [HeadSpec("gen", TASK.auto_class)]
    model = build_model(config, heads=heads, dtype=torch.float32, seed=0)
    groups = find_layer_groups(model)
    param_groups = build_param_groups(
        groups,
        dimensions={n: p.dim() for n, p in model.named_parameters()},
        rates=LearningRates(1e-3),
        weight_decay=0.0,
    )
    module = LossModule(model, {"gen": TASK.loss})
    if stage is None:
        return ReferenceEngine(module, param_groups=param_groups, options=EngineOptions())
    engine = DeepSpeedEngine(
        module,
        param_groups=param_groups,
        options=EngineOptions(),
        deepspeed_options=DeepSpeedOptions(
            zero_stage=stage, micro_batch_size=2, gradient_accumulation_steps=1
        ),
    )
    engine.set_trainable([g.name for g in groups])
    return engine


def _equal(folders: list[Path], end: int, expected: list[dict[str, float]]) -> None:
    for stage in (3, 0):
        found = [s.metrics for s in _scores(_engine(end, stage), folders, synced=True)]
        for one, other in zip(found, expected, strict=True):
            assert one.keys() == other.keys()
            for name, value in other.items():
                assert abs(one[name] - value) <= 1e-6 * max(1.0, abs(value)), (stage, name)


def test_generation_does_not_hang_and_scores_as_one_rank(tmp_path: Path) -> None:
    draw = random.Random(0)
    folders = []
    for number in SIZES:
        rows = [
            {"prompt": "w" * draw.randint(1, 25) + str(i), "response": "ada"[: draw.randint(1, 3)]}
            for i in range(number)
        ]
        (tmp_path / str(number)).mkdir()
        data = prepared(TASK, rows, tokenizer=TOKENIZER, folder=tmp_path / str(number))
        folders.append(data.folder)
    # A token that some texts come to early and others late or never ends them.
    plain: Any = _engine(None, None).module
    texts: list[list[int]] = []
    with torch.no_grad(), plain.model.task_model("gen") as model:
        for length in (3, 9, 14, 20):
            ids = TOKENIZER("w" * length + "1\n", return_tensors="pt")["input_ids"]
            texts.append(
                model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :].tolist()
            )
    places = {t: {x.index(t) if t in x else 10 for x in texts} for x in texts for t in x}
    end = max(places, key=lambda token: len(places[token]))
    assert len(places[end]) > 1
    expected = [s.metrics for s in _scores(_engine(end, None), folders, synced=False)]
    assert all({"bleu", "rouge_l", "perplexity"} <= scores.keys() for scores in expected)
    run_distributed(_equal, folders, end, expected)
