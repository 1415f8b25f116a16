"""Distributed fine-tuning strategies for pre-trained transformers.

The names below are loaded when they are first used, so that importing ``dist_ft`` costs nothing.
"""

# What is in __all__ is loaded by __getattr__; type checkers read __init__.pyi.
# pyright: reportUnsupportedDunderAll=false

from __future__ import annotations

from importlib import import_module
from typing import Any

from dist_ft.version import __version__

__all__ = [
    "Choice",
    "FreezePolicy",
    "Generation",
    "LayerOrder",
    "Phase",
    "QuestionAnswering",
    "RecipeError",
    "RunHandle",
    "Stopped",
    "TextClassification",
    "TokenClassification",
    "__version__",
    "fine_tune",
    "load_recipe",
    "open_run",
    "plan",
]

_HOMES = {
    "dist_ft.api": ("RunHandle", "Stopped", "fine_tune", "open_run", "plan"),
    "dist_ft.freezing.policies": ("FreezePolicy",),
    "dist_ft.freezing.schedule": ("LayerOrder", "Phase"),
    "dist_ft.tasks.base": ("Choice",),
    "dist_ft.recipe": ("RecipeError", "load_recipe"),
    "dist_ft.tasks.generation": ("Generation",),
    "dist_ft.tasks.question_answering": ("QuestionAnswering",),
    "dist_ft.tasks.text_classification": ("TextClassification",),
    "dist_ft.tasks.token_classification": ("TokenClassification",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
