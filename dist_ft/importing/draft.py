"""A recipe that is being translated, and what could not be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        found = None
        for key in keys:
            self.used.add(key)
            if found is None and self.source.get(key) is not None:
                found = self.source[key]
        return found

    def put(self, path: str, value: Any) -> None:
        """Set a dotted path of the recipe; None sets nothing."""
        if value is None:
            return
        section = self.recipe
        *parents, last = path.split(".")
        for part in parents:
            section = section.setdefault(part, {})
        section[last] = value

    def move(self, key: str, path: str, convert: Callable[[Any], Any] = lambda v: v) -> None:
        """Translate a key to a dotted path of the recipe."""
        value = self.take(key)
        if value is not None:
            self.put(path, convert(value))

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
