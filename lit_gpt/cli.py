"""From a typed function to a command: its signature is the flags, its docstring the help, a user's mistake one line."""

import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

YAML = "yaml without aliases"


def run(main: Callable[..., int | None]) -> None:
    """Run `main` with the command line's flags, or those of a file given by `--config`.

    What a user can mend, a `ValueError`, an `OSError` or a lack of memory, is printed as one line, and the exit status
    is 1 (a mistyped flag gives 2). Anything else is our mistake and keeps its traceback; `LIT_GPT_TRACEBACK=1` shows
    every traceback.
    """
    from jsonargparse import auto_cli, set_loader
    from yaml import YAMLError

    set_loader(YAML, _load_yaml, (YAMLError, ValueError))
    try:
        sys.exit(auto_cli(main, as_positional=False, parser_mode=YAML))
    except SystemExit as stop:
        if stop.code == 2 and (config := _config()):
            print(f"flags were read from {config} too", file=sys.stderr)
        raise
    except (ValueError, OSError, TypeError) as error:
        reached = any(frame.f_code is main.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))
        if os.environ.get("LIT_GPT_TRACEBACK") or (reached and isinstance(error, TypeError)):
            raise
        config = "" if reached else _config()
        if config and str(error).startswith("--"):  # a setting's own check
            error = ValueError(f"{error} (flags were read from {config} too)")
        elif config:
            is_group = isinstance(error, TypeError)
            reason = "a group of settings, such as train, holds something else" if is_group else error
            error = ValueError(f"{config} cannot be read: {reason}")
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        from lit_gpt.runtime import is_out_of_memory

        if os.environ.get("LIT_GPT_TRACEBACK") or not is_out_of_memory(error):
            raise
        tried = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        told = f" ({tried[0].lower()})" if tried else ""
        print(f"error: out of memory{told}; see tutorials/oom.md for what takes less", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _config() -> str:
    """The file that `--config` names, if it was given."""
    for word, following in zip(sys.argv[1:], [*sys.argv[2:], ""], strict=True):
        if word == "--config" or word.startswith("--config="):
            return word.partition("=")[2] or following
    return ""


def _load_yaml(text: str) -> Any:
    """A value, safely: no tag makes an object, and no alias makes a few lines mean millions."""
    import yaml
    from jsonargparse import get_loader

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=loader)):
        raise yaml.YAMLError("aliases (*name) are not read: write the value itself")
    return get_loader("yaml")(text)
