"""``site.toml``: what a site writes is read exactly, and every mistake is named with a hint."""

from pathlib import Path

import pytest

from fedgraft.client.site_config import SiteConfig, SiteData, dump_site, load_site
from fedgraft.common.errors import JobError
from fedgraft.common.section import Cache

FULL = """
name = "st-mary"
device = "cpu"
[data]
train = "rows/train.csv"
test = "/abs/test.csv"
columns = { text = "question" }
labels = { "1" = "yes" }
"""


def _written(folder: Path, text: str) -> Path:
    path = folder / "site.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_relative_paths_start_at_the_files_folder(tmp_path: Path) -> None:
    site = load_site(_written(tmp_path, FULL))
    assert site.data.train == str(tmp_path / "rows" / "train.csv")
    assert site.data.test == "/abs/test.csv"
    assert site.data.validation is None
    assert site.state == str(tmp_path / "state")
    assert (site.data.columns, site.data.labels) == ({"text": "question"}, {"1": "yes"})


def test_a_dumped_site_loads_as_the_same_site(tmp_path: Path) -> None:
    site = load_site(_written(tmp_path, FULL))
    assert load_site(_written(tmp_path, dump_site(site))) == site


def test_a_dumped_site_may_keep_relative_paths(tmp_path: Path) -> None:
    path = _written(tmp_path, dump_site(SiteConfig(name="a", data=SiteData(train="t.csv"))))
    assert load_site(path).data.train == str(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('name = "a"', "data is missing", "add data"),
        ('name = "a"\n[data]\ntrian = "x"', "unknown key data.trian", "did you mean train?"),
        ('nam = "a"\n[data]\ntrain = "x"', "unknown key nam", "did you mean name?"),
        ('name = "a"\ncache = { disc = 5 }\n[data]\ntrain = "x"', "cache.disc", "mean disk?"),
        ('name = "a/b"\n[data]\ntrain = "x"', "name is not a site name", "letters, digits"),
        ('name = "a"\ndevice = "tpu"\n[data]\ntrain = "x"', "device: ", "mend device"),
        ("name = ", "not valid TOML", "mend that line"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(JobError) as caught:
        load_site(_written(tmp_path, text))
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_a_missing_file_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no file") as caught:
        load_site(tmp_path / "site.toml")
    assert "[data]" in caught.value.hint


# What a site bounds


def test_a_site_may_bound_its_rank_and_what_it_keeps(tmp_path: Path) -> None:
    plain = load_site(_written(tmp_path, FULL))
    assert (plain.rank, plain.cache) == (None, Cache())
    assert (plain.cache.memory, plain.cache.disk) == (256_000_000, 4_000_000_000)
    bounds = 'rank = 4\ncache = { memory = "1GB", disk = 0 }\n'
    site = load_site(_written(tmp_path, bounds + FULL))
    assert (site.rank, site.cache.memory, site.cache.disk) == (4, 1_000_000_000, 0)
    assert load_site(_written(tmp_path, dump_site(site))) == site


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rank = 0", "rank: "),
        ("rank = 2.5", "rank: "),
        ('cache = { memory = "lots" }', 'cache.memory: write a size as "64MB"'),
        ("cache = { disk = -1 }", "cache.disk: "),
        ("cache = { ram = 5 }", "unknown key cache.ram"),
    ],
)
def test_a_bound_that_is_none_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(JobError) as caught:
        load_site(_written(tmp_path, f"{line}\n{FULL}"))
    assert message in str(caught.value)
    assert caught.value.hint
