import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from dist_ft.data.loader import MicroBatch
from dist_ft.model.backbone import HeadSpec, MultiTaskModel, build_model
from dist_ft.tasks.generation import Generation
from tests.helpers.batches import batches, numbered, prepared, records
from tests.helpers.tiny_models import tiny_config
from tests.helpers.tiny_tokenizers import byte_level, wordpiece

TOKENIZER = byte_level()
CAUSAL = Generation(name="gen", max_length=24, max_target_length=10)
ROWS = [
    {"prompt": "who wrote it", "response": "ada"},
    {"prompt": "where", "response": "in London"},
    {"prompt": "did it", "response": "x"},
]


def text(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids))


def test_prompt_and_separator_have_no_loss() -> None:
    feature = CAUSAL.encode(numbered(ROWS), tokenizer=TOKENIZER)[0]
    assert text(feature["input_ids"]) == "who wrote it\nada<eos>"
    assert text([label for label in feature["labels"] if label >= 0]) == "ada<eos>"
    assert feature["labels"][: feature["prompt_length"]] == [-100] * 13
    assert feature["loss_count"] == 4


def test_a_context_is_part_of_the_prompt_where_a_row_has_one() -> None:
    task = Generation(name="gen", prompt="q", context="more", max_length=40, max_target_length=10)
    with_it = {"q": "sum up", "more": "a text", "response": "b"}
    rows = numbered([with_it, with_it | {"more": ""}, {"q": "sum up", "response": "b"}])
    features = task.encode(rows, tokenizer=TOKENIZER)
    assert text(features[0]["input_ids"]) == "sum up\n\na text\nb<eos>"
    assert [text(f["input_ids"]) for f in features[1:]] == ["sum up\nb<eos>"] * 2
    assert text([label for label in features[0]["labels"] if label >= 0]) == "b<eos>"
    # Other contexts are other questions: they are no duplicates, and may part at a split.
    assert task.dedupe_key(rows[0]) != task.dedupe_key(rows[1]) == task.dedupe_key(rows[2])
    assert task.split_key(rows[0]) == "sum up\n\na text"
    assert task.required_columns == ("q", "response")


def test_long_texts_keep_the_beginning_and_the_end_token() -> None:
    row = {"prompt": "p" * 50, "response": "r" * 50}
    feature = CAUSAL.encode(numbered([row]), tokenizer=TOKENIZER)[0]
    assert text(feature["input_ids"]) == "p" * 13 + "\n" + "r" * 9 + "<eos>"
    assert len(feature["input_ids"]) == CAUSAL.max_length
    assert feature["truncated_tokens"] == 37 + 41


def test_loss_count_leaves_out_a_first_token_that_nothing_predicts() -> None:
    task = Generation(name="gen", separator="")
    feature = task.encode(numbered([{"prompt": "", "response": "ab"}]), tokenizer=TOKENIZER)[0]
    assert (feature["prompt_length"], feature["loss_count"]) == (0, 2)


def test_causal_loss_is_shifted() -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.bfloat16)
    labels = torch.tensor([[-100, -100, 3, 4, 1], [-100, 2, 1, -100, -100]])
    loss = CAUSAL.loss({"logits": logits}, {"labels": labels})
    assert (loss.count, loss.sum.dtype) == (5, torch.float32)
    flat = logits[:, :-1].float().flatten(0, 1)
    mean = cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss.sum / 5, mean)


def model_for(task: Generation, name: str, tokenizer: Any) -> MultiTaskModel:
    config = tiny_config(name)
    config.vocab_size = len(tokenizer)
    heads = [HeadSpec(task.name, task.auto_class, task.config_updates())]
    return build_model(config, heads=heads, dtype=torch.float32, seed=0)


def test_perplexity_is_that_of_the_loss(tmp_path: Path) -> None:
    model = model_for(CAUSAL, "llama", TOKENIZER)
    data = prepared(CAUSAL, ROWS, tokenizer=TOKENIZER, folder=tmp_path)

    @torch.no_grad()
    def forward(batch: MicroBatch) -> Any:
        return model("gen", batch.inputs)

    one = records(CAUSAL, data, forward=forward, tokenizer=TOKENIZER, world_size=1)
    two = records(CAUSAL, data, forward=forward, tokenizer=TOKENIZER, world_size=2)
    assert one == two
    scores = CAUSAL.new_metrics().compute(one)
    total, count = 0.0, 0
    for batch in batches(CAUSAL, data, tokenizer=TOKENIZER):
        loss = CAUSAL.loss(forward(batch), batch.targets)
        total, count = total + float(loss.sum), count + int(loss.count)
    assert count == data.loss_counts.sum()
    assert scores["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert scores["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_sequence_to_sequence_trains_on_the_response(tmp_path: Path, name: str) -> None:
    tokenizer = wordpiece()
    task = Generation(name="gen", style="seq2seq", max_length=16, max_target_length=12)
    data = prepared(task, ROWS, tokenizer=tokenizer, folder=tmp_path)
    (batch,) = batches(task, data, tokenizer=tokenizer, size=3)
    first = [token for token in batch.targets["labels"][0].tolist() if token != -100]
    assert tokenizer.decode(first) == "[CLS] in london [SEP]"
    model = model_for(task, name, tokenizer)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses: list[float] = []
    for _ in range(60):
        loss = task.loss(model("gen", batch.inputs), batch.targets)
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.sum.detach() / loss.count))
        assert loss.count == data.loss_counts.sum()
    assert losses[-1] < 0.5 * losses[0]


def test_generated_texts_are_those_of_each_row_alone(tmp_path: Path) -> None:
    task = Generation(name="gen", max_length=24, max_target_length=10, max_new_tokens=6)
    model = model_for(task, "llama", TOKENIZER)
    data = prepared(task, ROWS, tokenizer=TOKENIZER, folder=tmp_path)
    together: dict[int, str] = {}
    alone: dict[int, str] = {}
    for size, found in ((3, together), (1, alone)):
        for batch in batches(task, data, tokenizer=TOKENIZER, size=size):
            texts = task.generate(model, batch=batch, tokenizer=TOKENIZER, synced=False)
            found |= dict(zip(batch.rows.tolist(), texts, strict=True))
    assert together == alone
    assert len(together) == 3


def test_generated_texts_are_scored(tmp_path: Path) -> None:
    task = Generation(name="gen", max_length=24, max_target_length=12, max_new_tokens=6)
    assert task.generates
    assert not CAUSAL.generates
    data = prepared(task, ROWS, tokenizer=TOKENIZER, folder=tmp_path)
    metrics = task.new_metrics()
    answers = {"ada": "Ada", "in London": "London", "x": "y"}
    for batch in batches(task, data, tokenizer=TOKENIZER):
        logits = torch.zeros(*batch.inputs["input_ids"].shape, len(TOKENIZER))
        texts = [answers[response] for response in batch.kept["response"]]
        metrics.update({"logits": logits}, batch, texts=texts)
    scores = metrics.compute(metrics.records())
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["rouge_l"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert scores["perplexity"] == pytest.approx(len(TOKENIZER))


def test_metrics_of_texts_need_generation() -> None:
    with pytest.raises(ValueError, match="'rouge_l' is not one of perplexity"):
        Generation(name="gen", metric="rouge_l")
    task = Generation(name="gen", metric="rouge_l", max_new_tokens=5)
    assert task.primary_metric == ("rouge_l", True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"style": "diffusion"}, "is not one of causal, seq2seq"),
        ({"max_length": 10, "max_target_length": 10}, "leaves no room"),
        ({"messages": "turns", "context": "more"}, "conversations have no prompt"),
    ],
)
def test_impossible_settings_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generation(name="gen", **settings)


def test_a_separator_that_leaves_no_room_for_the_prompt_is_an_error() -> None:
    task = Generation(name="gen", max_length=12, max_target_length=10, separator="the cat sat")
    with pytest.raises(ValueError, match=r"tasks\.gen\.max_length: 12 must be at least 22"):
        task.check_tokenizer(TOKENIZER)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(6, 12))
def test_no_row_is_longer_than_allowed(prompt: int, response: int, longest: int) -> None:
    task = Generation(name="gen", max_length=longest + 2, max_target_length=longest, separator="\n")
    rows = numbered([{"prompt": "the cat " * prompt, "response": "sat on " * response}])
    separator = len(TOKENIZER("\n", add_special_tokens=False)["input_ids"])
    assume(longest + separator < task.max_length)
    (feature,) = task.encode(rows, tokenizer=TOKENIZER)
    assert len(feature["input_ids"]) == len(feature["labels"]) <= task.max_length
    assert feature["truncated_tokens"] >= 0


def test_tokenizer_without_end_token_is_an_error() -> None:
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        CAUSAL.check_tokenizer(tokenizer)
