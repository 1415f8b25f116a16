"""Plots as PNG, for slides and chats that take no SVG; drawn by resvg, an extra."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, distribution

from dist_ft.report.svg import STYLE, Plot

# Twice the size of the SVG: sharp on screens of high density and in print.
_ZOOM = 2
_MEDIA = re.compile(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*\s*\}")
_VARIABLE = re.compile(r"--([\w-]+):([^;}]+)")
# Machines that train often have no fonts, and text is left out then: the font is a package, too.
_FONT_PACKAGE, _FONT_FAMILY, _FONT_FILES = "font-roboto", "Roboto", ("Regular", "Bold")
_CLASS = re.compile(r"\.(c\d)\{--c:([^}]+)\}")


def can_draw() -> bool:
    """Return whether the extra ``[report]`` is there."""
    return importlib.util.find_spec("resvg_py") is not None and bool(_fonts())


def _fonts() -> list[str]:
    try:
        files = distribution(_FONT_PACKAGE).files or []
    except PackageNotFoundError:
        return []
    wanted = {f"{_FONT_FAMILY}-{weight}.ttf" for weight in _FONT_FILES}
    return [str(file.locate()) for file in files if file.name in wanted]


def png_of(plot: Plot) -> bytes:
    """Return the plot as a PNG on white, in the light colours.

    resvg has no CSS variables and no media queries, so their values are written in place.

    Raises:
        ValueError: resvg can't draw it.
    """
    import resvg_py

    body = plot.body.replace(">", f"><style>{_plain_style()}</style>", 1)
    drawn = resvg_py.svg_to_bytes(
        svg_string=body,
        background="#ffffff",
        zoom=_ZOOM,
        skip_system_fonts=True,  # the same picture everywhere
        font_files=_fonts(),
        sans_serif_family=_FONT_FAMILY,
    )
    return bytes(drawn)


def _plain_style() -> str:
    light = _MEDIA.sub("", STYLE)
    colours = dict(_CLASS.findall(light))
    light = _CLASS.sub("", light)
    values = dict(_VARIABLE.findall(light))
    light = re.sub(r"svg\{--[^}]*\}", "svg{font:12px sans-serif}", light)
    # What a curve's class colours is inside an element of that class, or has it itself.
    rules = re.findall(r"[^{}]+\{[^}]*\}", light)
    plain: list[str] = []
    for rule in rules:
        if "var(--c)" in rule:
            selector, _, rest = rule.strip().partition("{")
            for name, colour in colours.items():
                both = f"{selector}.{name},.{name} {selector}"
                plain.append(f"{both}{{{rest.replace('var(--c)', colour)}")
        else:
            plain.append(re.sub(r"var\(--([\w-]+)\)", lambda m: values[m[1]], rule.strip()))
    return "\n".join(plain)
