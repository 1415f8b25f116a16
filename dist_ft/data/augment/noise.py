"""Noise inside words and between them: typing errors, letter case, punctuation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dist_ft.data.augment.draws import Draws
from dist_ft.data.augment.pieces import Line, Piece, is_han
from dist_ft.data.augment.words import check_share

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
# AEDA's marks, and those of Chinese.
_AEDA_MARKS = (".", ";", "?", ":", "!", ",")
_AEDA_HAN_MARKS = ("。", "；", "？", "：", "！", "，")  # noqa: RUF001


class _Typing(Protocol):
    """What the transforms of single words have in common."""

    @property
    def share(self) -> float: ...

    @property
    def least_letters(self) -> int: ...


def qwerty() -> dict[str, str]:
    """Returns letter -> letters beside it on a US keyboard."""
    beside: dict[str, str] = {}
    for number, row in enumerate(_ROWS):
        for place, letter in enumerate(row):
            others = row[max(0, place - 1) : place] + row[place + 1 : place + 2]
            if number > 0:
                others += _ROWS[number - 1][place : place + 2]
            if number + 1 < len(_ROWS):
                others += _ROWS[number + 1][max(0, place - 1) : place + 1]
            beside[letter] = others
    return beside


@dataclass(frozen=True)
class KeyboardTypos:
    """A letter becomes one beside it on the keyboard.

    Attributes:
        share: chance of each word to get one typing error.
        chance: chance of a sample to be worked on.
        keyboard: lower-case letter -> letters beside it.
        least_letters: shorter words stay.
        name: its name in the statistics.
    """

    share: float = 0.05
    chance: float = 1.0
    keyboard: Mapping[str, str] = field(default_factory=qwerty, repr=False)
    least_letters: int = 4
    name: str = "keyboard_typos"

    def __post_init__(self) -> None:
        check_share(f"{self.name}.share", self.share)
        check_share(f"{self.name}.chance", self.chance)

    def apply(self, line: Line, draws: Draws) -> int:
        """Makes typing errors and returns how many."""

        def mistype(word: str) -> str:
            place = draws.below(len(word))
            others = self.keyboard.get(word[place].lower(), "")
            if not others:
                return word
            letter = others[draws.below(len(others))]
            letter = letter.upper() if word[place].isupper() else letter
            return word[:place] + letter + word[place + 1 :]

        return _change_words(line, draws, typing=self, change=mistype)


@dataclass(frozen=True)
class CharacterNoise:
    """Two neighbouring characters of a word change places, or one is lost; never the first.

    Belinkov and Bisk 2018, section 4. Words of two Chinese characters or more also take part.

    Attributes:
        share: chance of each word to be changed.
        chance: chance of a sample to be worked on.
        kinds: "swap" and "drop", one of which is drawn for each word.
        least_letters: shorter words stay.
        name: its name in the statistics.
    """

    share: float = 0.05
    chance: float = 1.0
    kinds: tuple[str, ...] = ("swap", "drop")
    least_letters: int = 4
    name: str = "character_noise"

    def __post_init__(self) -> None:
        check_share(f"{self.name}.share", self.share)
        check_share(f"{self.name}.chance", self.chance)
        if not self.kinds or not set(self.kinds) <= {"swap", "drop"}:
            raise ValueError(
                f"augmentation: {self.name}.kinds must be 'swap', 'drop' or both, got {self.kinds}"
            )

    def apply(self, line: Line, draws: Draws) -> int:
        """Changes words and returns how many."""

        def garble(word: str) -> str:
            kind = self.kinds[draws.below(len(self.kinds))]
            first = 0 if is_han(word) else 1
            place = first + draws.below(len(word) - 1 - first)
            if kind == "drop":
                return word[:place] + word[place + 1 :]
            return word[:place] + word[place + 1] + word[place] + word[place + 2 :]

        return _change_words(line, draws, typing=self, change=garble)


@dataclass(frozen=True)
class Casing:
    """Words are written in lower case, in capitals, or with a capital.

    Attributes:
        share: chance of each word to be changed.
        chance: chance of a sample to be worked on.
        styles: "lower", "upper" and "title", one of which is drawn for each word.
        name: its name in the statistics.
    """

    share: float = 0.1
    chance: float = 1.0
    styles: tuple[str, ...] = ("lower", "upper", "title")
    name: str = "casing"

    def __post_init__(self) -> None:
        check_share(f"{self.name}.share", self.share)
        check_share(f"{self.name}.chance", self.chance)
        if not self.styles or not set(self.styles) <= set(_STYLES):
            raise ValueError(
                f"augmentation: {self.name}.styles must be among {', '.join(_STYLES)}, got "
                f"{self.styles}"
            )

    def apply(self, line: Line, draws: Draws) -> int:
        """Changes words and returns how many."""
        words = [place for place, piece in enumerate(line.pieces) if piece.free]
        edits = 0
        for number in draws.places(len(words), chance=self.share):
            piece = line.pieces[words[number]]
            style = _STYLES[self.styles[draws.below(len(self.styles))]]
            edits += _rename(line, words[number], text=style(piece.text))
        return edits


_STYLES: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "upper": str.upper,
    "title": lambda word: word[:1].upper() + word[1:].lower(),
}


@dataclass(frozen=True)
class PunctuationInsertion:
    """Marks are put before words: AEDA (Karimi, Rossi and Prati 2021).

    Their number is drawn from 1 to a third of the words.

    Attributes:
        share: the most marks, as a share of the words.
        chance: chance of a sample to be worked on.
        name: its name in the statistics.
    """

    share: float = 1 / 3
    chance: float = 1.0
    name: str = "punctuation_insertion"

    def __post_init__(self) -> None:
        check_share(f"{self.name}.share", self.share)
        check_share(f"{self.name}.chance", self.chance)

    def apply(self, line: Line, draws: Draws) -> int:
        """Puts in marks and returns how many."""
        if line.tagged and line.outside is None:
            return 0
        words = [place for place, piece in enumerate(line.pieces) if piece.kind == "word"]
        most = int(self.share * len(words))
        gaps = [place for place in words if _has_room(line, place)]
        if not gaps or most < 1:
            return 0
        count = min(len(gaps), 1 + draws.below(most))
        chosen = sorted(gaps[number] for number in draws.permutation(len(gaps))[:count])
        pieces: list[Piece] = []
        start = 0
        for place in chosen:
            pieces += line.pieces[start:place]
            pieces += _mark_before(line, place, draws=draws)
            start = place
        line.pieces = pieces + line.pieces[start:]
        return count


def _has_room(line: Line, place: int) -> bool:
    """Returns whether a mark may be put before a word: not inside of "well-known"."""
    piece = line.pieces[place]
    if piece.joined:
        return False
    return line.tagged or place == 0 or line.pieces[place - 1].kind == "space" or is_han(piece.text)


def _mark_before(line: Line, place: int, *, draws: Draws) -> list[Piece]:
    han = is_han(line.pieces[place].text)
    marks = _AEDA_HAN_MARKS if han else _AEDA_MARKS
    mark = Piece(marks[draws.below(len(marks))], "mark", tag=line.outside)
    if line.tagged or han:
        return [mark]
    return [mark, Piece(" ", "space")]


def _change_words(
    line: Line, draws: Draws, *, typing: _Typing, change: Callable[[str], str]
) -> int:
    """Changes a share of the words that are long enough, and returns how many changed."""
    words = [place for place, piece in enumerate(line.pieces) if piece.free]
    edits = 0
    for number in draws.places(len(words), chance=typing.share):
        word = line.pieces[words[number]].text
        if _is_long(word, least=typing.least_letters):
            edits += _rename(line, words[number], text=change(word))
    return edits


def _is_long(word: str, *, least: int) -> bool:
    # Letters only: a cut combination of marks or an emoji would be no character at all.
    return len(word) >= (2 if is_han(word) else max(3, least)) and word.isalpha()


def _rename(line: Line, place: int, *, text: str) -> int:
    """Gives a word another text and returns 1, or 0 if it is the same."""
    piece = line.pieces[place]
    if text == piece.text:
        return 0
    line.pieces[place] = piece.renamed(text)
    return 1
