"""A freezing policy of your own: from the middle outwards."""

from dist_ft import LayerOrder, Phase, fine_tune
from dist_ft.freezing.policies import ScheduledPolicy


def middle_out(order: LayerOrder, total_steps: int) -> ScheduledPolicy:
    """Train the heads and the middle block first, then one block more on each side."""
    blocks, middle = order.blocks, len(order.blocks) // 2
    widths = range(middle + 1)
    phases = [
        Phase(
            index=width,
            start_step=width * total_steps // len(widths),
            trainable=order.sorted(
                [*blocks[max(0, middle - width) : middle + width + 1], *order.top, *order.heads]
            ),
        )
        for width in widths
    ]
    return ScheduledPolicy(phases)


run = fine_tune("tickets.yaml", overrides=["name=middle-out"], policy=middle_out)
