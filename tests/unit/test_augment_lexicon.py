import importlib.metadata
import json
from pathlib import Path

import pytest

from dist_ft.data.augment.lexicon import (
    Lexicon,
    find_wordnet,
    packaged_keyboard,
    packaged_misspellings,
    read_lexicon,
    read_wordnet,
)


def test_read_lexicon(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text(
        "\ufeff# comment\nbig, large , huge\nauto => car, motor car # more\nBig, grand\n"
    )
    lexicon = read_lexicon(path)
    assert lexicon.alternatives("BIG") == ("large", "huge", "grand")
    assert lexicon.alternatives("auto") == ("car", "motor car")
    assert lexicon.alternatives("car") == ()
    assert (
        lexicon.fingerprint == read_lexicon(path).fingerprint != Lexicon({"a": ("b",)}).fingerprint
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\n", r"words.txt, line 1: 'one' must be"),
        (b"a, b\n=> c\n", r"words.txt, line 2: '=> c' must be"),
        (b"a =>\n", "line 1"),
        (b"# nothing\n", "has no words with alternatives"),
        (b"a, A\n", "has no words with alternatives"),
        (b"\xff\n", "is not UTF-8"),
        (None, "is missing"),
    ],
)
def test_bad_lexicon(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_lexicon(path)


def write_wordnet(folder: Path) -> None:
    """Four words in WordNet's own format; "run" is a noun and a verb, "slowly" has two senses."""
    licence = "  1 This software and database is being provided to you\n"
    files = {
        "index.noun": "car n 1 1 @ 1 0 00000100\nrun n 1 0 1 0 00000200\n",
        "data.noun": "00000100 06 n 03 car 0 motor_car 0 auto 0 001 @ 00000300 n 0000 | a car\n"
        "00000200 04 n 02 run 0 tally 0 000 | a score\n",
        "index.verb": "run v 1 0 1 0 00000400\n",
        "data.verb": "00000400 38 v 02 run 0 go 0 000 01 + 08 00 | move\n",
        "index.adj": "ill a 1 0 1 0 00000500\n",
        "data.adj": "00000500 00 a 02 ill(p) 0 sick 0 000 | not well\n",
        "index.adv": "slowly r 2 0 2 1 00000600 00000700\n",
        "data.adv": "00000600 02 r 02 slowly 0 slow 0 000 | x\n"
        "00000700 02 r 02 slowly 0 tardily 0 000 | y\n",
    }
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(licence + content)


def test_read_wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wordnet(tmp_path / "wn")
    lexicon = read_wordnet(tmp_path / "wn")
    assert lexicon.words == {
        "car": ("motor car", "auto"), "ill": ("sick",), "slowly": ("slow",)
    }  # fmt: skip
    more = read_wordnet(tmp_path / "wn", senses=2, only_one_part=False, parts=("verb", "adverb"))
    assert more.words == {"run": ("go",), "slowly": ("slow", "tardily")}
    with pytest.raises(ValueError, match=r"parts of speech \['article'\] are unknown"):
        read_wordnet(tmp_path / "wn", parts=("article",))
    with pytest.raises(ValueError, match=r"index\.noun is missing"):
        read_wordnet(tmp_path)
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path / "wn"))
    assert find_wordnet() == tmp_path / "wn"
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    with pytest.raises(RuntimeError, match="apt-get install wordnet-base"):
        find_wordnet()


def test_packaged_lists() -> None:
    try:
        importlib.metadata.distribution("nlpaug")
    except importlib.metadata.PackageNotFoundError:
        for missing in (packaged_misspellings, lambda: packaged_keyboard("en")):
            with pytest.raises(RuntimeError, match="pip install --no-deps nlpaug"):
                missing()
        with pytest.raises(ValueError, match="is a code such as 'en'"):
            packaged_keyboard("../en")
        return
    assert "becasue" in packaged_misspellings().alternatives("because")
    assert set(packaged_keyboard("en")["g"]) == set("rtyfhvbn")


def test_lists_of_an_installed_nlpaug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A distribution as pip leaves it, with files in nlpaug's formats.
    (tmp_path / "nlpaug-9.dist-info").mkdir()
    (tmp_path / "nlpaug-9.dist-info" / "METADATA").write_text("Name: nlpaug\nVersion: 9\n")
    spelling = tmp_path / "nlpaug/res/word/spelling/spelling_en.txt"
    spelling.parent.mkdir(parents=True)
    spelling.write_text("because becasue becouse\nalone\n\n")
    keyboard = tmp_path / "nlpaug/res/char/keyboard/en.json"
    keyboard.parent.mkdir(parents=True)
    keyboard.write_text(json.dumps({"g": ["f", "H", "5", "h"], "1": ["q"], "q": ["1"]}))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert packaged_misspellings().words == {"because": ("becasue", "becouse")}
    assert packaged_keyboard("en") == {"g": "fh"}
    with pytest.raises(RuntimeError, match=r"doesn't hold nlpaug/res/char/keyboard/xx\.json"):
        packaged_keyboard("xx")
