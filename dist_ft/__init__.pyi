"""What ``dist_ft`` offers, for type checkers: at run time a name is loaded on first use."""

from dist_ft.api import RunHandle, Stopped, fine_tune, open_run, plan
from dist_ft.freezing.policies import FreezePolicy
from dist_ft.freezing.schedule import LayerOrder, Phase
from dist_ft.recipe import RecipeError, load_recipe
from dist_ft.tasks.base import Choice
from dist_ft.tasks.generation import Generation
from dist_ft.tasks.question_answering import QuestionAnswering
from dist_ft.tasks.text_classification import TextClassification
from dist_ft.tasks.token_classification import TokenClassification
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
