"""A federation of every task, made once for all that asks for it."""

import pytest
from support.contract import Federation
from support.contract_tasks import TaskCase

from fedgraft.common.tasks import TASKS


@pytest.fixture(scope="session", params=list(TASKS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TaskCase:
    """A task with a tiny backbone, rows of its own and a federation of two sites."""
    return TaskCase(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def federation(case: TaskCase) -> Federation:
    """The federation of ``case``."""
    return case.federation
