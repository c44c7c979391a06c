"""A site that cannot be trained fails alone: those beside it in the pass do not notice."""

import numpy as np
import pytest
from support.companies import CLOSE, Company, uneven
from support.trainings import digits, open_small, settings

from fedgraft.client.training.trainer import Trained
from fedgraft.common.errors import SiteFailure


@pytest.mark.parametrize("spoiled", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_site_that_fails_fails_alone(spoiled: int, value: float) -> None:
    """Its rows are not finite; to the bit, the others are as beside a site whose rows are."""
    rows = [digits(12, 0), digits(20, 100), digits(9, 200)]
    wanted = settings(epochs=2, clip_norm=0.5, proximal=0.1)
    whole = Company(open_small("vit"), rows, wanted).together()
    pixels = rows[spoiled].values.copy()
    pixels[-1] = value
    bad = type(rows[0])(rows[spoiled].labels, pixels, rows[spoiled].rows)
    found = Company(
        open_small("vit"), [bad if i == spoiled else one for i, one in enumerate(rows)], wanted
    ).run(range(3))
    for site, one in enumerate(found):
        if site == spoiled:
            assert isinstance(one, SiteFailure) and one.code == "loss-not-finite"
        else:
            assert isinstance(one, Trained)
            assert one.vector.tobytes() == whole[site].vector.tobytes()
            assert one.loss == whole[site].loss


def test_a_start_that_is_not_finite_is_one_sites_failure() -> None:
    company = Company(open_small("resnet"), uneven("resnet"), settings(epochs=2))
    whole = company.together()
    company.starts[2][:] = np.nan
    found = company.run(range(4))
    assert isinstance(found[2], SiteFailure) and found[2].code == "loss-not-finite"
    for site in (0, 1, 3):
        one = found[site]
        assert isinstance(one, Trained)
        assert one.vector.tobytes() == whole[site].vector.tobytes()


def test_sites_without_examples_fail_by_themselves() -> None:
    nothing = digits(4).subset(np.empty(0, np.int64))
    company = Company(open_small("vit"), [nothing, digits(9), nothing, digits(20, 50)], settings())
    first, second, third, fourth = company.run(range(4))
    assert isinstance(first, SiteFailure) and first.code == "no-examples"
    assert isinstance(third, SiteFailure) and third.code == "no-examples"
    assert isinstance(second, Trained) and isinstance(fourth, Trained)
    alone = company.together([1])[0]
    np.testing.assert_allclose(second.vector, alone.vector, rtol=0, atol=CLOSE)
    assert isinstance(company.run([0])[0], SiteFailure)
    assert company.run([]) == []


def test_an_exception_in_a_pass_leaves_nothing_behind() -> None:
    stack = open_small("bert", dropout=0.5)
    company = Company(stack, uneven("bert"), settings(dropout=0.5))
    before = company.together()

    def fail(module: object, args: object, output: object) -> None:
        if stack.randomness.rows:
            raise ZeroDivisionError

    handle = stack.model.get_submodule("classifier").register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        company.together()
    handle.remove()
    assert not stack.randomness.rows  # evaluation would draw
    after = company.together()
    assert [one.vector.tobytes() for one in after] == [one.vector.tobytes() for one in before]
