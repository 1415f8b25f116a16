"""`python -m dist_ft` with steps that take a tenth of a second: a job's time passes, not CPU time.

Stands in for a job's interpreter: `PYTHON=slow.sh`, which runs `python slow.py -m dist_ft ...`.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from dist_ft.cli import main
from dist_ft.train import loop

STEP_S = 0.1


def _slowly(agree: Any) -> Any:
    def agree_later(*args: Any, **kwargs: Any) -> Any:
        time.sleep(STEP_S)
        return agree(*args, **kwargs)

    return agree_later


if __name__ == "__main__":
    assert sys.argv[1:3] == ["-m", "dist_ft"]
    loop.agree = _slowly(loop.agree)
    sys.exit(main(sys.argv[3:]))
