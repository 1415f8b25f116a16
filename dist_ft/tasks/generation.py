"""Text generation: a causal language model with masked prompt, or sequence to sequence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import pyarrow as pa
import torch
from torch import Tensor

import dist_ft.tasks.text_metrics as text_metrics
from dist_ft.data.collate import CollateSpec
from dist_ft.tasks.base import (
    IGNORE_INDEX,
    Choice,
    LossSum,
    Record,
    RecordMetrics,
    Row,
    check_max_length,
    choose_metric,
    input_padding,
    labelled,
    text_of,
    token_losses,
)
from dist_ft.tasks.chat import Message, check_template, encode_chat, messages_of
from dist_ft.tasks.end_tokens import end_token, stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dist_ft.data.loader import MicroBatch

_LOSS_METRICS = {"perplexity": False, "loss": False, "token_accuracy": True}
_TEXT_METRICS = dict.fromkeys(text_metrics.NAMES, True)
_CLASSES = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}


@dataclass(frozen=True)
class Generation:
    """The task type ``generation``.

    Attributes:
        name: name in the recipe.
        style: ``causal``: the model continues the prompt; ``seq2seq``: it encodes it.
        prompt: column of the prompt, without loss.
        context: column of more to read, put behind the prompt in the rows that have some.
        response: column of the text to learn; an end token is added.
        separator: text between prompt and response of a causal model.
        chat: prompt and response are a turn each in the tokenizer's chat template (causal only).
        messages: column of whole conversations (lists of role and content) in the place of prompt
            and response; every answer of the assistant is learned.
        max_length: longest feature in tokens (causal: prompt and response together). Of a prompt
            that is too long the beginning is kept.
        max_target_length: longest response in tokens.
        max_new_tokens: longest text to generate in evaluation; 0 generates none.
        metric: primary metric.
    """

    name: str
    style: Literal["causal", "seq2seq"] = "causal"
    prompt: str = "prompt"
    context: str | None = None
    response: str = "response"
    separator: str = "\n"
    chat: bool = False
    messages: str | None = None
    max_length: int = 128
    max_target_length: int = 64
    max_new_tokens: int = 0
    metric: str | None = None

    type = "generation"
    needs_scan = False

    def __post_init__(self) -> None:
        if self.style not in _CLASSES:
            raise ValueError(
                f"tasks.{self.name}.style: {self.style!r} is not one of {', '.join(_CLASSES)}"
            )
        if self._is_chat and self.style != "causal":
            raise ValueError(
                f"tasks.{self.name}.chat: a chat template needs style causal, got {self.style}: "
                "change one of them"
            )
        if self.messages is not None and self.context is not None:
            raise ValueError(
                f"tasks.{self.name}.context: conversations have no prompt to put it behind, got "
                f"{self.context!r} beside messages: remove one of them"
            )
        if self.style == "causal" and self.max_target_length >= self.max_length:
            raise ValueError(
                f"tasks.{self.name}.max_target_length: {self.max_target_length} leaves no room for "
                f"the prompt in max_length {self.max_length}; lower it or raise max_length"
            )
        _ = self.primary_metric

    @property
    def auto_class(self) -> str:
        """The transformers auto class whose head and export format the task uses."""
        return _CLASSES[self.style]

    @property
    def generates(self) -> bool:
        """Whether evaluation generates text."""
        return self.max_new_tokens > 0

    @property
    def _is_chat(self) -> bool:
        return self.chat or self.messages is not None

    def _messages(self, row: Row) -> list[Message]:
        if self.messages is not None:
            return messages_of(row, self.messages)
        asked, said = self._prompt(row), text_of(row, self.response)
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]

    def _prompt(self, row: Row) -> str:
        prompt = text_of(row, self.prompt)
        if self.context is None or not row.get(self.context):
            return prompt
        return f"{prompt}\n\n{text_of(row, self.context)}"

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Columns of the raw rows that must have a value."""
        return (self.prompt, self.response) if self.messages is None else (self.messages,)

    @property
    def primary_metric(self) -> tuple[str, bool]:
        """Name of the metric that decides, and whether more is better."""
        known = _LOSS_METRICS | (_TEXT_METRICS if self.generates else {})
        return choose_metric(self.metric, task=self.name, known=known)

    def scan(self, rows: Iterable[Row]) -> dict[str, Any]:
        """Returns nothing: there are no labels to find."""
        del rows
        return {}

    def with_state(self, state: Mapping[str, Any]) -> Self:
        """Returns the task."""
        del state
        return self

    def config_updates(self) -> dict[str, Any]:
        """Returns the configuration values of the head: none."""
        return {}

    def schema(self) -> pa.Schema:
        """Returns the task's columns, without the base columns."""
        return pa.schema(
            [
                pa.field("labels", pa.list_(pa.int32())),
                pa.field("prompt_length", pa.int32()),
                pa.field("response", pa.string()),
            ]
        )

    def split_key(self, row: Row) -> str:
        """Returns the prompt: its responses stay together."""
        if self.messages is not None:
            return str(self._messages(row)[:-1])
        return self._prompt(row).strip()

    def dedupe_key(self, row: Row) -> str:
        """Returns prompt and response."""
        if self.messages is not None:
            return str(self._messages(row))
        return f"{self.split_key(row)}\x1f{text_of(row, self.response).strip()}"

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Checks that the settings and the tokenizer fit.

        Raises:
            ValueError: the model has fewer positions, response and separator leave no room for a
                prompt, or the tokenizer has no end token or, if it is needed, no chat template.
            RuntimeError: the package of a metric is not installed.
        """
        check_max_length(self.max_length, task=self.name, tokenizer=tokenizer)
        if self.style == "causal" and not self._is_chat:  # of the prompt, one token at least
            taken = tokenizer(self.separator, add_special_tokens=False)["input_ids"]
            least = self.max_target_length + len(taken) + 1
            check_max_length(self.max_length, task=self.name, tokenizer=tokenizer, least=least)
        if self._is_chat:
            check_template(tokenizer, task=self.name)
        if self.generates:
            text_metrics.check_installed(task=self.name)
        end_token(tokenizer, task=self.name)

    def encode(self, rows: list[Row], *, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        """Returns one feature per raw row.

        Raises:
            ValueError: a text is none, or the tokenizer has no end token.
        """
        self.check_tokenizer(tokenizer)
        return [
            {**feature, "source_row": row["source_row"]}
            for row, feature in zip(rows, self._features(rows, tokenizer=tokenizer), strict=True)
        ]

    def _features(self, rows: list[Row], *, tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
        for row in rows:
            if self._is_chat:
                messages = self._messages(row)
                feature = encode_chat(messages, tokenizer=tokenizer, max_length=self.max_length)
                yield {**feature, "response": messages[-1]["content"]}
                continue
            prompt, response = self._prompt(row), text_of(row, self.response)
            encode = self._encode_causal if self.style == "causal" else self._encode_pair
            yield {**encode(prompt, response, tokenizer=tokenizer), "response": response}

    def collate_spec(self, tokenizer: PreTrainedTokenizerBase, *, evaluation: bool) -> CollateSpec:
        """Returns the columns of a micro-batch and their padding."""
        inputs = ("input_ids", "attention_mask")
        return CollateSpec(
            ragged={"input_ids": input_padding(tokenizer)["input_ids"], "labels": IGNORE_INDEX},
            # the model makes the decoder's inputs of a sequence-to-sequence task's labels
            inputs=inputs if self.style == "causal" else (*inputs, "labels"),
            targets=("labels",),
            kept=("prompt_length", "response") if evaluation else (),
        )

    def loss(self, outputs: Any, targets: Mapping[str, Tensor]) -> LossSum:
        """Returns the cross-entropy summed over response tokens, computed in float32.

        Args:
            outputs: ``logits`` [rows, tokens, vocabulary].
            targets: ``labels`` int64 [rows, tokens], -100 for none; those of a causal model are
                beside their own tokens and shifted here.
        """
        logits, labels = self._aligned(outputs, targets)
        losses = token_losses(logits, labels)
        return LossSum(losses.sum(), (labels != IGNORE_INDEX).sum())

    def logit_labels(self, targets: Mapping[str, Tensor]) -> Tensor:
        """Returns the token that each place of the logits predicts, int64 [rows, tokens].

        With it the loss can be computed where the logits are made, as ``loss`` computes it of them.
        """
        labels = targets["labels"]
        if self.style == "seq2seq":
            return labels
        return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)

    def choices(self, outputs: Any, targets: Mapping[str, Tensor]) -> list[Choice]:
        """Returns the choices that the loss scores."""
        return [labelled(*self._aligned(outputs, targets))]

    def new_metrics(self) -> RecordMetrics:
        """Returns empty metrics."""
        return RecordMetrics(decode=self._decode, score=self._score)

    def generate(
        self, model: Any, *, batch: MicroBatch, tokenizer: PreTrainedTokenizerBase, synced: bool
    ) -> list[str]:
        """Returns one greedily generated text per row.

        Args:
            model: the ``MultiTaskModel``.
            batch: a micro-batch of evaluation.
            tokenizer: the model's tokenizer.
            synced: whether ranks must run the same number of forwards (partitioned weights).
        """
        inputs = {key: batch.inputs[key] for key in ("input_ids", "attention_mask")}
        if self.style == "causal":
            inputs = _left_padded_prompts(
                inputs["input_ids"], lengths=batch.kept["prompt_length"], tokenizer=tokenizer
            )
        with torch.no_grad(), model.task_model(self.name) as task_model:
            generated = task_model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=stop_tokens(
                    tokenizer,
                    task=self.name,
                    chat=self._is_chat,
                    known=task_model.generation_config.eos_token_id,
                ),
                synced_gpus=synced,
            )
        if self.style == "causal":
            generated = generated[:, inputs["input_ids"].shape[1] :]
        return tokenizer.batch_decode(generated, skip_special_tokens=True)

    def _encode_causal(
        self, prompt: str, response: str, *, tokenizer: PreTrainedTokenizerBase
    ) -> Row:
        target, lost = self._target(response, tokenizer=tokenizer)
        separator = tokenizer(self.separator, add_special_tokens=False)["input_ids"]
        tokens = tokenizer(prompt, verbose=False)["input_ids"]
        if tokens and tokens[-1] == tokenizer.eos_token_id and len(tokens) > 1:
            tokens = tokens[:-1]  # some tokenizers end every text
        room = self.max_length - len(target) - len(separator)
        lost += max(0, len(tokens) - room)
        context = [*tokens[:room], *separator]
        labels = [IGNORE_INDEX] * len(context) + target
        return {
            "input_ids": [*context, *target],
            "labels": labels,
            "prompt_length": len(context),
            "loss_count": sum(label != IGNORE_INDEX for label in labels[1:]),
            "truncated_tokens": lost,
        }

    def _encode_pair(
        self, prompt: str, response: str, *, tokenizer: PreTrainedTokenizerBase
    ) -> Row:
        target, lost = self._target(response, tokenizer=tokenizer)
        full = tokenizer(prompt, verbose=False)["input_ids"]
        tokens = tokenizer(prompt, truncation=True, max_length=self.max_length)["input_ids"]
        return {
            "input_ids": tokens,
            "labels": target,
            "prompt_length": len(tokens),
            "loss_count": len(target),
            "truncated_tokens": lost + len(full) - len(tokens),
        }

    def _target(
        self, response: str, *, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[int], int]:
        """The tokens to learn and how many were cut off."""
        end = end_token(tokenizer, task=self.name)
        if self.style == "seq2seq":
            tokens = tokenizer(text_target=response, verbose=False)["input_ids"]
        else:
            tokens = tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
        body, tail = tokens, [end]
        if end in tokens[-2:]:  # the tokenizer ends texts itself, mBART's with a language token
            last = len(tokens) - 1 - tokens[::-1].index(end)
            body, tail = tokens[:last], tokens[last:]
        kept = body[: self.max_target_length - len(tail)]
        return [*kept, *tail], len(body) - len(kept)

    def _aligned(self, outputs: Any, targets: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = outputs["logits"]
        labels = targets["labels"].to(logits.device)  # those of an evaluation stay on the host
        return (logits[:, :-1], labels[:, 1:]) if self.style == "causal" else (logits, labels)

    def _decode(self, outputs: Any, batch: MicroBatch, texts: Sequence[str] | None) -> list[Record]:
        logits, labels = self._aligned(outputs, batch.targets)
        records: list[Record] = []
        for index in range(len(labels)):
            losses = token_losses(logits[index], labels[index])
            right = (logits[index].argmax(-1) == labels[index]).sum()
            record: Record = {
                "loss": float(losses.double().sum()),
                "tokens": losses.numel(),
                "right": int(right),
            }
            if texts is not None:
                wanted = batch.kept["response"][index]
                record |= {"text": texts[index], "response": wanted}
                record |= text_metrics.statistics(texts[index], wanted)
            records.append(record)
        return records

    def _score(self, records: Sequence[Record]) -> dict[str, float]:
        tokens = sum(record["tokens"] for record in records)
        loss = math.fsum(record["loss"] for record in records) / max(tokens, 1)
        scores = {
            "perplexity": math.exp(min(loss, 700.0)),
            "loss": loss,
            "token_accuracy": sum(record["right"] for record in records) / max(tokens, 1),
        }
        generated = [r for r in records if "text" in r]
        return scores | (text_metrics.scores(generated) if generated else {})


def _left_padded_prompts(
    input_ids: Tensor, *, lengths: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """The prompts of right-padded features, padded on the left: text continues on the right."""
    width = max(lengths)
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    prompts = input_ids.new_full((len(lengths), width), pad)
    mask = torch.zeros_like(prompts)
    for index, length in enumerate(lengths):
        prompts[index, width - length :] = input_ids[index, :length]
        mask[index, width - length :] = 1
    return {"input_ids": prompts, "attention_mask": mask}
