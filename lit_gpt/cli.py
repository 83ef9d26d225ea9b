"""From a typed function to a command: its signature is the flags, its docstring the help, a user's mistake one line."""

import os
import sys
from collections.abc import Callable


def run(main: Callable[..., int | None]) -> None:
    """Run `main` with the command line's flags, or those of a file given by `--config`.

    A `ValueError` or `OSError` is what a user can mend: it is printed as one line and the exit status is 1 (a mistyped
    flag gives 2). Anything else is our mistake and keeps its traceback; `LIT_GPT_TRACEBACK=1` shows every traceback.
    """
    from jsonargparse import auto_cli

    try:
        sys.exit(auto_cli(main, as_positional=False))
    except (ValueError, OSError) as error:
        if os.environ.get("LIT_GPT_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
