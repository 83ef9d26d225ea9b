"""Work in Python that is shared out over the cores."""

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
PR_SET_PDEATHSIG = 1  # of Linux: the signal that comes when the parent is gone
MOST = 8  # processes: each has a memory of its own
_work: Callable[[Any], Any]  # in a worker


def shared_out(work: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
    """The results of `work` in the order of the tasks, by a process per core; tasks and results are pickled.

    The processes are forked, so that they have all that `work` sees without a copy; they end with the thread that asks
    for the first result. One task alone, and all where a system cannot make processes so, are done here. Raises what
    `work` raises, and ChildProcessError if a process is killed.
    """
    pool = _pool(work, len(tasks))
    if pool is None:
        yield from map(work, tasks)
        return
    try:
        yield from pool.map(_do, tasks)
    except BrokenProcessPool as error:
        raise ChildProcessError("a process was killed; the system may have been short of memory") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _pool(work: Callable[[Any], Any], n_tasks: int) -> ProcessPoolExecutor | None:
    """Processes for so many tasks, if several can be had."""
    n = min(len(os.sched_getaffinity(0)), n_tasks, MOST) if sys.platform == "linux" else 1
    if n < 2 or multiprocessing.current_process().daemon:
        return None
    try:
        return ProcessPoolExecutor(n, multiprocessing.get_context("fork"), _start, (work,))
    except OSError:  # no shared memory to talk through
        return None


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process says what happens then
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nor does this one outlive it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken
    gc.disable()  # a look through what was there before would copy it


def _do(task: Any) -> Any:
    return _work(task)
