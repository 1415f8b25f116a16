"""The recipe's sections about data: sources, augmentation, and which task each step trains."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dist_ft.config_base import Fraction, Positive, Section

# Shares and chances: 0 and 1 are allowed.
Share = Annotated[float, Field(ge=0, le=1)]


class SourceConfig(Section):
    """Raw data: a packaged set, files, or a hub data set."""

    path: str
    format: Literal["csv", "json", "jsonl", "parquet", "arrow"] | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None


def _parse_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


SourceField = Annotated[SourceConfig, BeforeValidator(_parse_source)]


def _parse_split(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


SplitField = Annotated[Fraction | SourceConfig, BeforeValidator(_parse_split)]


class DataConfig(Section):
    """Splits of a task: a source for each, or a fraction that is taken out of train by hash."""

    train: SourceField
    validation: SplitField = 0.1
    test: SplitField | None = None


class TransformBase(Section):
    """What every transform has: the chance of a row to be worked on."""

    probability: Share = 1.0


class WordReplacementConfig(TransformBase):
    """Words get another word of a lexicon.

    Attributes:
        lexicon: ``package:misspellings``, ``package:wordnet`` (the installed one), a folder of
            WordNet's files, or a file of synonyms in the format of Solr.
        share: Of the listed words to be replaced.
    """

    type: Literal["word_replacement"]
    lexicon: str
    share: Share = 0.1


class SentenceShufflingConfig(TransformBase):
    """Sentences change places."""

    type: Literal["sentence_shuffling"]


class KeyboardTyposConfig(TransformBase):
    """A letter becomes one beside it on the keyboard."""

    type: Literal["keyboard_typos"]
    share: Share = 0.05


class CharacterNoiseConfig(TransformBase):
    """Two neighbouring characters of a word change places, or one is lost."""

    type: Literal["character_noise"]
    share: Share = 0.05


class CasingConfig(TransformBase):
    """Words are written in lower case, in capitals, or with a capital."""

    type: Literal["casing"]
    share: Share = 0.1


class PunctuationInsertionConfig(TransformBase):
    """Marks are put before words (AEDA); `share` limits them."""

    type: Literal["punctuation_insertion"]
    share: Share = 1 / 3


class WordDropoutConfig(TransformBase):
    """Words are left out, or replaced by a placeholder."""

    type: Literal["word_dropout"]
    share: Share = 0.1
    placeholder: str | None = None


class MentionReplacementConfig(TransformBase):
    """Entities get another mention of their type, from the training rows."""

    type: Literal["mention_replacement"]
    share: Share = 0.3


# The first has no required key: it stands in for an unknown one while the rest is checked.
TransformConfig = Annotated[
    SentenceShufflingConfig
    | WordReplacementConfig
    | KeyboardTyposConfig
    | CharacterNoiseConfig
    | CasingConfig
    | PunctuationInsertionConfig
    | WordDropoutConfig
    | MentionReplacementConfig,
    Field(discriminator="type"),
]


class MixtureBase(Section):
    """What every mixture has: how many of its turns make up an optimizer step."""

    tasks_per_step: Positive = 1


class RoundRobinMixture(MixtureBase):
    """The tasks take turns."""

    policy: Literal["round_robin"] = "round_robin"


class ProportionalMixture(MixtureBase):
    """Shares in proportion to the rows, of which at most `cap` count."""

    policy: Literal["examples_proportional"]
    cap: Positive | None = None


class TemperatureMixture(MixtureBase):
    """Shares in proportion to rows ** (1 / temperature)."""

    policy: Literal["temperature"]
    temperature: Annotated[float, Field(gt=0)] = 2.0
    cap: Positive | None = None


class AnnealedMixture(MixtureBase):
    """Shares in proportion to rows ** exponent, which goes from `start` to `end` over the run."""

    policy: Literal["annealed"]
    start: Annotated[float, Field(ge=0)] = 1.0
    end: Annotated[float, Field(ge=0)] = 0.2
    cap: Positive | None = None


class FixedMixture(MixtureBase):
    """Shares in proportion to given weights; every task has one."""

    policy: Literal["fixed"]
    weights: dict[str, Annotated[float, Field(gt=0)]]


class UnimaxMixture(MixtureBase):
    """Equal shares, but no task gets more than `max_epochs` of its rows."""

    policy: Literal["unimax"]
    max_epochs: Annotated[float, Field(gt=0)]


class BanditMixtureConfig(MixtureBase):
    """Shares that follow the losses, decided anew for each block of steps."""

    policy: Literal["bandit"]
    reward: Literal["loss", "gain"] = "loss"
    every: Annotated[int, Field(ge=8)] = 64
    rate: Annotated[float, Field(ge=0)] = 2.0
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.5


def _parse_mixture(value: Any) -> Any:
    if isinstance(value, dict) and "policy" not in value:
        return {"policy": "round_robin", **value}
    return value


MixtureConfig = Annotated[
    RoundRobinMixture
    | ProportionalMixture
    | TemperatureMixture
    | AnnealedMixture
    | FixedMixture
    | UnimaxMixture
    | BanditMixtureConfig,
    Field(discriminator="policy"),
    BeforeValidator(_parse_mixture),
]
