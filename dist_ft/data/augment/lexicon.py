"""Word lists: which words may stand for a word, and where the lists come from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

_WORDNET_PARTS = {"noun": "noun", "verb": "verb", "adjective": "adj", "adverb": "adv"}
_WORDNET_VARIABLE = "WNSEARCHDIR"
_WORDNET_DEFAULT = "/usr/share/wordnet"
_NLPAUG = "nlpaug"
_NLPAUG_INSTALL = "pip install --no-deps nlpaug==1.1.11"


@dataclass(frozen=True)
class Lexicon:
    """What may stand for a word.

    Attributes:
        words: lower-case word -> other words; words without alternatives are absent.
        name: where it comes from, for statistics and errors.
    """

    words: Mapping[str, tuple[str, ...]]
    name: str = field(default="lexicon")

    def alternatives(self, word: str) -> tuple[str, ...]:
        """Returns what may stand for the word, nothing if it isn't listed."""
        return self.words.get(word.lower(), ())

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the content."""
        content = json.dumps(sorted(self.words.items()), ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()


def read_lexicon(path: Path) -> Lexicon:
    """Returns a user's lexicon from a UTF-8 text file in the synonym format of Solr and Lucene.

    "a, b, c" says that each word may stand for the others, "a, b => c, d" that c or d may stand for
    a or b; "#" starts a comment. A word that is listed again gets more alternatives.

    Raises:
        ValueError: the file is missing, isn't UTF-8, a line is not in the format, or there is none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise ValueError(f"the lexicon {path} is missing: correct the path") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the lexicon {path} is not UTF-8 ({error}): convert it") from error
    found: dict[str, dict[str, None]] = {}
    for number, line in enumerate(lines, start=1):
        content = line.partition("#")[0].strip()
        if content:
            for word, others in _lexicon_line(content, place=f"{path}, line {number}"):
                found.setdefault(word.lower(), {}).update(dict.fromkeys(others))
    return _lexicon(found, name=Path(path).name)


def _lexicon_line(content: str, *, place: str) -> Iterator[tuple[str, list[str]]]:
    left, arrow, right = content.partition("=>")
    words, others = _listed(left), _listed(right)
    if arrow and words and others:
        yield from ((word, others) for word in words)
    elif not arrow and len(words) > 1:
        yield from ((word, words) for word in words)
    else:
        raise ValueError(
            f"{place}: {content!r} must be 'word, word' or 'word, word => word, word': correct it"
        )


def _listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def find_wordnet() -> Path:
    """Returns the folder of the installed WordNet: $WNSEARCHDIR, or where Debian puts it.

    Raises:
        RuntimeError: there is none.
    """
    folder = Path(os.environ.get(_WORDNET_VARIABLE, _WORDNET_DEFAULT))
    if not (folder / "index.noun").is_file():
        raise RuntimeError(
            f"WordNet is not in {folder}: install it (Debian: apt-get install wordnet-base), set "
            f"{_WORDNET_VARIABLE}, or give its folder"
        )
    return folder


def read_wordnet(
    folder: Path,
    *,
    parts: Sequence[str] = tuple(_WORDNET_PARTS),
    senses: int = 1,
    only_one_part: bool = True,
) -> Lexicon:
    """Returns synonyms from WordNet's own database files (index.noun, data.noun ...).

    Without a tagger, a word's part of speech is not known, so by default only words with one part
    of speech are listed: "run" has no synonyms, "slowly" has.

    Args:
        folder: the folder of the files, version 3.0 or 3.1.
        parts: parts of speech to use: noun, verb, adjective, adverb.
        senses: how many of a word's senses count, most frequent first.
        only_one_part: leave out words that are listed under several parts of speech.

    Raises:
        ValueError: a part of speech is unknown, or a file is missing or not in its format.
    """
    if unknown := [part for part in parts if part not in _WORDNET_PARTS]:
        raise ValueError(
            f"parts of speech {unknown} are unknown: choose from {', '.join(_WORDNET_PARTS)}"
        )
    # All parts are looked at, also those that aren't used: they say which words have several.
    indexes = {part: _index(Path(folder), part=part) for part in _WORDNET_PARTS}
    found: dict[str, dict[str, None]] = {}
    for part in parts:
        sets = _synonym_sets(Path(folder), part=part)
        for word, offsets in indexes[part].items():
            if only_one_part and sum(word in index for index in indexes.values()) > 1:
                continue
            for offset in offsets[:senses]:
                found.setdefault(word, {}).update(dict.fromkeys(sets[offset]))
    return _lexicon(found, name="wordnet")


def _index(folder: Path, *, part: str) -> dict[str, list[int]]:
    """Returns lower-case word -> places of its synonym sets, most frequent sense first."""
    index = {}
    for fields in _wordnet_lines(folder / f"index.{_WORDNET_PARTS[part]}"):
        # lemma pos sense_count pointer_count pointers... sense_count tagged_count offsets...
        offsets = fields[6 + int(fields[3]) :]
        index[_word(fields[0])] = [int(offset) for offset in offsets]
    return index


def _synonym_sets(folder: Path, *, part: str) -> dict[int, list[str]]:
    sets = {}
    for fields in _wordnet_lines(folder / f"data.{_WORDNET_PARTS[part]}"):
        # offset file_number type word_count(hex) [word sense_id]...
        count = int(fields[3], 16)
        sets[int(fields[0])] = [_word(fields[4 + 2 * number]) for number in range(count)]
    return sets


def _wordnet_lines(path: Path) -> Iterator[list[str]]:
    try:
        with path.open(encoding="utf-8") as lines:
            # The licence at the beginning is indented.
            yield from (line.split() for line in lines if not line.startswith(" "))
    except FileNotFoundError as error:
        raise ValueError(
            f"the WordNet file {path} is missing: give the folder which has index.noun"
        ) from error


def _word(entry: str) -> str:
    # Adjectives carry a marker of their place: "ill(p)".
    return entry.partition("(")[0].replace("_", " ")


def _lexicon(found: Mapping[str, Mapping[str, None]], *, name: str) -> Lexicon:
    words = {}
    for word, others in found.items():
        alternatives = tuple(other for other in others if other.lower() != word.lower())
        if alternatives:
            words[word] = alternatives
    if not words:
        raise ValueError(f"the lexicon {name} has no words with alternatives: give another one")
    return Lexicon(words, name=name)


def packaged_misspellings() -> Lexicon:
    """Returns real misspellings of English words, from the installed package nlpaug.

    Raises:
        RuntimeError: nlpaug is not installed or doesn't hold the list.
    """
    lines = _nlpaug_file("nlpaug/res/word/spelling/spelling_en.txt").splitlines()
    found = {}
    for word, *wrong in filter(None, map(str.split, lines)):
        found[word.lower()] = dict.fromkeys(wrong)
    return _lexicon(found, name="misspellings")


def packaged_keyboard(language: str) -> dict[str, str]:
    """Returns lower-case letter -> letters beside it, from the installed package nlpaug.

    Args:
        language: "en", "de", "fr" ...

    Raises:
        ValueError: the language is not a code.
        RuntimeError: nlpaug is not installed or has no keyboard of this language.
    """
    if not language.isalpha():
        raise ValueError(f"a keyboard's language is a code such as 'en', got {language!r}")
    layout = json.loads(_nlpaug_file(f"nlpaug/res/char/keyboard/{language}.json"))
    found = {}
    for key, others in layout.items():
        letters = "".join(other.lower() for other in others if len(other) == 1 and other.isalpha())
        if len(key) == 1 and key.isalpha() and letters:
            found[key.lower()] = "".join(dict.fromkeys(letters))
    return found


def _nlpaug_file(name: str) -> str:
    try:
        path = Path(str(importlib.metadata.distribution(_NLPAUG).locate_file(name)))
        # Only read, never imported: the package would bring its dependencies.
        return path.read_text(encoding="utf-8")
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError(f"the word lists of nlpaug are not installed: {_NLPAUG_INSTALL}") from (
            error
        )
    except FileNotFoundError as error:
        raise RuntimeError(
            f"the installed nlpaug doesn't hold {name}: {_NLPAUG_INSTALL}, or choose another list"
        ) from error
