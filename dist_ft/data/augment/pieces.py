"""The form that transforms work on: words, spaces and marks, with what must stay together."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["word", "space", "mark"]
# Splits a run of Chinese or Japanese characters into words.
Segmenter = Callable[[str], Iterable[str]]

_HAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
# Punctuation of ASCII, Latin-1, the general block (without the joiners that hold emoji and Persian
# words together), CJK and full width; whatever else is no space belongs to a word.
_MARKS = (
    r"!-/:-@\[-`{-~\u00a1-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf"
    r"\u2010-\u205e\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_PIECES = re.compile(
    rf"(?P<han>[{_HAN}]+)"
    # "3.14", "1,000" and "12:30" are one word each.
    r"|(?P<number>\d+(?:[.,:/]\d+)+)"
    rf"|(?P<word>[^\s{_MARKS}{_HAN}]+(?:['\u2019][^\s{_MARKS}{_HAN}]+)*)"
    r"|(?P<space>\s+)"
    r"|(?P<mark>.)",
    re.DOTALL,
)
_HAN_CHARACTER = re.compile(f"[{_HAN}]")


@dataclass(slots=True)
class Piece:
    """A word, a run of spaces or a mark.

    Attributes:
        text: its characters.
        kind: "word", "space" or "mark".
        fixed: it must stay as it is: part of an answer or an entity.
        joined: it must stay right behind the piece before it.
        tag: its label, of words with labels.
        origin: its number before any change, -1 for one that was put in.
    """

    text: str
    kind: Kind
    fixed: bool = False
    joined: bool = False
    tag: Any = None
    origin: int = -1

    @property
    def free(self) -> bool:
        """Whether it is a word that may be changed."""
        return self.kind == "word" and not self.fixed

    def renamed(self, text: str) -> Piece:
        """Returns the piece with another text."""
        return Piece(text, self.kind, self.fixed, self.joined, self.tag, self.origin)


@dataclass(slots=True)
class Line:
    """One text, or one sequence of words with labels, as pieces.

    Attributes:
        name: the column it comes from.
        pieces: its pieces; joined together they are the text.
        tagged: each piece is a word with a label, and there are no spaces.
        outside: the label of a word that is put in; None if none may be put in.
        anchors: where answers begin: number of a piece, and characters into it.
    """

    name: str
    pieces: list[Piece]
    tagged: bool = False
    outside: str | None = None
    anchors: tuple[tuple[int, int], ...] = ()

    @property
    def text(self) -> str:
        """The characters of all pieces."""
        return "".join([piece.text for piece in self.pieces])


def split_text(text: str, *, segmenter: Segmenter | None = None) -> list[Piece]:
    """Returns the pieces of a text; joined together they are the text again.

    Args:
        text: any text.
        segmenter: splits runs of Chinese or Japanese characters into words; by default each
            character is a word.

    Raises:
        ValueError: the segmenter's words are not the text that it was given.
    """
    pieces: list[Piece] = []
    for match in _PIECES.finditer(text):
        kind, found = match.lastgroup, match.group()
        if kind == "han":
            pieces += [Piece(word, "word") for word in _segments(found, segmenter=segmenter)]
        elif kind == "space":
            pieces.append(Piece(found, "space"))
        else:
            pieces.append(Piece(found, "mark" if kind == "mark" else "word"))
    for number, piece in enumerate(pieces):
        piece.origin = number
    return pieces


def kind_of(token: str) -> Kind:
    """Returns whether a token is a word or a mark."""
    return "word" if any(character.isalnum() for character in token) else "mark"


def is_han(text: str) -> bool:
    """Returns whether a text begins with a Chinese or Japanese character."""
    return _HAN_CHARACTER.match(text) is not None


def _segments(text: str, *, segmenter: Segmenter | None) -> Iterable[str]:
    if segmenter is None:
        return text
    words = [word for word in segmenter(text) if word]
    if "".join(words) != text:
        raise ValueError(f"the segmenter changed the text {text!r} into {words}: use another one")
    return words


def jieba_segmenter() -> Segmenter:
    """Returns jieba's segmentation of Chinese.

    Raises:
        RuntimeError: jieba is not installed.
    """
    try:
        import jieba
    except ImportError as error:
        raise RuntimeError(
            "the segmentation 'jieba' needs the package jieba: pip install 'dist-ft[chinese]', or "
            "use 'characters'"
        ) from error
    jieba.setLogLevel(logging.WARNING)
    tokenizer: Any = jieba.Tokenizer()

    def segment(text: str) -> Iterator[str]:
        return tokenizer.cut(text, HMM=False)

    return segment


# How runs of Chinese or Japanese characters become words, by name. Whether a library is installed
# must not change the words, so it is never chosen by itself.
SEGMENTERS: dict[str, Callable[[], Segmenter | None]] = {
    "characters": lambda: None,
    "jieba": jieba_segmenter,
}


def make_segmenter(name: str) -> Segmenter | None:
    """Returns the segmentation of a name in SEGMENTERS; None means single characters.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: its library is not installed.
    """
    if name not in SEGMENTERS:
        raise ValueError(f"segmentation {name!r} is unknown: choose {' or '.join(SEGMENTERS)}")
    return SEGMENTERS[name]()
