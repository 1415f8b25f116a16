"""A recipe that is being translated, and what could not be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dist_ft.importing.values import as_flag, as_number, as_text, as_whole

T = TypeVar("T")
Convert = Callable[[Any, str], T]
Source = Mapping[str, Any]


@dataclass
class Draft:
    """What has been translated so far.

    Attributes:
        source: The other trainer's keys and values.
        folder: Where its relative paths start from.
        ranks: On how many ranks it ran, for the global batch.
        recipe: The recipe's sections.
        notes: What was left out or guessed, a sentence each.
        used: Keys of the source that were translated or are known not to matter.
    """

    source: Source
    folder: Path
    ranks: int
    recipe: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def take(self, *keys: str) -> Any:
        """Return the value of the first key that the source has, None without one."""
        return self.take_as(lambda value, _: value, *keys)

    def take_as(self, convert: Convert[T], *keys: str) -> T | None:
        """Return the value of the first key that the source has, None without one.

        Args:
            convert: Gets the value and its key, see `values`.
            keys: Names of the same thing.
        """
        self.used.update(keys)
        given = next((key for key in keys if self.source.get(key) is not None), None)
        return None if given is None else convert(self.source[given], given)

    def number(self, *keys: str) -> float | None:
        """Return a number, as `take_as` does."""
        return self.take_as(as_number, *keys)

    def whole(self, *keys: str) -> int | None:
        """Return a whole number, as `take_as` does."""
        return self.take_as(as_whole, *keys)

    def text(self, *keys: str) -> str | None:
        """Return a text, as `take_as` does."""
        return self.take_as(as_text, *keys)

    def flag(self, *keys: str) -> bool:
        """Return whether a key is switched on, as `take_as` does."""
        return bool(self.take_as(as_flag, *keys))

    def put(self, path: str, value: Any) -> None:
        """Set a dotted path of the recipe; None sets nothing."""
        if value is None:
            return
        section = self.recipe
        *parents, last = path.split(".")
        for part in parents:
            section = section.setdefault(part, {})
        section[last] = value

    def move(self, key: str, path: str, convert: Convert[Any]) -> None:
        """Translate a key to a dotted path of the recipe."""
        self.put(path, self.take_as(convert, key))

    def note(self, text: str) -> None:
        """Remember what the user has to look at."""
        self.notes.append(text)

    def ignore(self, *keys: str) -> None:
        """Mark keys that a recipe does not need."""
        self.used.update(keys)

    def finish(self) -> None:
        """Note every key that nothing has looked at."""
        for key, value in self.source.items():
            if key not in self.used and value not in (None, False, "", [], {}):
                self.note(f"not translated: {key} = {value!r}")
