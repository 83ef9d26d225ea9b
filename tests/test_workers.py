"""Work that is shared out over processes is that of one."""

import os
import signal
import sys

import pytest

from lit_gpt import workers
from lit_gpt.workers import shared_out

ONE = "one process"


@pytest.fixture(params=[ONE, "two processes"])
def n_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == ONE:
        monkeypatch.setattr(workers, "MOST", 1)
    elif sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core, or a system that does not fork")
    return request.param


def test_results_come_in_order(n_processes: str) -> None:
    by = []

    def work(task: int) -> tuple[int, int]:
        return task * task, os.getpid()

    for number, (square, process) in enumerate(shared_out(work, range(100))):
        assert square == number**2
        by.append(process == os.getpid())
    assert by == [n_processes == ONE] * 100
    assert list(shared_out(work, [])) == []


def test_an_error_is_the_works_own(n_processes: str) -> None:
    def work(task: int) -> int:
        if task == 3:
            raise ValueError(f"row {task} is bad")
        return task

    results = shared_out(work, range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="row 3 is bad"):
        next(results)


def test_a_process_that_is_killed_is_told_of() -> None:
    here = os.getpid()

    def work(task: int) -> int:
        if task == 5 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core, or a system that does not fork")
    with pytest.raises(ChildProcessError, match="short of memory"):
        list(shared_out(work, range(10)))


def test_where_no_processes_can_be_had_the_work_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(workers, "ProcessPoolExecutor", none)
    here = os.getpid()
    assert list(shared_out(lambda task: os.getpid() - here + task, range(3))) == [0, 1, 2]
