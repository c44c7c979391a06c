"""``federation.toml`` says who takes part; what it says wrongly is found when it is read."""

import tomllib
from operator import itemgetter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft.common.errors import JobError
from fedgraft.common.federation.federation_file import (
    Federation,
    Floor,
    dump_federation,
    load_federation,
)
from fedgraft.common.secagg.transcript import Policy

KEYS = [f"{number:02x}" * 32 for number in range(1, 5)]
TWO = f'[sites]\nzoe = "{KEYS[0]}"\namy = "{KEYS[1]}"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a federation's file will be."""
    return tmp_path / "federation.toml"


def load(path: Path, text: str) -> Federation:
    path.write_text(text, encoding="utf-8")
    return load_federation(path)


def refused(path: Path, text: str | None = None) -> JobError:
    """Why the file, or this text in it, is refused."""
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(JobError) as caught:
        load_federation(path)
    error = caught.value
    assert error.exit_code == 2
    assert error.hint and "\n" not in error.hint
    assert str(path) in str(error)
    return error


# What it says


def test_a_sites_id_is_the_place_of_its_name_in_the_sorted_list(path: Path) -> None:
    federation = load(path, TWO + f'Bob = "{KEYS[2]}"\n')
    assert federation.names == ("Bob", "amy", "zoe")  # by code point, on every machine
    assert federation.ids == {"Bob": 0, "amy": 1, "zoe": 2}
    assert [key.hex() for key in federation.roster.keys] == [KEYS[2], KEYS[1], KEYS[0]]


def test_the_order_of_the_lines_changes_nothing(path: Path) -> None:
    one = load(path, TWO)
    other = load(path, "\n".join(["[sites]", *reversed(TWO.splitlines()[1:])]))
    assert one.ids == other.ids
    assert one.roster == other.roster
    assert one.roster.hash == other.roster.hash


def test_the_floor_has_safe_defaults(path: Path) -> None:
    assert load(path, TWO).policy == Policy(
        colluders=1, min_cohort=3, min_ring_bits=24, max_clip=1.0
    )


def test_the_floor_is_what_the_file_says(path: Path) -> None:
    floor = (
        "[secure_aggregation]\ncolluders = 5\nmin_cohort = 20\nmin_ring_bits = 32\nmax_clip = 2\n"
    )
    policy = load(path, floor + TWO).policy
    assert policy == Policy(colluders=5, min_cohort=20, min_ring_bits=32, max_clip=2.0)
    assert type(policy.max_clip) is float


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True)
keys = st.binary(min_size=32, max_size=32).map(bytes.hex)
floors = st.builds(
    Floor,
    colluders=st.integers(1, 99),
    min_cohort=st.integers(3, 99),
    min_ring_bits=st.integers(16, 32),
    max_clip=st.floats(1e-6, 1e6),
)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(names, keys), min_size=1, max_size=6, unique_by=(itemgetter(0), itemgetter(1))
    ),
    floors,
)
def test_what_is_dumped_is_loaded_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, sites: list[tuple[str, str]], floor: Floor
) -> None:
    federation = Federation(sites=dict(sites), secure_aggregation=floor)
    path = tmp_path_factory.getbasetemp() / "dumped.toml"
    path.write_text(dump_federation(federation), encoding="utf-8")
    loaded = load_federation(path)
    assert loaded == federation
    assert loaded.names == tuple(sorted(name for name, _ in sites))
    assert loaded.roster == federation.roster
    assert loaded.policy == federation.policy


def test_a_dump_spells_the_floor_out(path: Path) -> None:
    written = tomllib.loads(dump_federation(load(path, TWO)))
    assert set(written["secure_aggregation"]) == set(Floor.model_fields)


def test_a_byte_order_mark_is_no_part_of_the_file(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + TWO.encode())
    assert load_federation(path).names == ("amy", "zoe")


# What is wrong with it


def test_a_missing_file_is_said_to_come_with_the_kit(path: Path) -> None:
    error = refused(path)
    assert str(error) == f"no file {path}"
    assert "kit" in error.hint


def test_a_folder_is_no_federation(path: Path) -> None:
    path.mkdir()
    assert "cannot be read" in str(refused(path))


def test_what_is_not_utf8_is_refused_at_its_byte(path: Path) -> None:
    path.write_bytes(TWO.encode() + b"# \xff")
    assert f"not UTF-8 (byte {len(TWO) + 2})" in str(refused(path))


@pytest.mark.parametrize(
    "text", ["[sites\n" + TWO, "sites = \n", TWO + f'amy = "{KEYS[2]}"\n', "\0"]
)
def test_what_is_not_toml_is_refused_with_its_line(path: Path, text: str) -> None:
    error = refused(path, text)
    assert "not valid TOML" in str(error)
    assert "line" in str(error)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("name = 'x'\n" + TWO, "name: Extra"),
        ("[secure_aggregation]\nthreshold = 3\n" + TWO, "secure_aggregation.threshold: Extra"),
        ("[secure_aggregation]\ncolluder = 3\n" + TWO, "secure_aggregation.colluder: Extra"),
    ],
)
def test_a_key_that_nobody_knows_is_refused_by_name(path: Path, text: str, where: str) -> None:
    """A misspelt floor would else be no floor at all."""
    assert where in str(refused(path, text))


@pytest.mark.parametrize(
    "key",
    [
        "",
        KEYS[0][:-1],
        KEYS[0] + "0",
        KEYS[0][:-2],
        ("ab" * 32).upper(),
        "0x" + KEYS[0][2:],
        "g" * 64,
        " " + KEYS[0][1:],
        KEYS[0] + "\\n",
        "٣" * 64,  # digits to str.isdigit, but not hex
    ],
)
def test_a_key_that_is_not_64_small_hex_digits_is_refused_by_site(path: Path, key: str) -> None:
    error = refused(path, TWO + f'cid = "{key}"\n')
    assert "sites.cid" in str(error)
    assert "64 hex digits" in error.hint


@pytest.mark.parametrize("key", ["1", "true", '["a"]', "{ed25519 = 'x'}"])
def test_a_key_that_is_no_text_is_refused(path: Path, key: str) -> None:
    assert "sites.cid" in str(refused(path, TWO + f"cid = {key}\n"))


@pytest.mark.parametrize(
    "name", ["", "../x", "a b", "-a", ".a", "a/b", "x" * 65, "a\\n", "\\u001b[2J", "ä", "a:b"]
)
def test_a_name_that_is_none_is_refused(path: Path, name: str) -> None:
    error = refused(path, TWO + f'"{name}" = "{KEYS[2]}"\n')
    assert "sites" in str(error)
    assert "site's name" in error.hint


def test_a_name_may_be_as_long_as_a_name_may_be(path: Path) -> None:
    assert "x" * 64 in load(path, TWO + f'{"x" * 64} = "{KEYS[2]}"\n').ids


def test_two_sites_with_one_key_are_refused(path: Path) -> None:
    """One of them could speak for both."""
    error = refused(path, TWO + f'cid = "{KEYS[0]}"\n')
    assert "two sites have one key" in str(error)
    assert error.hint == "every site makes a key of its own"


@pytest.mark.parametrize("text", ["", "[sites]\n", "[secure_aggregation]\n"])
def test_a_federation_of_nobody_is_refused(path: Path, text: str) -> None:
    assert ": sites: " in str(refused(path, text))


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("colluders", "0"),
        ("colluders", "-1"),
        ("colluders", "true"),
        ("colluders", "1.5"),
        ("min_cohort", "2"),
        ("min_cohort", "true"),
        ("min_ring_bits", "15"),
        ("min_ring_bits", "33"),
        ("max_clip", "0"),
        ("max_clip", "inf"),
        ("max_clip", "nan"),
        ("max_clip", "true"),
    ],
)
def test_a_floor_that_protects_nobody_is_refused(path: Path, key: str, bad: str) -> None:
    error = refused(path, f"[secure_aggregation]\n{key} = {bad}\n" + TWO)
    assert "secure_aggregation" in str(error)
    assert key in f"{error} {error.hint}"
    assert "[sites]" not in error.hint  # they are fine
