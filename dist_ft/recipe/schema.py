"""The recipe's schema as a tree: which keys a section has and what a place expects."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dist_ft.config import Recipe
from dist_ft.duration import Duration
from dist_ft.recipe.reading import RawPath

_PLAIN: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "write it like 2"),
    float: ("a number", "write it like 0.1"),
    bool: ("true or false", "write one of them without quotes"),
    str: ("text", "put it in quotes"),
    Path: ("a path", "write it like folder/file"),
    Duration: ("a duration", "write it like 3ep, 500step or 2e6tok"),
    list: ("a list", "write it like [a, b]"),
    tuple: ("a list", "write it like [a, b]"),
}
_SECTION = "a section of `key: value` lines"


@dataclass(frozen=True)
class Place:
    """What the schema expects at a place.

    Attributes:
        annotation: The type without Annotated and without None.
        discriminator: Key that selects the member of a tagged union.
        required: Whether the recipe must give it.
    """

    annotation: Any
    discriminator: str | None = None
    required: bool = False

    @property
    def members(self) -> tuple[Any, ...]:
        """The members of a union, or the type alone."""
        if get_origin(self.annotation) not in (Union, types.UnionType):
            return (self.annotation,)
        return tuple(_strip(member)[0] for member in get_args(self.annotation))

    @property
    def is_section(self) -> bool:
        """Whether this is one model with known keys."""
        return isinstance(self.annotation, type) and issubclass(self.annotation, BaseModel)

    @property
    def keys(self) -> tuple[str, ...]:
        """The known keys of a section, () for anything else."""
        return tuple(self.annotation.model_fields) if self.is_section else ()

    @property
    def tags(self) -> tuple[str, ...]:
        """What the discriminator of a tagged union may be."""
        if self.discriminator is None:
            return ()
        return tuple(_tag(member, self.discriminator) for member in self.members)

    def child(self, key: str | int) -> Place:
        """Return the place of a key or an item."""
        if self.is_section and key in self.annotation.model_fields:
            return _place_of_field(self.annotation.model_fields[key])
        arguments = get_args(self.annotation)
        if get_origin(self.annotation) in (list, tuple, dict) and arguments:
            position = key if isinstance(key, int) and key < len(arguments) else -1
            return _place(arguments[position])
        return Place(Any)

    def member(self, label: str) -> Place:
        """Return the member of a union that an error's location names."""
        for member in self.members:
            tag = _tag(member, self.discriminator) if self.discriminator else None
            if label in (tag, getattr(member, "__name__", None)):
                return Place(member)
        others = [member for member in self.members if not _is_model(member)]
        return Place(others[0] if others else Any)

    def expected(self) -> tuple[str, str]:
        """Return what must stand here, in words, and how to write it."""
        origin = get_origin(self.annotation) or self.annotation
        if self.discriminator:
            return _SECTION, f"start it with {self.discriminator}"
        if origin is Literal:
            return f"one of {', '.join(map(str, get_args(self.annotation)))}", "use one of them"
        if origin is dict or self.is_section:
            return _SECTION, "write its keys on indented lines below it"
        known = [_PLAIN[member] for member in (origin, *self.members) if member in _PLAIN]
        return known[0] if known else ("another value", "change it")


ROOT = Place(Recipe, required=True)


@dataclass(frozen=True)
class Location:
    """Where an error is.

    Attributes:
        path: Keys and indices in the recipe.
        place: What the schema expects there.
        parent: The section (or list) around it.
        variants: For each plain union passed: its path and whether the member is a section.
    """

    path: RawPath
    place: Place
    parent: Place
    variants: tuple[tuple[RawPath, bool], ...]


def locate(loc: tuple[str | int, ...]) -> Location:
    """Return the place in the recipe of pydantic's error location, which also names unions."""
    path: RawPath = ()
    place, parent = ROOT, ROOT
    variants: list[tuple[RawPath, bool]] = []
    for element in loc:
        if len(place.members) > 1:
            chosen = place.member(str(element))
            if place.discriminator is None:
                variants.append((path, chosen.is_section))
            place = Place(chosen.annotation, required=place.required)
            continue
        path = (*path, element)
        parent, place = place, place.child(element)
    return Location(path, place, parent, tuple(variants))


def homes_of_key(key: str) -> list[str]:
    """Return the dotted paths of the sections (tasks left out) where a key is valid."""
    return [".".join((*path, key)) for path, keys in _sections(ROOT, ()) if key in keys]


def _sections(place: Place, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    keys: set[str] = set()
    for member in place.members:
        keys.update(Place(member).keys)
    if not keys:
        return
    yield path, keys
    if place.is_section:
        for key in place.keys:
            yield from _sections(place.child(key), (*path, key))


def _place_of_field(info: FieldInfo) -> Place:
    place = _place(info.annotation)
    discriminator = info.discriminator if isinstance(info.discriminator, str) else None
    return Place(place.annotation, place.discriminator or discriminator, info.is_required())


def _place(annotation: Any) -> Place:
    annotation, discriminator = _strip(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        members = [m for m in get_args(annotation) if m is not type(None)]
        if len(members) == 1:
            inner = _place(members[0])
            return Place(inner.annotation, inner.discriminator or discriminator)
        annotation = Union[tuple(members)]  # noqa: UP007 (the members are only known here)
    return Place(annotation, discriminator)


def _strip(annotation: Any) -> tuple[Any, str | None]:
    discriminator = None
    while get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
        for item in metadata:
            if isinstance(item, FieldInfo) and isinstance(item.discriminator, str):
                discriminator = item.discriminator
    return annotation, discriminator


def _tag(member: Any, discriminator: str) -> str:
    return str(get_args(member.model_fields[discriminator].annotation)[0])


def _is_model(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, BaseModel)
