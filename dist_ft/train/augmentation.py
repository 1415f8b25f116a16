"""From a recipe's augmentation to what the loader does to the rows that it reads."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dist_ft.config import (
    CasingConfig,
    CharacterNoiseConfig,
    KeyboardTyposConfig,
    MentionReplacementConfig,
    PunctuationInsertionConfig,
    SentenceShufflingConfig,
    TaskConfig,
    TransformConfig,
    WordDropoutConfig,
    WordReplacementConfig,
)
from dist_ft.data.augment.augmenter import Augmenter, Transform
from dist_ft.data.augment.lexicon import (
    Lexicon,
    find_wordnet,
    packaged_misspellings,
    read_lexicon,
    read_wordnet,
)
from dist_ft.data.augment.mentions import MentionReplacement, collect_mentions
from dist_ft.data.augment.noise import (
    Casing,
    CharacterNoise,
    KeyboardTypos,
    PunctuationInsertion,
)
from dist_ft.data.augment.samples import (
    ContextFields,
    Fields,
    TaggedFields,
    TextFields,
    outside_of,
)
from dist_ft.data.augment.sentences import SentenceShuffling
from dist_ft.data.augment.words import WordDropout, WordReplacement
from dist_ft.data.augmented import Augmentation
from dist_ft.data.files import Row
from dist_ft.data.schema import RAW_COLUMN
from dist_ft.data.shards import ShardedDataset
from dist_ft.tasks import TokenClassification
from dist_ft.tasks.base import Task
from dist_ft.tasks.labels import known_labels, label_index

_ROWS_AT_ONCE = 4096


def make_augmentation(
    config: TaskConfig,
    *,
    task: Task,
    dataset: ShardedDataset,
    tokenizer: PreTrainedTokenizerBase,
    variants: int | None = None,
) -> Augmentation | None:
    """Return how the rows of a task are augmented; None if they are not.

    Args:
        config: The task in the recipe.
        task: The task, knowing its labels.
        dataset: Its training data, prepared with their raw rows.
        tokenizer: The model's tokenizer.
        variants: Epochs after which the augmentation repeats; None never repeats it.

    Raises:
        ValueError: If a word list is not readable.
        RuntimeError: If a word list, or what segments Chinese, is not installed.
    """
    if not config.augmentation:
        return None
    # Rows are encoded in the prefetch thread: a fast tokenizer that the training thread uses at
    # the same time, to decode generated text, would fail with "Already borrowed".
    own = copy.deepcopy(tokenizer)
    return Augmentation(
        make_augmenter(config.augmentation, config=config, task=task, dataset=dataset),
        encode=lambda rows: task.encode(rows, tokenizer=own),
        variants=variants,
    )


def make_augmenter(
    transforms: Sequence[TransformConfig],
    *,
    config: TaskConfig,
    task: Task,
    dataset: ShardedDataset,
) -> Augmenter:
    """Return what changes the raw rows of a task.

    Args:
        transforms: In this order.
        config: The task in the recipe.
        task: The task, knowing its labels.
        dataset: Its training data, where mentions of entities are taken from.
    """
    fields = _fields(config, task=task)
    return Augmenter(
        [make_transform(t, config=config, fields=fields, dataset=dataset) for t in transforms],
        fields=fields,
        segmentation=config.segmentation,
    )


def _fields(config: TaskConfig, *, task: Task) -> Fields:
    """Return what of a raw row may be changed: never a label, nor the text to be generated.

    Raises:
        ValueError: If the task is not of text.
    """
    if config.type == "text_classification":
        return TextFields(tuple(c for c in (config.text, config.text_pair) if c is not None))
    if config.type == "token_classification":
        fields = TaggedFields(config.tokens, config.tags, outside=None)
        if isinstance(task, TokenClassification):
            labels = known_labels(task.labels, task=task.name)
            name = functools.partial(tag_name, labels=labels, task=task.name)
            fields = replace(fields, outside=outside_of(labels), name=name)
        return fields
    if config.type == "question_answering":
        return ContextFields(config.question, config.context, config.answers)
    if config.type == "generation":
        return TextFields((config.prompt,))
    raise ValueError(
        f"tasks.{config.name}.augmentation: transforms are of text, not of {config.takes}"
    )


def tag_name(tag: Any, *, labels: Sequence[str], task: str) -> Any:
    """Return the label that a raw tag stands for, such as its number; an unknown one as it is."""
    try:
        return labels[label_index(tag, labels=labels, task=task)]
    except ValueError:  # to encode the row will say so
        return tag


def make_transform(
    transform: TransformConfig, *, config: TaskConfig, fields: Fields, dataset: ShardedDataset
) -> Transform:
    """Return a transform of the recipe.

    Args:
        transform: The transform in the recipe.
        config: The task that it belongs to.
        fields: What of a row may be changed.
        dataset: The task's training data, where mentions of entities are taken from.
    """
    chance = transform.probability
    if isinstance(transform, SentenceShufflingConfig):
        return SentenceShuffling(chance)
    if isinstance(transform, WordReplacementConfig):
        return WordReplacement(read_words(transform.lexicon), transform.share, chance)
    if isinstance(transform, WordDropoutConfig):
        return WordDropout(transform.share, chance, transform.placeholder)
    if not isinstance(transform, MentionReplacementConfig):
        return _noise(transform, chance=chance)
    assert config.type == "token_classification", "load_recipe refuses it for other tasks"
    assert isinstance(fields, TaggedFields)
    table = collect_mentions(
        (row[config.tokens], [str(fields.name(tag)) for tag in row[config.tags]])
        for row in raw_rows(dataset)
    )
    return MentionReplacement(table, transform.share, chance)


def _noise(
    transform: KeyboardTyposConfig
    | CharacterNoiseConfig
    | CasingConfig
    | PunctuationInsertionConfig,
    *,
    chance: float,
) -> Transform:
    match transform:
        case KeyboardTyposConfig():
            return KeyboardTypos(transform.share, chance)
        case CharacterNoiseConfig():
            return CharacterNoise(transform.share, chance)
        case CasingConfig():
            return Casing(transform.share, chance)
        case PunctuationInsertionConfig():
            return PunctuationInsertion(transform.share, chance)


def read_words(lexicon: str) -> Lexicon:
    """Return a lexicon by its packaged name, WordNet's folder or its file.

    Raises:
        ValueError: If a file is missing or not in its format.
        RuntimeError: If a packaged lexicon is not installed.
    """
    if lexicon == "package:misspellings":
        return packaged_misspellings()
    if lexicon == "package:wordnet":
        return read_wordnet(find_wordnet())
    path = Path(lexicon)
    return read_wordnet(path) if path.is_dir() else read_lexicon(path)


def raw_rows(dataset: ShardedDataset, rows: Sequence[int] | None = None) -> Iterator[Row]:
    """Yield the raw rows kept with the features, all by default; windows repeat theirs."""
    wanted = np.arange(len(dataset)) if rows is None else np.asarray(rows, dtype=np.int64)
    for start in range(0, len(wanted), _ROWS_AT_ONCE):
        part = dataset.take(wanted[start : start + _ROWS_AT_ONCE], columns={RAW_COLUMN})
        yield from (json.loads(str(text)) for text in part[RAW_COLUMN])
