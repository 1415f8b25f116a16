"""The kinds of samples: from raw fields to lines of pieces, and back with labels and places right.

A sample that isn't what its kind asks for is left alone, and the reason is counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dist_ft.data.augment.pieces import Line, Piece, Segmenter, kind_of, split_text

Sample = Mapping[str, Any]

# A label of an entity's word in BIO or one of its relatives (BIOES, BILOU).
_ENTITY_TAG = re.compile(r"([BIESLUM])-(.+)")
_CONTINUING = "IELM"
_CONTINUED = re.compile(rf"[{_CONTINUING}]-.+")


class SkippedSampleError(ValueError):
    """A sample can't be augmented; the text is a short reason, used as a name in statistics."""


class Fields(Protocol):
    """Which columns of a raw row are augmented, and as what."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns which are read."""
        ...

    def lines(self, sample: Sample, *, segmenter: Segmenter | None) -> list[Line]:
        """Returns the sample's lines.

        Raises:
            SkippedSampleError: the sample is to be left alone.
        """
        ...

    def rebuilt(self, sample: Sample, lines: Sequence[Line]) -> dict[str, Any]:
        """Returns the sample with the content of changed lines."""
        ...


@dataclass(frozen=True)
class TextFields:
    """Texts whose label doesn't depend on places in them.

    Attributes:
        columns: the columns; each is a text of its own.
    """

    columns: tuple[str, ...]

    def lines(self, sample: Sample, *, segmenter: Segmenter | None) -> list[Line]:
        """Returns one line a column."""
        return [_text_line(sample, column, segmenter=segmenter) for column in self.columns]

    def rebuilt(self, sample: Sample, lines: Sequence[Line]) -> dict[str, Any]:
        """Returns the sample with the lines' texts."""
        return {**sample, **{line.name: line.text for line in lines}}


def _as_it_is(tag: Any) -> Any:
    return tag


@dataclass(frozen=True)
class TaggedFields:
    """Words with a label each.

    BIO labels (or BIOES, BILOU) mark entities, which stay whole and, but for mention replacement,
    as they are; words between them may be changed, dropped and put in. Without a label for what is
    outside of entities, such as for parts of speech, words are changed in place or dropped with
    their label, but none is put in.

    Attributes:
        tokens: column of the words.
        tags: column of their labels.
        outside: the label of words in no entity; None if the labels mark no entities.
        name: returns the label that a tag stands for, such as a number.
    """

    tokens: str = "tokens"
    tags: str = "tags"
    outside: str | None = "O"
    name: Callable[[Any], Any] = field(default=_as_it_is, compare=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns which are read."""
        return (self.tokens, self.tags)

    def lines(self, sample: Sample, *, segmenter: Segmenter | None) -> list[Line]:
        """Returns one line of labelled words."""
        del segmenter
        tokens: Any = sample.get(self.tokens)
        tags: Any = sample.get(self.tags)
        if not _is_list(tokens) or not _is_list(tags) or len(tokens) != len(tags):
            raise SkippedSampleError("words_and_labels_differ_in_number")
        if not tokens or not all(isinstance(token, str) for token in tokens):
            raise SkippedSampleError("no_words")
        tags = [self.name(tag) for tag in tags]
        if self.outside is not None and not is_valid(tags, outside=self.outside):
            raise SkippedSampleError("invalid_bio")
        pieces = [
            Piece(
                token,
                kind_of(token),
                fixed=self.outside is not None and tag != self.outside,
                joined=self.outside is not None and _CONTINUED.fullmatch(tag) is not None,
                tag=tag,
                origin=number,
            )
            for number, (token, tag) in enumerate(zip(tokens, tags, strict=True))
        ]
        return [Line(self.tokens, pieces, tagged=True, outside=self.outside)]

    def rebuilt(self, sample: Sample, lines: Sequence[Line]) -> dict[str, Any]:
        """Returns the sample with the line's words and labels."""
        (line,) = lines
        return {
            **sample,
            self.tokens: [piece.text for piece in line.pieces],
            self.tags: [piece.tag for piece in line.pieces],
        }


@dataclass(frozen=True)
class ContextFields:
    """A context in which answers have places, and the question.

    Attributes:
        question: column of the question, None to leave it as it is.
        context: column of the context.
        answers: column of the answers, {"text": [...], "answer_start": [...]} or null.
    """

    question: str | None = "question"
    context: str = "context"
    answers: str = "answers"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns which are read."""
        asked = () if self.question is None else (self.question,)
        return (*asked, self.context, self.answers)

    def lines(self, sample: Sample, *, segmenter: Segmenter | None) -> list[Line]:
        """Returns the context and the question."""
        line = _text_line(sample, self.context, segmenter=segmenter)
        spans = _spans(sample.get(self.answers), context=sample[self.context])
        line.anchors = tuple(_fix(line.pieces, start=start, end=end) for start, end in spans)
        lines = [line]
        if self.question is not None:
            lines.append(_text_line(sample, self.question, segmenter=segmenter))
        return lines

    def rebuilt(self, sample: Sample, lines: Sequence[Line]) -> dict[str, Any]:
        """Returns the sample with the lines' texts and the answers' new places."""
        rebuilt = {**sample, **{line.name: line.text for line in lines}}
        context = lines[0]
        if context.anchors:
            answers = sample[self.answers]
            starts = _starts(context)
            for text, start in zip(answers["text"], starts, strict=True):
                assert context.text.startswith(text, start), "an answer was changed"
            rebuilt[self.answers] = {**answers, "answer_start": starts}
        return rebuilt


def outside_of(labels: Sequence[str]) -> str | None:
    """Returns the label of words in no entity; None if the labels mark no entities."""
    marks = any(_ENTITY_TAG.fullmatch(label) for label in labels)
    return "O" if marks and "O" in labels else None


def is_valid(tags: Sequence[Any], *, outside: str = "O") -> bool:
    """Returns whether labels are BIO (or a relative), and no entity begins in its middle."""
    before = ""
    for tag in tags:
        if tag == outside:
            before = ""
            continue
        match = _ENTITY_TAG.fullmatch(tag) if isinstance(tag, str) else None
        if match is None or (match[1] in _CONTINUING and before != match[2]):
            return False
        # E, L, S and U end an entity.
        before = match[2] if match[1] in "BIM" else ""
    return True


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _text_line(sample: Sample, column: str, *, segmenter: Segmenter | None) -> Line:
    text = sample.get(column)
    if not isinstance(text, str) or not text.strip():
        raise SkippedSampleError("no_text")
    return Line(column, split_text(text, segmenter=segmenter))


def _spans(answers: Any, *, context: str) -> list[tuple[int, int]]:
    """Returns first and last + 1 character of each answer."""
    if answers is None:
        return []
    if not isinstance(answers, Mapping) or not {"text", "answer_start"} <= answers.keys():
        raise SkippedSampleError("no_answers")
    texts, starts = answers["text"] or (), answers["answer_start"] or ()
    if len(texts) != len(starts):
        raise SkippedSampleError("answers_and_places_differ_in_number")
    spans: list[tuple[int, int]] = []
    for text, start in zip(texts, starts, strict=True):
        # A negative start would count from the end.
        if not text or start < 0 or context[start : start + len(text)] != text:
            raise SkippedSampleError("answer_not_at_its_place")
        spans.append((start, start + len(text)))
    return spans


def _fix(pieces: Sequence[Piece], *, start: int, end: int) -> tuple[int, int]:
    """Fixes the pieces which an answer touches; returns the first's number and how far inside."""
    anchor = (-1, 0)
    place = 0
    for number, piece in enumerate(pieces):
        following = place + len(piece.text)
        if following > start and place < end:
            if anchor[0] < 0:
                anchor = (number, start - place)
            else:
                piece.joined = True
            piece.fixed = True
        place = following
    return anchor


def _starts(line: Line) -> list[int]:
    """Returns where the answers begin now."""
    places = {}
    place = 0
    for piece in line.pieces:
        places[piece.origin] = place
        place += len(piece.text)
    return [places[number] + inside for number, inside in line.anchors]
