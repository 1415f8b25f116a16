"""What a block policy says may ever train."""

import pytest

from dist_ft.freezing.policies import BlockPolicy
from dist_ft.freezing.schedule import BlockDraw, LayerOrder

BLOCKS = [f"block.{i}" for i in range(6)]
ORDER = LayerOrder.of(
    [("embeddings", "embeddings"), *((b, "block") for b in BLOCKS), ("head.a", "head")]
)


@pytest.mark.parametrize("kind", ["random", "ascending", "descending"])
@pytest.mark.parametrize("total_steps", [1, 4, 5, 9, 300])
def test_the_universe_is_what_trains_within_the_run(kind: str, total_steps: int) -> None:
    policy = BlockPolicy(BlockDraw(ORDER, 1, 4, kind, ("head.a",), 3), total_steps)
    trained = {g for step in range(total_steps) for g in policy.phase_at(step).trainable}
    assert policy.universe() == trained
    assert (len(trained) == 1 + len(BLOCKS)) == (total_steps == 300)


def test_draws_after_the_end_do_not_count() -> None:
    policy = BlockPolicy(BlockDraw(ORDER, 2, 5, "ascending", ("head.a",), 0), 10)
    assert policy.universe() == {"block.0", "block.1", "block.2", "block.3", "head.a"}
