"""Conversations as a causal model's chat template writes them, with loss on what it must say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dist_ft.tasks.base import IGNORE_INDEX, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]


def messages_of(row: Row, column: str) -> list[Message]:
    """Returns the messages of a row, in the form that hub data sets have.

    Raises:
        ValueError: they are no list of role and content that ends with the assistant.
    """
    value = row.get(column)
    is_list = isinstance(value, list | tuple) and all(
        isinstance(m, Mapping)
        and isinstance(m.get("role"), str)
        and isinstance(m.get("content"), str)
        for m in value
    )
    if not is_list or not value or value[-1]["role"] != "assistant":
        raise ValueError(
            f"column {column!r} must hold a list of {{role, content}}, the last the assistant's, "
            f"got {value!r}"
        )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def check_template(tokenizer: PreTrainedTokenizerBase, *, task: str) -> None:
    """Checks that the tokenizer has a chat template.

    Raises:
        ValueError: it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"tasks.{task}.chat: the tokenizer has no chat template: use an instruction-tuned "
            "model, or prompt and response without chat"
        )


def encode_chat(
    messages: Sequence[Message], *, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Row:
    """Returns the feature of a conversation: every answer of the assistant is learned.

    The loss is on each answer with the marks that end it, not on the header before it, which is
    given when the model is asked. Of a conversation that is too long the beginning goes, because
    the last answer is what is scored.

    Args:
        messages: with roles, the last one the assistant's.
        tokenizer: with a chat template.
        max_length: most tokens of the feature.

    Raises:
        ValueError: the template writes the beginning of a conversation differently once it goes on.
    """
    whole = _tokens(tokenizer, messages)
    labels = [IGNORE_INDEX] * len(whole)
    prompt_length = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _tokens(tokenizer, messages[:index], asks=True)
        upto = _tokens(tokenizer, messages[: index + 1])
        if whole[: len(before)] != before or whole[: len(upto)] != upto:
            raise ValueError(
                "the chat template does not write a conversation as a beginning of a longer one, "
                "so the answers in it cannot be found; give only the last answer, as prompt and "
                "response"
            )
        labels[len(before) : len(upto)] = whole[len(before) : len(upto)]
        prompt_length = len(before)
    lost = max(0, len(whole) - max_length)
    # An answer longer than all there is loses its end, as one without a template does.
    first = min(lost, max(0, prompt_length - 1))
    ids, labels = whole[first : first + max_length], labels[first : first + max_length]
    return {
        "input_ids": ids,
        "labels": labels,
        "prompt_length": prompt_length - first,
        "loss_count": sum(label != IGNORE_INDEX for label in labels[1:]),
        "truncated_tokens": lost,
    }


def _tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, asks: bool = False
) -> list[int]:
    text: Any = tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=False, add_generation_prompt=asks
    )
    # The template writes the special tokens itself.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
