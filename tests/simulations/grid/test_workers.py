"""Workers change how fast things go and nothing else, and their end is noticed."""

import os
import signal

import pytest

from fedgraft.common.errors import RunError
from fedgraft.simulations.grid.workers import Workers


def square(number: int) -> int:
    return number * number


def fail() -> None:
    raise ValueError("no")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("count", [0, 2])
def test_results_and_failures_come_through(count: int) -> None:
    with Workers(count, device="cpu") as workers:
        futures = [workers.submit(square, number) for number in range(5)]
        assert [future.result() for future in futures] == [0, 1, 4, 9, 16]
        with pytest.raises(ValueError, match="no"):
            workers.submit(fail).result()


def test_a_worker_that_dies_is_a_clear_error() -> None:
    with pytest.raises(RunError, match="worker process died"), Workers(2, device="cpu") as workers:
        workers.submit(die).result()


def test_a_device_that_cannot_be_shared_computes_here() -> None:
    assert Workers(None, device="cuda").count == 0
    assert Workers(1, device="cpu").count == 0


def test_without_workers_a_task_runs_when_its_result_is_wanted_and_once() -> None:
    done: list[int] = []
    with Workers(0, device="cpu") as workers:
        future = workers.submit(done.append, 1)
        assert not done
        future.result()
        future.result()
    assert done == [1]
