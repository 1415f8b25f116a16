"""Mention replacement: entities get another mention of their type."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dist_ft.data.augment.draws import Draws
from dist_ft.data.augment.pieces import Line, Piece, kind_of
from dist_ft.data.augment.words import check_share

Mention = tuple[str, ...]


@dataclass(frozen=True)
class MentionTable:
    """Mentions of entities by type, as words.

    Attributes:
        mentions: entity type -> mentions, each once.
    """

    mentions: Mapping[str, Sequence[Mention]]

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the content."""
        content = json.dumps(sorted((t, list(m)) for t, m in self.mentions.items()))
        return hashlib.sha256(content.encode()).hexdigest()


def collect_mentions(
    rows: Iterable[tuple[Sequence[str], Sequence[str]]], *, most: int = 5000
) -> MentionTable:
    """Returns the mentions in words with BIO labels, in order of their first appearance.

    Args:
        rows: words and labels of each row; only training rows, or evaluation leaks into training.
        most: the most mentions of a type.
    """
    found: dict[str, dict[Mention, None]] = {}
    for tokens, tags in rows:
        for start, end in entity_bounds(tags):
            mentions = found.setdefault(tags[start][2:], {})
            if len(mentions) < most:
                mentions.setdefault(tuple(tokens[start:end]))
    return MentionTable({kind: tuple(mentions) for kind, mentions in sorted(found.items())})


def entity_bounds(tags: Sequence[str]) -> list[tuple[int, int]]:
    """Returns first and last + 1 word of each entity of valid BIO labels."""
    bounds: list[tuple[int, int]] = []
    for start, tag in enumerate(tags):
        if tag.startswith("B-"):
            end = start + 1
            while end < len(tags) and tags[end] == f"I-{tag[2:]}":
                end += 1
            bounds.append((start, end))
    return bounds


@dataclass(frozen=True)
class MentionReplacement:
    """Entities get another mention of their type (Dai and Adel 2020, section 3).

    Attributes:
        table: the mentions to choose from.
        share: chance of each entity to be replaced.
        chance: chance of a sample to be worked on.
        name: its name in the statistics.
    """

    table: MentionTable = field(repr=False)
    share: float = 0.3
    chance: float = 1.0
    name: str = "mention_replacement"

    def __post_init__(self) -> None:
        check_share(f"{self.name}.share", self.share)
        check_share(f"{self.name}.chance", self.chance)

    def apply(self, line: Line, draws: Draws) -> int:
        """Replaces entities and returns how many."""
        if not line.tagged or line.outside is None:
            return 0
        tags = [piece.tag for piece in line.pieces]
        # Words of BIOES and BILOU are labelled by their place from the end, too: they stay.
        if any(tag[:2] not in ("B-", "I-") for tag in tags if tag != line.outside):
            return 0
        bounds = entity_bounds(tags)
        pieces: list[Piece] = []
        last = edits = 0
        for number in draws.places(len(bounds), chance=self.share):
            start, end = bounds[number]
            kind = line.pieces[start].tag[2:]
            old = tuple(piece.text for piece in line.pieces[start:end])
            others = self.table.mentions.get(kind, ())
            new = others[draws.below(len(others))] if others else old
            if new != old:
                pieces += line.pieces[last:start] + _mention(new, kind=kind)
                last = end
                edits += 1
        line.pieces = pieces + line.pieces[last:]
        return edits


def _mention(words: Mention, *, kind: str) -> list[Piece]:
    return [
        Piece(
            word,
            kind_of(word),
            fixed=True,
            joined=place > 0,
            tag=f"{'I' if place else 'B'}-{kind}",
        )
        for place, word in enumerate(words)
    ]
