"""Conversations: loss on every answer of the assistant and on nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from dist_ft.tasks.end_tokens import stop_tokens, turn_end
from dist_ft.tasks.generation import Generation
from tests.helpers.tiny_tokenizers import byte_level

# Each turn is "<role>:" and its text and an end mark; asked for an answer, the header stands open.
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TALK = [
    {"role": "user", "content": "who"},
    {"role": "assistant", "content": "Ada"},
    {"role": "user", "content": "sure"},
    {"role": "assistant", "content": "yes"},
]


def _tokenizer(template: str | None = TEMPLATE) -> Any:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    return tokenizer


def _learned(feature: dict[str, Any], tokenizer: Any) -> str:
    assert len(feature["labels"]) == len(feature["input_ids"])
    pairs = zip(feature["input_ids"], feature["labels"], strict=True)
    return tokenizer.decode([i for i, label in pairs if label == i])


def test_every_answer_with_its_end_is_learned() -> None:
    tokenizer = _tokenizer()
    task = Generation(name="g", messages="talk", max_length=128)
    [feature] = task.encode([{"talk": TALK, "source_row": 3}], tokenizer=tokenizer)
    end = tokenizer.eos_token
    assert tokenizer.decode(feature["input_ids"]) == f"u:who{end}a:Ada{end}u:sure{end}a:yes{end}"
    assert _learned(feature, tokenizer) == f"Ada{end}yes{end}"
    prompt = feature["input_ids"][: feature["prompt_length"]]
    assert tokenizer.decode(prompt) == f"u:who{end}a:Ada{end}u:sure{end}a:"
    assert feature["response"] == "yes"
    assert feature["source_row"] == 3
    assert feature["loss_count"] == sum(label != -100 for label in feature["labels"])


def test_prompt_and_response_are_a_turn_each() -> None:
    tokenizer = _tokenizer()
    task = Generation(name="g", chat=True, max_length=128)
    row = {"prompt": "who", "response": "Ada", "source_row": 0}
    [feature] = task.encode([row], tokenizer=tokenizer)
    assert _learned(feature, tokenizer) == f"Ada{tokenizer.eos_token}"


def test_a_conversation_that_is_too_long_loses_its_beginning() -> None:
    tokenizer = _tokenizer()
    whole = Generation(name="g", messages="talk", max_length=128)
    short = Generation(name="g", messages="talk", max_length=16, max_target_length=8)
    row = {"talk": TALK, "source_row": 0}
    [full], [cut] = (t.encode([row], tokenizer=tokenizer) for t in (whole, short))
    assert cut["input_ids"] == full["input_ids"][-16:]
    assert cut["labels"] == full["labels"][-16:]
    assert cut["truncated_tokens"] == len(full["input_ids"]) - 16


def test_what_cannot_be_a_conversation_is_refused() -> None:
    task = Generation(name="g", messages="talk", max_length=128)
    with pytest.raises(ValueError, match="no chat template"):
        task.encode([{"talk": TALK, "source_row": 0}], tokenizer=_tokenizer(None))
    with pytest.raises(ValueError, match="the last the assistant"):
        task.encode([{"talk": TALK[:3], "source_row": 0}], tokenizer=_tokenizer())
    reversing = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="does not write a conversation as a beginning"):
        task.encode([{"talk": TALK, "source_row": 0}], tokenizer=_tokenizer(reversing))
    with pytest.raises(ValueError, match="needs style causal"):
        Generation(name="g", chat=True, style="seq2seq")


def test_generation_ends_where_answers_were_taught_to_end() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    tokenizer = _tokenizer(template)
    marks = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    tokenizer.add_special_tokens(marks)
    eos, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_end(tokenizer) == end
    assert stop_tokens(tokenizer, task="g", chat=True, known=[7]) == sorted({7, eos, end})
    assert stop_tokens(tokenizer, task="g", chat=False, known=None) == [eos]
    assert turn_end(_tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}")) is None


def test_a_model_is_told_where_to_end_if_its_checkpoint_does_not_say() -> None:
    asked: dict[str, Any] = {}

    class Silent:
        generation_config = GenerationConfig()

        def generate(self, **options: Any) -> torch.Tensor:
            asked.update(options)
            return options["input_ids"]

    class Model:
        @contextmanager
        def task_model(self, task: str) -> Iterator[Silent]:
            assert task == "g"
            yield Silent()

    tokenizer = _tokenizer()
    batch: Any = SimpleNamespace(
        inputs={"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 3).long()},
        kept={"prompt_length": [2]},
    )
    task = Generation(name="g", max_new_tokens=2)
    assert task.generate(Model(), batch=batch, tokenizer=tokenizer, synced=False) == [""]
    assert asked["eos_token_id"] == [tokenizer.eos_token_id]
