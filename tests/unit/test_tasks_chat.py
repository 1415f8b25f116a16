"""Conversations: loss on every answer of the assistant and on nothing else."""

from typing import Any

import pytest

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
