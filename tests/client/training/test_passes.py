"""Several sites trained in one pass come to what each of them comes to alone."""

from typing import Any

import numpy as np
import pytest
from support.companies import CLOSE, TURNED, Company, uneven
from support.matrix import thinned
from support.trainings import KINDS, open_small, settings, texts

from fedgraft.common.layout import cut_rank, is_factor_a, is_head


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "method",
    thinned([{}, {"kind": "head"}, {"head": "frozen"}], 3),
    ids=["shared head", "head only", "frozen head"],
)
def test_company_makes_no_difference(kind: str, method: dict[str, Any]) -> None:
    company = Company(open_small(kind, **method), uneven(kind), settings(epochs=2))
    found = company.check(TURNED.get(kind, CLOSE))
    assert [one.steps for one in found] == [2, 2, 8, 4]


@pytest.mark.parametrize("kind", ["deep-vit", "resnet", "bert", "roberta"])
@pytest.mark.parametrize("part", thinned(["factors B and the head", "factors", "head"], 3))
def test_company_makes_no_difference_to_some_of_the_tensors(kind: str, part: str) -> None:
    chosen = {
        "factors B and the head": lambda name: not is_factor_a(name),
        "factors": lambda name: not is_head(name),
        "head": is_head,
    }[part]
    stack = open_small(kind)
    layout = stack.bench.layout.only(filter(chosen, stack.bench.layout.names))
    Company(stack, uneven(kind), settings(epochs=2), layout).check()


@pytest.mark.parametrize("kind", ["roberta", "gpt2", "llama"])
def test_a_site_draws_for_its_own_tokens_alone(kind: str) -> None:
    """Next to a site with longer texts: what is padding for it takes no number."""
    stack = open_small(kind, dropout=0.4)
    left = kind == "llama"
    rows = [texts(20, site, longest=12 * site, pad_left=left) for site in (1, 2, 3)]
    Company(stack, rows, settings(epochs=2, dropout=0.4)).check(TURNED.get(kind, CLOSE))


@pytest.mark.parametrize("kind", ["vit", "resnet", "bert"])
def test_company_makes_little_difference_in_bf16(kind: str) -> None:
    stack = open_small(kind, precision="bf16")
    company = Company(stack, uneven(kind), settings(epochs=2, precision="bf16"))
    for one, other in zip(company.together(), company.alone(), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=0.01)
        assert np.abs(one.vector - other.vector).mean() < 2e-5


@pytest.mark.parametrize("kind", ["vit", "resnet", "bert"])
def test_sites_of_lower_rank_keep_the_rest_at_zero(kind: str) -> None:
    stack = open_small(kind, rank=4, dropout=0.2)
    company = Company(stack, uneven(kind), settings(epochs=2, proximal=0.1, weight_decay=0.1))
    ranks = (1, 4, 2, 3)
    company.starts = [
        cut_rank(company.layout, start, rank)
        for start, rank in zip(company.starts, ranks, strict=True)
    ]
    for site, one in enumerate(company.check()):
        assert one.vector.tobytes() == cut_rank(company.layout, one.vector, ranks[site]).tobytes()
        less = cut_rank(company.layout, one.vector, ranks[site] - 1)
        assert np.abs(less - one.vector).max() > 1e-3


def test_the_order_of_the_sites_makes_no_difference() -> None:
    company = Company(open_small("bert", dropout=0.2), uneven("bert"), settings(epochs=2))
    found = company.together()
    for order in ((3, 2, 1, 0), (1, 0, 3, 2), (2, 3, 0, 1)):
        for site, one in zip(order, company.together(order), strict=True):
            np.testing.assert_allclose(one.vector, found[site].vector, rtol=0, atol=CLOSE)
            assert one.loss == pytest.approx(found[site].loss, abs=CLOSE)


@pytest.mark.parametrize("kind", ["vit", "resnet", "bert"])
def test_the_same_call_gives_the_same_bits(kind: str) -> None:
    stack = open_small(kind, dropout=0.2)
    company = Company(stack, uneven(kind), settings(epochs=2, dropout=0.2))
    first = company.together()
    company.alone()
    again = company.together()
    assert [one.vector.tobytes() for one in first] == [one.vector.tobytes() for one in again]
    assert [one.loss for one in first] == [one.loss for one in again]
