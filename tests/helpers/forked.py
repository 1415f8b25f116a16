"""What must not happen in the test's own process."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def in_a_fork(action: Callable[[], None]) -> None:
    """Run `action` in a fork of this process; fail if it does."""
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "see its output above"
        return
    code = 1
    try:
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)
