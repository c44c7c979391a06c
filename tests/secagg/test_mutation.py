"""Deleting any one check of secure aggregation makes a test fail.

What counts as a check is in ``mutation.py``: mutants are found in the syntax trees, so a new check
needs a test from the day it is written. A check that no test can miss is listed with its reason.
"""

from collections.abc import Iterator

import pytest
from secagg.mutation import Mutant, Runner, find_mutants, sources

# Every one of these says what another check says too, for a reader or for the type checker.
EQUIVALENT = {
    "client/secagg/masking_party.py: MaskingParty._stage: in `self._state is not needed or "
    "self._round is None`, without self._round is None": (
        "no state but IDLE is without a round; mypy cannot know"
    ),
    "common/secagg/graph.py: GraphPlan.fewest_survivors: threshold without self.colluders + 2": (
        "plan_graph wants two honest parties, and then the signers are at least T + 2"
    ),
    "common/secagg/graph.py: plan_graph: in `parties < FEWEST or colluders < 1 or colluders + 2 > "
    "parties`, without parties < FEWEST": "one colluder and two honest parties are three",
    "common/secagg/quantize.py: Coding.__post_init__: in `self.ring_bits not in RINGS or not 2 <= "
    "self.value_bits <= self.ring_bits`, without self.value_bits <= self.ring_bits": (
        "one party with more bits than the ring overflows it, which the next check refuses"
    ),
}

pytestmark = pytest.mark.slow  # minutes: the protocol's tests, once for each check

MUTANTS = [mutant for path in sources() for mutant in find_mutants(path)]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with Runner(tmp_path_factory.mktemp("mutants")) as runner:
        yield runner


def test_all_tests_pass_where_nothing_is_deleted(runner: Runner) -> None:
    outcome = runner.run(None)
    assert not outcome.killer
    assert outcome.seconds < 60  # of the 120 that a mutant is given


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_deleted_check_is_missed(runner: Runner, mutant: Mutant) -> None:
    killer = runner.run(mutant).killer
    if mutant.key in EQUIVALENT:
        assert not killer, f"strike it from the list: {killer} misses it"
    else:
        assert killer, "every test passes without this check"
        assert not killer.startswith("pytest itself"), killer


def test_what_is_listed_exists() -> None:
    assert set(EQUIVALENT) <= {mutant.key for mutant in MUTANTS}
    assert len(MUTANTS) > 150  # or the finder has gone blind
