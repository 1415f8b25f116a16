"""Is every augmented sample right, and what does augmentation cost?

Makes random samples of the three kinds (texts, words with labels, contexts with answers; English,
Chinese, emoji, odd spacing, answers that cut words in two), augments them with random sets of
transforms and checks each result by rules of its own: labels are BIO, entities keep their words,
`context[start:end] == answer`. Then measures each transform alone.

    python benchmarks/augment.py [--quick] [--json FILE] [--check]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a file: the repository is not on the path
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.common import claim, markdown_table, parse_arguments, report, say
from dist_ft.data.augment.augmenter import Augmenter, AugmentStatistics, Changes, Transform
from dist_ft.data.augment.lexicon import Lexicon
from dist_ft.data.augment.mentions import MentionReplacement, MentionTable
from dist_ft.data.augment.noise import (
    Casing,
    CharacterNoise,
    KeyboardTypos,
    PunctuationInsertion,
)
from dist_ft.data.augment.samples import ContextFields, Fields, TaggedFields, TextFields
from dist_ft.data.augment.sentences import SentenceShuffling
from dist_ft.data.augment.words import WordDropout, WordReplacement

Sample = dict[str, Any]

COLUMNS = {
    "transform": "transform",
    "us_per_sample": "CPU us per sample",
    "changed_share": "samples changed",
    "edits_per_sample": "edits per sample",
}
KINDS = ("text", "tagged", "context")
_WORDS = """
the a in of and is not I it's don't people government small company growth market reported quarter
earnings expects remained strong analysts said shares rose fell sharply Tuesday new house river
mountain quickly beautiful happy train Straße naïve cafe\u0301 Ελλάδα Привет हिन्दी 北京大学 我们
喜欢 学习 こんにちは 3.14 1,000 2024 12:30 x U.S e.g 👍 👩\u200d👩\u200d👧 C++ a1b2
"""
WORDS = _WORDS.split()
MARKS = [".", ".", ".", "!", "?", ",", ",", ";", "。", "\uff01", '."', "...", " -", "(", ")"]
GAPS = [" "] * 12 + ["  ", "\n", "\t", ""]
LEXICON = Lexicon(
    {
        "people": ("folks", "human beings"),
        "small": ("little", "tiny"),
        "growth": ("increase",),
        "strong": ("robust", "solid as a rock"),
        "quickly": ("fast", "rapidly"),
        "happy": ("glad",),
        "我们": ("咱们",),
        "喜欢": ("爱",),
    }
)
TYPES = ("PER", "LOC", "ORG")
MENTIONS = MentionTable(
    {
        "PER": (("Ada", "Lovelace"), ("Grace",), ("Alan", "M.", "Turing")),
        "LOC": (("Paris",), ("New", "York"), ("上海",)),
        "ORG": (("ACME", "Inc", "."), ("UN",)),
    }
)


def transforms(kind: str) -> list[Transform]:
    """Returns all transforms that apply to a kind of sample, with high shares."""
    common: list[Transform] = [
        WordReplacement(LEXICON, share=0.5),
        SentenceShuffling(),
        KeyboardTypos(share=0.3),
        CharacterNoise(share=0.3, least_letters=3),
        Casing(share=0.3),
        WordDropout(share=0.3),
        PunctuationInsertion(),
    ]
    return [*common, MentionReplacement(MENTIONS, share=0.5)] if kind == "tagged" else common


def fields_of(kind: str) -> Fields:
    """Returns the columns of a kind of sample."""
    return {
        "text": TextFields(("text",)),
        "tagged": TaggedFields(),
        "context": ContextFields(),
    }[kind]


def make_cases(kind: str, count: int, *, seed: int) -> Iterator[Sample]:
    """Yields random samples of a kind; a few are not what they should be."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    # All random numbers at once: drawing them one by one would cost more than augmenting.
    sizes = rng.integers(1, 16, count).tolist()
    words = rng.integers(0, len(WORDS), (count, 16)).tolist()
    marks = rng.integers(0, 4 * len(MARKS), (count, 16)).tolist()
    gaps = rng.integers(0, len(GAPS), (count, 16)).tolist()
    places = rng.random((count, 8)).tolist()
    kinds = rng.integers(0, 12, (count, 16)).tolist()
    for n in range(count):
        size = sizes[n]
        if kind == "tagged":
            yield _tagged(words[n][:size], kinds=kinds[n], odd=places[n][0] < 0.03)
            continue
        text = "".join(
            WORDS[w] + (MARKS[m] if m < len(MARKS) else "") + GAPS[g]
            for w, m, g in zip(words[n][:size], marks[n], gaps[n], strict=False)
        )
        yield {"text": text, "label": n} if kind == "text" else _context(text, places=places[n])


def _tagged(words: Sequence[int], *, kinds: Sequence[int], odd: bool) -> Sample:
    tokens, tags = [], []
    for word, kind in zip(words, kinds, strict=False):
        before = tags[-1] if tags else "O"
        tokens.append("." if kind == 11 else WORDS[word])
        if kind < 3:
            tags.append(f"B-{TYPES[kind]}")
        elif kind < 6 and before != "O":
            tags.append(f"I-{before[2:]}")
        else:
            tags.append("O")
    if odd:
        tags[0] = "I-PER"
    return {"tokens": tokens, "tags": tags, "id": 7}


def _context(text: str, *, places: Sequence[float]) -> Sample:
    answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
    for number in range(int(places[0] * 4)):
        # Any characters: answers may overlap, cut words in two, begin or end with a space.
        start = int(places[1 + number] * len(text))
        end = min(len(text), start + 1 + int(places[4 + number] * 12))
        answers["text"].append(text[start:end])
        answers["answer_start"].append(start + (1000 if places[7] < 0.02 else 0))
    question = "Who reported the growth of the small company?"
    return {"question": question, "context": text, "answers": answers, "id": "q"}


def violation(
    kind: str, before: Mapping[str, Any], after: Mapping[str, Any], *, changes: Changes
) -> str | None:
    """Returns what is wrong with an augmented sample, None if nothing is."""
    if (after is before) == changes.changed or (changes.skipped and changes.changed):
        return "the statistics say otherwise"
    if before.keys() != after.keys():
        return "the columns changed"
    if kind == "text":
        return _text_violation(before, after)
    if kind == "context":
        return _answer_violation(before, after)
    return _tag_violation(before, after, replaced=MentionReplacement.name in changes.edits)


def _text_violation(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    if not after["text"].strip():
        return "the text is blank"
    return None if before["label"] == after["label"] else "the label changed"


def entities(
    tokens: Sequence[str], tags: Sequence[str]
) -> list[tuple[str, tuple[str, ...]]] | None:
    """Returns type and words of each entity, None if the labels are not BIO."""
    found: list[tuple[str, list[str]]] = []
    before = "O"
    for token, tag in zip(tokens, tags, strict=True):
        if tag.startswith("B-"):
            found.append((tag[2:], [token]))
        elif tag.startswith("I-"):
            if before[2:] != tag[2:]:
                return None
            found[-1][1].append(token)
        elif tag != "O":
            return None
        before = tag
    return [(kind, tuple(words)) for kind, words in found]


def _tag_violation(
    before: Mapping[str, Any], after: Mapping[str, Any], *, replaced: bool
) -> str | None:
    if len(after["tokens"]) != len(after["tags"]) or not after["tokens"]:
        return "words and labels differ in number"
    expected = entities(before["tokens"], before["tags"])
    if expected is None:
        return None if before == after else "a sample with invalid labels was changed"
    found = entities(after["tokens"], after["tags"])
    if found is None:
        return "the labels are not BIO"
    right = sorted(expected) == sorted(found)
    if replaced:
        # Each is an old one or one of the table, and there are as many of each type.
        known = {*expected, *((kind, m) for kind, ms in MENTIONS.mentions.items() for m in ms)}
        types = [sorted(kind for kind, _ in entity) for entity in (expected, found)]
        right = set(found) <= known and types[0] == types[1]
    return None if right else "the entities changed"


def _answer_violation(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    old, new = before["answers"], after["answers"]
    if old["text"] != new["text"] or len(new["answer_start"]) != len(new["text"]):
        return "the answers changed"
    if any(
        before["context"][start : start + len(text)] != text
        for text, start in zip(old["text"], old["answer_start"], strict=True)
    ):
        return None if before == after else "a sample with a wrong answer was changed"
    for text, start in zip(new["text"], new["answer_start"], strict=True):
        if start < 0 or after["context"][start : start + len(text)] != text:
            return "an answer is not at its place"
    return None if after["question"].strip() else "the question is blank"


def augmenters(kind: str) -> list[Augmenter]:
    """Returns one augmenter with all transforms of a kind, and others with a few of them."""
    every = transforms(kind)
    fields = fields_of(kind)
    few = [every[n::3] for n in range(3)] + [every[n : n + 2] for n in range(len(every) - 1)]
    return [Augmenter(part, fields=fields) for part in (every, *few)]


def fuzz(count: int, *, seed: int) -> tuple[list[str], dict[str, AugmentStatistics]]:
    """Augments exactly `count` random samples, about as many of each kind.

    Returns:
        The violations, and by kind what was changed.
    """
    violations: list[str] = []
    statistics = {kind: AugmentStatistics() for kind in KINDS}
    for number, kind in enumerate(KINDS):
        choices = augmenters(kind)
        own = (count + number) // len(KINDS)
        for row, sample in enumerate(make_cases(kind, own, seed=seed)):
            before = repr(sample)
            augmenter = choices[row % len(choices)]
            after, changes = augmenter.apply(sample, seed=seed, epoch=row % 7, row=row)
            statistics[kind].add(changes)
            problem = violation(kind, sample, after, changes=changes)
            if repr(sample) != before:
                problem = "the sample itself was changed"
            if problem:
                violations.append(f"{kind} {row}: {problem}: {before} -> {after}")
    return violations, statistics


def speed(*, samples: int) -> list[dict[str, Any]]:
    """Returns microseconds per sample of each transform alone, on texts of about 12 words."""
    cases = list(make_cases("text", samples, seed=99))
    tagged = list(make_cases("tagged", samples, seed=99))
    rows = []
    for transform in transforms("tagged"):
        own = isinstance(transform, MentionReplacement)
        augmenter = Augmenter([transform], fields=fields_of("tagged" if own else "text"))
        statistics = AugmentStatistics()
        started = time.process_time()
        for row, sample in enumerate(tagged if own else cases):
            statistics.add(augmenter.apply(sample, seed=0, epoch=0, row=row)[1])
        seconds = time.process_time() - started
        rows.append(
            {
                "transform": transform.name,
                "us_per_sample": round(1e6 * seconds / samples, 1),
                "changed_share": round(statistics.changed / samples, 3),
                "edits_per_sample": round(sum(statistics.edits.values()) / samples, 2),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    options = parse_arguments(__doc__ or "", arguments)
    count = 60_000 if options.quick else 1_000_000
    started = time.process_time()
    violations, statistics = fuzz(count, seed=0)
    seconds = time.process_time() - started
    rows = speed(samples=3000 if options.quick else 20_000)
    say(markdown_table(rows, columns=COLUMNS))
    say(f"{count:,} random samples, checked: {1e6 * seconds / count:.0f} us CPU each")
    for kind, counts in statistics.items():
        say(f"  {kind}: {json.dumps(counts.to_json())}")
    for problem in violations[:5]:
        say(f"VIOLATION {problem}")
    name = f"violations in {count:,} augmented samples"
    claims = [claim(name, value=len(violations), bound=0, direction="at most")]
    return report(rows, claims=claims, packages=("dist-ft", "numpy"), options=options)


if __name__ == "__main__":
    sys.exit(main())
