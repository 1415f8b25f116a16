import sys

import pytest

from dist_ft.data.augment.augmenter import (
    Augmenter,
    Transform,
)
from dist_ft.data.augment.draws import Draws
from dist_ft.data.augment.lexicon import (
    Lexicon,
)
from dist_ft.data.augment.noise import (
    Casing,
    CharacterNoise,
    KeyboardTypos,
    PunctuationInsertion,
    qwerty,
)
from dist_ft.data.augment.pieces import Line, Piece, make_segmenter, split_text
from dist_ft.data.augment.samples import TextFields
from dist_ft.data.augment.sentences import SentenceShuffling
from dist_ft.data.augment.words import WordDropout, WordReplacement

LEXICON = Lexicon({"quick": ("fast",), "the": ("thee",), "dog": ("domestic dog", "hound")})


def augment(text: str, *transforms: Transform, **key: int) -> str:
    augmenter = Augmenter(transforms, fields=TextFields(("text",)))
    return augmenter.apply({"text": text}, **{"seed": 0, "epoch": 0, "row": 0, **key})[0]["text"]


def words_of(text: str) -> list[str]:
    return [piece.text for piece in split_text(text) if piece.kind == "word"]


def test_words_of_many_scripts() -> None:
    cases = {
        "It isn't 3.14, John\u2019s (see 12:30)!": "It isn't 3.14 John\u2019s see 12:30",
        "cafe\u0301 na\u00efve हिन्दी": "cafe\u0301 na\u00efve हिन्दी",
        "我爱 C++ 和 AI。": "我 爱 C 和 AI",
        "ok \U0001f469\u200d\U0001f467 👍": "ok \U0001f469\u200d\U0001f467 👍",
        "well-known_x": "well known x",
    }
    for text, words in cases.items():
        assert words_of(text) == words.split()


def test_segmentation_is_chosen_by_name() -> None:
    assert make_segmenter("characters") is None
    with pytest.raises(ValueError, match="'words' is unknown: choose characters or jieba"):
        make_segmenter("words")
    pairs = lambda text: [text[i : i + 2] for i in range(0, len(text), 2)]  # noqa: E731
    found = [piece.text for piece in split_text("我们喜欢 x", segmenter=pairs)]
    assert found == ["我们", "喜欢", " ", "x"]
    with pytest.raises(ValueError, match="the segmenter changed the text"):
        split_text("我们", segmenter=lambda _: ["我"])


def test_jieba() -> None:
    pieces = split_text("我们喜欢北京大学。", segmenter=make_segmenter("jieba"))
    assert [piece.text for piece in pieces] == ["我们", "喜欢", "北京大学", "。"]


def test_missing_jieba_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(RuntimeError, match=r"pip install 'dist-ft\[chinese\]'"):
        make_segmenter("jieba")


def test_synonyms_keep_case_stop_words_and_spaces() -> None:
    every = WordReplacement(LEXICON, share=1.0)
    assert augment("The Quick fox, QUICK!  quick", every) == "The Fast fox, FAST!  fast"
    found = {augment("a dog", every, row=row) for row in range(30)}
    assert found == {"a domestic dog", "a hound"}
    assert augment("the", WordReplacement(LEXICON, share=1.0, stop_words=())) == "thee"
    assert augment("quick", WordReplacement(LEXICON, share=0.0)) == "quick"


def test_share_and_chance_are_frequencies() -> None:
    text = " ".join(["quick"] * 50)
    replaced = [
        augment(text, WordReplacement(LEXICON, share=0.3), row=r).count("fast") for r in range(200)
    ]
    # Five standard deviations of a binomial count of 10,000.
    assert abs(sum(replaced) - 3000) < 5 * 46
    sampled = WordReplacement(LEXICON, share=1.0, chance=0.25)
    touched = sum(augment("quick", sampled, row=row) == "fast" for row in range(2000))
    assert abs(touched - 500) < 5 * 20


def test_word_dropout_leaves_clean_spaces() -> None:
    found = {augment("one two, three.", WordDropout(share=0.5), row=row) for row in range(300)}
    assert found == {
        "one two, three.", "one two,.", "one, three.", "one,.", "two, three.", "two,.", ", three."
    }  # fmt: skip
    assert augment("alone", WordDropout(share=1.0)) == "alone"
    assert augment("我们爱", WordDropout(share=1.0)) in {"我", "们", "爱"}
    masked = WordDropout(share=1.0, placeholder="[MASK]")
    assert augment("a b c", masked) == "a [MASK] [MASK]"
    ends = {augment("a b", WordDropout(share=0.5), row=row) for row in range(50)}
    assert ends == {"a b", "a", "b"}


def test_typing_errors_are_neighbours() -> None:
    beside = qwerty()
    assert set(beside["g"]) == set("fhtyvb")
    assert all(letter in beside[other] for letter in beside for other in beside[letter])
    for row in range(100):
        found = augment("Government", KeyboardTypos(share=1.0), row=row)
        (place,) = [i for i in range(10) if found[i] != "Government"[i]]
        assert found[place].lower() in beside["Government"[place].lower()]
        assert found[place].isupper() == (place == 0)
    assert augment("the 1234 cafe\u0301 北京大学", KeyboardTypos(share=1.0)) == (
        "the 1234 cafe\u0301 北京大学"
    )


def test_character_noise() -> None:
    swapped = {
        augment("abcde", CharacterNoise(share=1.0, kinds=("swap",)), row=r) for r in range(99)
    }
    assert swapped == {"acbde", "abdce", "abced"}
    dropped = {
        augment("abcde", CharacterNoise(share=1.0, kinds=("drop",)), row=r) for r in range(99)
    }
    assert dropped == {"acde", "abde", "abce"}
    assert augment("abc 12345 हिन्दी", CharacterNoise(share=1.0)) == "abc 12345 हिन्दी"
    pieces = [Piece("北京大学", "word")]
    line = Line("text", pieces)
    assert CharacterNoise(share=1.0, kinds=("swap",)).apply(line, Draws("x")) == 1
    assert sorted(line.text) == sorted("北京大学")


def test_casing() -> None:
    assert augment("aB straße", Casing(share=1.0, styles=("upper",))) == "AB STRASSE"
    assert augment("aB cD", Casing(share=1.0, styles=("title",))) == "Ab Cd"
    assert augment("AB 我", Casing(share=1.0, styles=("lower",))) == "ab 我"


def test_punctuation_is_put_between_words() -> None:
    for row in range(200):
        found = augment("one two three-four five six", PunctuationInsertion(), row=row)
        marks = [word for word in found.split() if word in tuple(".;?:!,")]
        assert 1 <= len(marks) <= 2
        assert " ".join(w for w in found.split() if w not in marks) == "one two three-four five six"
    chinese = augment("我们喜欢学习", PunctuationInsertion(), row=1)
    assert len(chinese) > 6
    assert " " not in chinese
    assert augment("one two", PunctuationInsertion()) == "one two"


def test_sentences_change_places() -> None:
    text = 'First one. "Is it 3.14?" No!\nLast without end'
    found = {augment(text, SentenceShuffling(), row=row) for row in range(300)}
    assert len(found) == 6
    for shuffled in found:
        assert shuffled.endswith("\nLast without end")
        for sentence in ("First one.", '"Is it 3.14?"', "No!"):
            assert sentence in shuffled
    assert {augment("我爱你。你呢\uff1f好", SentenceShuffling(), row=row) for row in range(50)} == {
        "我爱你。你呢\uff1f好", "你呢\uff1f我爱你。好"
    }  # fmt: skip
    assert {augment("Yes. 好。No.", SentenceShuffling(), row=row) for row in range(200)} >= {
        "No. 好。Yes.", "好。 Yes. No."
    }  # fmt: skip
    assert augment("only one.", SentenceShuffling()) == "only one."


def test_draws_are_uniform() -> None:
    draws = Draws("a", 1)
    values = [draws.uniform() for _ in range(20_000)]
    assert 0 <= min(values) < 0.001
    assert 0.999 < max(values) < 1
    assert abs(sum(values) / len(values) - 0.5) < 5 * 0.29 / 141
    counts = [0] * 7
    for _ in range(7000):
        counts[draws.below(7)] += 1
    assert max(abs(count - 1000) for count in counts) < 5 * 30
    assert sorted(draws.permutation(9)) == list(range(9))
