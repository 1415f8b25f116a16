"""Tokens that end what a model generates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for an answer; no template writes it.
_ANSWER = "\u2042"


def end_token(tokenizer: PreTrainedTokenizerBase, *, task: str) -> int:
    """Returns the token that ends a text: eos, or sep for BERT-like tokenizers.

    Raises:
        ValueError: there is none.
    """
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if isinstance(token, int):
            return token
    raise ValueError(
        f"tasks.{task}: the tokenizer has no end token (eos), so a model cannot learn where a "
        "response ends; use another model"
    )


def stop_tokens(
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str,
    chat: bool,
    known: int | Sequence[int] | None,
) -> list[int]:
    """Returns the tokens at which generation ends: the model's own and those that were learned.

    Args:
        tokenizer: the model's tokenizer.
        task: name of the task.
        chat: whether responses end as the chat template ends them.
        known: what the model's generation configuration has.

    Raises:
        ValueError: the tokenizer has no end token.
    """
    given = [known] if isinstance(known, int) else list(known or ())
    learned = turn_end(tokenizer) if chat else None
    ends = {*given, end_token(tokenizer, task=task)}
    return sorted(ends if learned is None else {*ends, learned})


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the mark that a chat template writes after an answer, None if it writes none."""
    text: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}],
        tokenize=False,
    )
    after = tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False, verbose=False)
    added = {n for n, t in tokenizer.added_tokens_decoder.items() if t.special}
    marks = added | set(tokenizer.all_special_ids)
    return next((token for token in after["input_ids"] if token in marks), None)
