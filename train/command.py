"""How every entry script ends: quietly, or with one sentence and a non-zero exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def command_line(main: Callable[[], None]) -> None:
    """Runs a script's main function; an expected error becomes one sentence on stderr and exit status 1.

    Set BILINEAR_TC_TRACEBACK=1 to see where it came from.
    """
    try:
        main()
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("BILINEAR_TC_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
