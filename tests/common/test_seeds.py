"""Seeds are known values, differ wherever their purpose does, and leave global generators alone."""

import hashlib
import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.common.seeds import derive_seed, numpy_generator, torch_generator

parts = st.lists(st.text(max_size=6) | st.integers(-(2**70), 2**70), max_size=4).map(tuple)


def test_known_answers() -> None:
    # Another answer means that every run so far can no longer be repeated.
    assert derive_seed(0) == 323004822964316904
    assert derive_seed(7, "batches", 3, "site-a") == 6300516171725401284
    drawn = numpy_generator(7, "batches", 3, "site-a").integers(0, 2**32, 3)
    assert drawn.tolist() == [734917513, 2959960192, 1763017237]


def test_the_encoding_is_type_and_text_with_a_length_before_each() -> None:
    encoded = b"\0\0\0\5int:7" + b"\0\0\0\4str:" + b"\0\0\0\6str:\xc3\xa9"
    expected = int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big") >> 1
    assert derive_seed(7, "", "é") == expected


def test_text_and_numbers_and_the_borders_between_parts_count() -> None:
    purposes: list[tuple[str | int, ...]] = [
        ("1",),
        (1,),
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        ("a", "b", "c"),
        ("a", "b"),
        ("b", "a"),
        (),
        ("",),
        ("", ""),
        ("int:1",),
        (-1,),
    ]
    assert len({derive_seed(0, *purpose) for purpose in purposes}) == len(purposes)
    assert derive_seed(0, 1) != derive_seed(1, 0)


@given(st.integers(0, 2**62), parts, parts)
def test_seeds_are_equal_exactly_if_the_purposes_are(
    seed: int, one: tuple[str | int, ...], other: tuple[str | int, ...]
) -> None:
    assert (derive_seed(seed, *one) == derive_seed(seed, *other)) == (one == other)
    assert 0 <= derive_seed(seed, *one) < 2**63


def test_a_torch_generator_starts_from_the_derived_seed() -> None:
    generator = torch_generator(3, "dropout", 1)
    assert generator.initial_seed() == derive_seed(3, "dropout", 1)
    assert generator.device == torch.device("cpu")


def test_generators_of_one_purpose_repeat_and_do_not_share_a_state() -> None:
    first, second = numpy_generator(0, "x"), numpy_generator(0, "x")
    ahead = first.random(5)
    assert np.array_equal(second.random(5), ahead)
    assert not np.array_equal(numpy_generator(0, "y").random(5), ahead)
    one, two = torch_generator(0, "x"), torch_generator(0, "x")
    drawn = torch.rand(5, generator=one)
    assert torch.equal(torch.rand(5, generator=two), drawn)
    assert not torch.equal(torch.rand(5, generator=torch_generator(0, "y")), drawn)


def test_global_generators_are_neither_read_nor_moved() -> None:
    def states() -> tuple[object, ...]:
        legacy = np.random.get_state(legacy=False)
        assert isinstance(legacy, dict)
        key = legacy["state"]["key"].tobytes(), legacy["state"]["pos"]
        return torch.get_rng_state().numpy().tobytes(), key, random.getstate()

    def draw() -> tuple[object, ...]:
        numbers = numpy_generator(5, "a").random(3).tolist()
        return derive_seed(5, "a"), numbers, torch.rand(3, generator=torch_generator(5)).tolist()

    before = states()
    drawn = draw()
    assert states() == before
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert draw() == drawn
