"""Scripts in processes of their own that begin with torch imported, which is most of the time that a short one takes.

Run as a program this imports it once, and then reads requests, a line of JSON each: it forks, the child becomes the
script, and the exit status is answered. What is ours the child imports itself, as it does where a user starts it.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

LONGEST = 300  # seconds
IMPORTED = ("torch._dynamo", "lightning_fabric", "jsonargparse", "tokenizers")


@cache
def _program() -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(script: Path, flags: Sequence[str], cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run a script as `python script *flags` would, with the environment of now but for what imports read of it.

    Raises TimeoutError for one that hangs.
    """
    program = _program()
    assert program.stdin is not None
    assert program.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        argv = [str(script), *flags]
        request = {"argv": argv, "env": dict(os.environ), "cwd": str(cwd), "said": [str(path) for path in said]}
        print(json.dumps(request), file=program.stdin, flush=True)
        answer = program.stdout.readline()
        assert answer, "the process that starts scripts has ended"
        done = subprocess.CompletedProcess(argv, int(answer), *(path.read_text() for path in said))
    if done.returncode == -signal.SIGALRM:
        raise TimeoutError(f"{argv} took longer than {LONGEST} s:\n{done.stdout}\n{done.stderr}")
    return done


def _become(argv: list[str], env: Mapping[str, str], cwd: str, said: Sequence[str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, path in enumerate((os.devnull, *said)):
        os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
    signal.alarm(LONGEST)
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)  # as Python does for a script


def _wait() -> None:
    """Returns in a child, which is the script from then on, or when nobody can ask any more."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # what a child does not look through it need not copy
    while line := sys.stdin.readline():
        child = os.fork()
        if not child:
            _become(**json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


if __name__ == "__main__":
    _wait()
    status: object = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(bool(status)))  # taking all apart takes a second more
