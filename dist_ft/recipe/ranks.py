"""Whether a recipe can be trained on a number of ranks."""

from __future__ import annotations

from dist_ft.config import Recipe


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """Check that the global batch can be shared out over the ranks.

    Raises:
        ValueError: If it cannot, or the reference engine is to run on several ranks.
    """
    micro_batches = recipe.train.global_batch_size // recipe.train.micro_batch_size
    if recipe.train.micro_batch_tokens is not None:
        # As many micro-batches as ranks can always be made, down to one row each.
        if recipe.train.global_batch_size < ranks:
            raise ValueError(
                f"train.global_batch_size: {recipe.train.global_batch_size} rows are too few for "
                f"{ranks} ranks: start fewer ranks or raise it"
            )
    elif micro_batches % ranks:
        fits = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
        raise ValueError(
            f"train.global_batch_size: {recipe.train.global_batch_size} rows in micro-batches of "
            f"{recipe.train.micro_batch_size} make {micro_batches} micro-batches, which cannot be "
            f"shared equally by {ranks} ranks: start {' or '.join(map(str, fits))} "
            f"{'rank' if fits == [1] else 'ranks'}, or change a batch size"
        )
    if recipe.engine.type == "reference" and ranks > 1:
        raise ValueError(f"engine.type: reference runs on one rank, got {ranks}: use deepspeed")
