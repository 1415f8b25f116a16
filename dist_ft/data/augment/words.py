"""Transforms of whole words: synonyms and other replacements, and dropping."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from dist_ft.data.augment.draws import Draws
from dist_ft.data.augment.lexicon import Lexicon
from dist_ft.data.augment.pieces import Line, Piece

# Words of grammar: they have no synonyms worth the name, though WordNet lists "a" (angstrom), "in"
# (inch) or "was" (be).
_STOP_WORDS = """
a about above after again against all almost also although always am among an and another any
anyone anything are aren't as at be because been before being below between both but by can
can't cannot could couldn't did didn't do does doesn't doing don't down during each either else
enough ever every everyone everything few for from further get had hadn't has hasn't have
haven't having he he's her here hers herself him himself his how however i i'd i'll i'm i've if
in into is isn't it it's its itself just least less let many may me might mine more most much
must my myself neither never no nobody none nor not nothing now of off often on once one only or
other others our ours ourselves out over own perhaps quite rather same shall she she's should
shouldn't since so some someone something still such than that that's the their theirs them
themselves then there there's these they they're this those though through thus to too under
until up upon us very was wasn't we we're were weren't what when where whether which while who
whom whose why will with within without won't would wouldn't yet you you're your yours yourself
yourselves
"""
ENGLISH_STOP_WORDS = frozenset(_STOP_WORDS.split())


def check_share(name: str, value: float) -> None:
    """Checks that a share or chance lies in [0, 1].

    Raises:
        ValueError: it doesn't.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"augmentation: {name} must lie in [0, 1], got {value}")


@dataclass(frozen=True)
class WordReplacement:
    """Words get another word of a lexicon: synonyms, or misspellings.

    Zhang et al. 2015 (character-level CNNs), section 3; EDA (Wei and Zou 2019).

    Attributes:
        lexicon: the alternatives.
        share: chance of each listed word to be replaced.
        chance: chance of a sample to be worked on.
        stop_words: lower-case words which stay.
        name: its name in the statistics.
    """

    lexicon: Lexicon
    share: float = 0.1
    chance: float = 1.0
    stop_words: Collection[str] = field(default=ENGLISH_STOP_WORDS, repr=False)
    name: str = "word_replacement"

    def __post_init__(self) -> None:
        check_share(f"{self.name}.share", self.share)
        check_share(f"{self.name}.chance", self.chance)

    def apply(self, line: Line, draws: Draws) -> int:
        """Replaces words and returns how many."""
        words = [place for place, piece in enumerate(line.pieces) if piece.free]
        edits = 0
        for number in draws.places(len(words), chance=self.share):
            piece = line.pieces[words[number]]
            others = self._alternatives(piece.text, tagged=line.tagged)
            if others:
                other = others[draws.below(len(others))]
                line.pieces[words[number]] = piece.renamed(_in_case_of(piece.text, other))
                edits += 1
        return edits

    def _alternatives(self, word: str, *, tagged: bool) -> Sequence[str]:
        others = self.lexicon.alternatives(word)
        if not others or word.lower() in self.stop_words:
            return ()
        # A label belongs to one word, so "ice cream" can't take the place of one that has it.
        return [other for other in others if not any(map(str.isspace, other))] if tagged else others


def _in_case_of(word: str, other: str) -> str:
    if word.isupper() and len(word) > 1:
        return other.upper()
    return other[:1].upper() + other[1:] if word[:1].isupper() else other


@dataclass(frozen=True)
class WordDropout:
    """Words are left out, or replaced by a placeholder; at least one word stays.

    EDA's random deletion (Wei and Zou 2019); with the mask token as placeholder, word dropout.

    Attributes:
        share: chance of each word to be dropped.
        chance: chance of a sample to be worked on.
        placeholder: what takes the word's place, nothing by default.
        name: its name in the statistics.
    """

    share: float = 0.1
    chance: float = 1.0
    placeholder: str | None = None
    name: str = "word_dropout"

    def __post_init__(self) -> None:
        check_share(f"{self.name}.share", self.share)
        check_share(f"{self.name}.chance", self.chance)
        if self.placeholder is not None and not self.placeholder.strip():
            raise ValueError("augmentation: word_dropout.placeholder must not be blank")

    def apply(self, line: Line, draws: Draws) -> int:
        """Drops words and returns how many."""
        words = [place for place, piece in enumerate(line.pieces) if piece.free]
        chosen = [words[number] for number in draws.places(len(words), chance=self.share)]
        if len(chosen) == sum(piece.kind == "word" for piece in line.pieces):
            chosen = chosen[1:]
        if self.placeholder is not None:
            for place in chosen:
                line.pieces[place] = line.pieces[place].renamed(self.placeholder)
        elif chosen:
            line.pieces = _without(line.pieces, dropped=chosen)
        return len(chosen)


def _without(pieces: Sequence[Piece], *, dropped: Sequence[int]) -> list[Piece]:
    """Returns the pieces without some words, and without the space that each leaves over."""
    gone = set(dropped)
    kept: list[Piece] = []
    for place, piece in enumerate(pieces):
        if place in gone:
            continue
        after_gone = place > 0 and place - 1 in gone
        # The space behind a dropped word goes if there is one before it, or nothing at all.
        if after_gone and _is_spare(piece) and (not kept or kept[-1].kind == "space"):
            continue
        # A mark takes the place of the dropped word and its space.
        if after_gone and piece.kind == "mark" and kept and _is_spare(kept[-1]):
            kept.pop()
        kept.append(piece)
    if len(pieces) - 1 in gone and kept and _is_spare(kept[-1]):
        kept.pop()
    return kept


def _is_spare(piece: Piece) -> bool:
    return piece.kind == "space" and not piece.fixed
