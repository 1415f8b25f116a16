import functools
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from dist_ft.data.augment.augmenter import (
    AUGMENT_ALGORITHM_VERSION,
    Augmenter,
    AugmentStatistics,
    Changes,
    Transform,
)
from dist_ft.data.augment.draws import Draws
from dist_ft.data.augment.lexicon import (
    Lexicon,
)
from dist_ft.data.augment.mentions import MentionReplacement, MentionTable, collect_mentions
from dist_ft.data.augment.noise import (
    Casing,
    CharacterNoise,
    KeyboardTypos,
    PunctuationInsertion,
)
from dist_ft.data.augment.samples import ContextFields, TaggedFields, TextFields
from dist_ft.data.augment.sentences import SentenceShuffling
from dist_ft.data.augment.words import WordDropout, WordReplacement
from dist_ft.train.augmentation import tag_name
from tests.unit.test_augment_transforms import LEXICON, augment

MENTIONS = MentionTable({"PER": (("Ada", "Lovelace"),)})


def context(**change: Any) -> dict[str, Any]:
    sample = {
        "question": "Who?",
        "context": "Ann came. Bob left. Cid slept.",
        "answers": {"text": ["Bob", "came. Bob"], "answer_start": [10, 4]},
    }
    return {**sample, **change}


def test_answers_hold_their_sentences_together() -> None:
    augmenter = Augmenter([SentenceShuffling()], fields=ContextFields(question=None))
    found = {}
    for row in range(50):
        after, _ = augmenter.apply(context(), seed=0, epoch=0, row=row)
        found[after["context"]] = after["answers"]["answer_start"]
    assert found == {
        "Ann came. Bob left. Cid slept.": [10, 4],
        "Cid slept. Ann came. Bob left.": [21, 15],
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answers": {"text": ["Bob"], "answer_start": [11]}}, "answer_not_at_its_place"),
        ({"answers": {"text": ["left."], "answer_start": [-11]}}, "answer_not_at_its_place"),
        ({"answers": {"text": [""], "answer_start": [1]}}, "answer_not_at_its_place"),
        ({"answers": {"text": ["Bob"], "answer_start": []}}, "answers_and_places_differ_in_number"),
        ({"answers": "Bob"}, "no_answers"),
        ({"context": None}, "no_text"),
        ({"question": " "}, "no_text"),
    ],
)
def test_odd_contexts_are_left_alone(change: dict[str, Any], reason: str) -> None:
    augmenter = Augmenter([Casing(share=1.0)], fields=ContextFields())
    sample = context(**change)
    after, changes = augmenter.apply(sample, seed=0, epoch=0, row=0)
    assert after is sample
    assert changes == Changes(skipped=reason)


def test_unanswerable_questions_are_augmented() -> None:
    augmenter = Augmenter([Casing(share=1.0, styles=("upper",))], fields=ContextFields())
    for answers in (None, {"text": [], "answer_start": []}, {"text": None, "answer_start": None}):
        after, _ = augmenter.apply(context(answers=answers), seed=0, epoch=0, row=0)
        assert after["context"] == "ANN CAME. BOB LEFT. CID SLEPT."
        assert after["question"] == "WHO?"
        assert after["answers"] == answers


def tagged(tokens: str, tags: str) -> dict[str, Any]:
    return {"tokens": tokens.split(), "tags": tags.split()}


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (tagged("a b", "O"), "words_and_labels_differ_in_number"),
        (tagged("", ""), "no_words"),
        ({"tokens": [1], "tags": ["O"]}, "no_words"),
        (tagged("a b", "O I-PER"), "invalid_bio"),
        (tagged("a b", "B-LOC I-PER"), "invalid_bio"),
        (tagged("a b c", "B-X E-X I-X"), "invalid_bio"),
        (tagged("a b", "O PER"), "invalid_bio"),
    ],
)
def test_odd_labels_are_left_alone(sample: dict[str, Any], reason: str) -> None:
    augmenter = Augmenter([Casing(share=1.0)], fields=TaggedFields())
    after, changes = augmenter.apply(sample, seed=0, epoch=0, row=0)
    assert after is sample
    assert changes.skipped == reason


def test_numbers_in_the_place_of_labels_stand_for_them() -> None:
    name = functools.partial(tag_name, labels=("O", "B-PER", "I-PER"), task="t")
    fields = TaggedFields(name=name)
    sample = {"tokens": ["ann", "lee", "ran"], "tags": [1, "2", np.int64(0)]}
    augmenter = Augmenter([Casing(share=1.0, styles=("upper",))], fields=fields)
    after, changes = augmenter.apply(sample, seed=0, epoch=0, row=0)
    assert changes.skipped is None
    assert after["tokens"][:2] == ["ann", "lee"]  # an entity stays as it is
    assert after["tokens"][2] != "ran"
    assert after["tags"] == ["B-PER", "I-PER", "O"]
    assert name("B-PER") == "B-PER"
    assert name(7) == 7  # encoding says that it is not known
    assert tag_name(1, labels=("0", "1"), task="t") == "1"  # a label of its own


def test_mentions_are_replaced_with_their_labels() -> None:
    rows = [(["Ann", "saw", "New", "York"], ["B-PER", "O", "B-LOC", "I-LOC"]), (["Ann"], ["B-PER"])]
    table = collect_mentions(rows)
    assert table.mentions == {"LOC": (("New", "York"),), "PER": (("Ann",),)}
    assert collect_mentions(rows, most=0).mentions == {"LOC": (), "PER": ()}
    augmenter = Augmenter([MentionReplacement(table, share=1.0)], fields=TaggedFields())
    sample = tagged("Bob left Rome , Oslo", "B-PER O B-LOC O B-ORG")
    after, changes = augmenter.apply(sample, seed=0, epoch=0, row=0)
    assert after == tagged("Ann left New York , Oslo", "B-PER O B-LOC I-LOC O B-ORG")
    assert changes.edits == {"mention_replacement": 2}
    bioes = tagged("Bob Ray left", "B-PER E-PER O")
    assert augmenter.apply(bioes, seed=0, epoch=0, row=0)[0] is bioes
    text = Augmenter([MentionReplacement(table)], fields=TextFields(("text",)))
    assert text.apply({"text": "Bob"}, seed=0, epoch=0, row=0)[1] == Changes()


def test_labels_without_an_outside() -> None:
    fields = TaggedFields(outside=None)
    sample = tagged("dogs sleep quick now", "NOUN VERB ADV ADV")
    changing = Augmenter(
        [WordReplacement(LEXICON, share=1.0), PunctuationInsertion()], fields=fields
    )
    after, changes = changing.apply(sample, seed=0, epoch=0, row=0)
    assert after == tagged("dogs sleep fast now", "NOUN VERB ADV ADV")
    assert changes.edits == {"word_replacement": 1}
    dropping = Augmenter([WordDropout(share=0.5)], fields=fields)
    pairs = set(zip(sample["tokens"], sample["tags"], strict=True))
    for row in range(20):
        after, _ = dropping.apply(sample, seed=0, epoch=0, row=row)
        assert set(zip(after["tokens"], after["tags"], strict=True)) <= pairs


def test_a_labelled_word_gets_no_two_words() -> None:
    augmenter = Augmenter([WordReplacement(LEXICON, share=1.0)], fields=TaggedFields())
    for row in range(30):
        after, _ = augmenter.apply(tagged("a dog", "O O"), seed=0, epoch=0, row=row)
        assert after["tokens"] == ["a", "hound"]


def test_statistics() -> None:
    one, other = AugmentStatistics(), AugmentStatistics()
    one.add(Changes({"casing": 2}))
    one.add(Changes())
    other.add(Changes({"casing": 1, "word_replacement": 1}))
    other.add(Changes(skipped="no_text"))
    one.merge(other)
    assert one.to_json() == {
        "samples": 4,
        "changed": 2,
        "edits": {"casing": 3, "word_replacement": 1},
        "samples_by_transform": {"casing": 2, "word_replacement": 1},
        "skipped": {"no_text": 1},
    }


def test_description_is_json_and_sees_every_option() -> None:
    def describe(**change: Any) -> dict[str, Any]:
        options = {"lexicon": LEXICON, "share": 0.2, **change}
        transforms = [WordReplacement(**options), KeyboardTypos(), MentionReplacement(MENTIONS)]
        return Augmenter(transforms, fields=TaggedFields()).describe()

    assert json.loads(json.dumps(describe())) == describe()
    assert describe(share=0.3) != describe()
    assert describe(lexicon=Lexicon({"a": ("b",)})) != describe()
    assert describe(stop_words=frozenset(("a",))) != describe()


def test_bad_options() -> None:
    bad: list[tuple[Any, dict[str, Any], str]] = [
        (Casing, {"share": 1.5}, r"casing.share must lie in \[0, 1\], got 1.5"),
        (WordDropout, {"chance": -1}, "word_dropout.chance"),
        (WordDropout, {"placeholder": " "}, "must not be blank"),
        (Casing, {"styles": ("odd",)}, "styles must be among lower, upper, title"),
        (CharacterNoise, {"kinds": ()}, "kinds must be 'swap', 'drop' or both"),
        (SentenceShuffling, {"chance": 2}, "sentence_shuffling.chance"),
        (KeyboardTypos, {"share": -0.1}, "keyboard_typos.share"),
        (PunctuationInsertion, {"share": 7}, "punctuation_insertion.share"),
    ]
    for kind, options, message in bad:
        with pytest.raises(ValueError, match=message):
            kind(**options)
    with pytest.raises(ValueError, match="needs at least one transform"):
        Augmenter([], fields=TextFields(("text",)))


# Frozen: a change of these is a change of every augmented run and needs a new version.
GOLDEN_VERSION = 1
GOLDEN_DRAWS = [92, 71, 875, 265, 193]
GOLDEN_ORDER = [3, 2, 4, 6, 1, 5, 7, 0]
GOLDEN_TEXTS = [
    "the quikc fox ? jumps. 北大学很好。 Over : lahz dogs ( cats), it . isn't 3.14!",
    "The quick browb fox jmps. 北京大学很。 Oer LAZY dos (And cqts), it isn't 3.14!",
    "北京学很好。 Oevr lazy (and cats), it isn't 3.14! The fast brown.",
]
GOLDEN_TAGGED = [
    ("Ada Lovelace ! Bob met quick .", "B-PER I-PER O B-PER O O O"),
    ("Ada Lovelace ! ; Ada Lovelace met FAST .", "B-PER I-PER O O B-PER I-PER O O O"),
    ("Ada Lovelace met ; the dog . Ann Lee !", "B-PER I-PER O O O O O B-PER I-PER O"),
]


def every_transform() -> list[Transform]:
    return [
        WordReplacement(LEXICON, share=0.5),
        SentenceShuffling(),
        KeyboardTypos(share=0.2),
        CharacterNoise(share=0.2),
        Casing(share=0.2),
        WordDropout(share=0.2),
        PunctuationInsertion(chance=0.5),
        MentionReplacement(MENTIONS, share=0.5),
    ]


def golden_texts() -> list[str]:
    text = "The quick brown fox jumps. Over lazy dogs (and cats), it isn't 3.14! 北京大学很好。"
    return [augment(text, *every_transform(), seed=9, row=row) for row in range(3)]


def golden_tagged() -> list[tuple[str, str]]:
    sample = tagged("Bob met the quick dog . Ann Lee slept !", "B-PER O O O O O B-PER I-PER O O")
    augmenter = Augmenter(every_transform(), fields=TaggedFields())
    found = [augmenter.apply(sample, seed=9, epoch=e, row=4)[0] for e in range(3)]
    return [(" ".join(after["tokens"]), " ".join(after["tags"])) for after in found]


def test_golden_samples() -> None:
    assert AUGMENT_ALGORITHM_VERSION == GOLDEN_VERSION
    draws = Draws(7, 0, 3, 0, "text")
    assert [draws.below(1000) for _ in range(5)] == GOLDEN_DRAWS
    assert Draws(7, 0, 3, 0, "text").permutation(8) == GOLDEN_ORDER
    assert golden_texts() == GOLDEN_TEXTS
    assert golden_tagged() == GOLDEN_TAGGED


def test_modules_do_not_import_torch() -> None:
    code = "import sys, dist_ft.data.augment.augmenter; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
