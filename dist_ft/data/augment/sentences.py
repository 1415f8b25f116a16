"""Shuffling of sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_ft.data.augment.draws import Draws
from dist_ft.data.augment.pieces import Line, Piece
from dist_ft.data.augment.words import check_share

_ENDS = frozenset(".!?\u2026")
_HAN_ENDS = frozenset("。！？｡")  # noqa: RUF001
# Quotation marks and brackets behind the end still belong to the sentence.
_CLOSING = frozenset("\"'\u201d\u2019)]}»）】」』》")  # noqa: RUF001


@dataclass(frozen=True)
class SentenceShuffling:
    """Sentences change places; the spaces between them, and a last one without an end, stay.

    A sentence ends with a mark of its own before a space, or with a Chinese one. What an answer or
    an entity spans is never cut.

    Attributes:
        chance: chance of a sample to be worked on.
        name: its name in the statistics.
    """

    chance: float = 1.0
    name: str = "sentence_shuffling"

    def __post_init__(self) -> None:
        check_share(f"{self.name}.chance", self.chance)

    def apply(self, line: Line, draws: Draws) -> int:
        """Shuffles the sentences and returns how many moved."""
        bounds = _sentence_bounds(line.pieces, tagged=line.tagged)
        if len(bounds) < 2:
            return 0
        order = draws.permutation(len(bounds))
        if order == sorted(order):
            return 0
        shuffled: list[Piece] = []
        last = 0
        for place, (start, end) in enumerate(bounds):
            # What lies between two sentences stays between whatever comes there.
            shuffled += line.pieces[last:start]
            own_start, own_end = bounds[order[place]]
            if not line.tagged and _lacks_space(shuffled):
                shuffled.append(Piece(" ", "space"))
            shuffled += line.pieces[own_start:own_end]
            last = end
        line.pieces = shuffled + line.pieces[last:]
        return sum(place != number for place, number in enumerate(order))


def _lacks_space(pieces: Sequence[Piece]) -> bool:
    """Returns whether a Western sentence ends here, where a Chinese one had no space behind it."""
    closed = len(pieces)
    while closed and pieces[closed - 1].text in _CLOSING:
        closed -= 1
    return closed > 0 and pieces[closed - 1].text in _ENDS


def _sentence_bounds(pieces: Sequence[Piece], *, tagged: bool) -> list[tuple[int, int]]:
    """Returns first and last + 1 piece of each complete sentence, spaces around not included."""
    bounds: list[tuple[int, int]] = []
    start = _skip_spaces(pieces, 0)
    place = start
    while place < len(pieces):
        if not _ends(pieces[place]):
            place += 1
            continue
        mark, end = place, place + 1
        while end < len(pieces) and (pieces[end].text in _CLOSING or _ends(pieces[end])):
            end += 1
        place = following = _skip_spaces(pieces, end)
        if _may_cut(pieces, mark=mark, end=end, following=following, tagged=tagged):
            bounds.append((start, end))
            start = following
    return bounds


def _ends(piece: Piece) -> bool:
    return piece.kind == "mark" and (piece.text in _ENDS or piece.text in _HAN_ENDS)


def _skip_spaces(pieces: Sequence[Piece], place: int) -> int:
    while place < len(pieces) and pieces[place].kind == "space":
        place += 1
    return place


def _may_cut(pieces: Sequence[Piece], *, mark: int, end: int, following: int, tagged: bool) -> bool:
    if any(piece.fixed for piece in pieces[end:following]):
        return False
    if following == len(pieces):
        return True
    # "3.14" is no end: a Western mark needs a space behind it.
    spaced = tagged or following > end
    han = any(piece.text in _HAN_ENDS for piece in pieces[mark:end])
    return not pieces[following].joined and (spaced or han)
