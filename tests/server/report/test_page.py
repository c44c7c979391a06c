"""The report comes out of every run, says what the numbers say, and lets nothing run or load."""

import copy
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.report_runs import assert_sound, make_round, make_run, visible, with_insights, written

from fedgraft.common.errors import RunError
from fedgraft.server.report.page import write_report

ATTACK = '"><script>alert(1)</script><img src=x onerror=alert(1)> $x_1$ --> {{ 7*7 }}'


def test_a_usual_run_says_what_it_should(tmp_path: Path) -> None:
    summary, history = make_run(("helped",) * 8 + ("hurt", "unclear"))
    path = write_report(tmp_path, summary, history)
    page = path.read_text("utf-8")
    assert path == tmp_path / "report.html"
    assert_sound(page)
    text = visible(page)
    assert (
        "Federating helped 8 of 10 sites and hurt 1; for 1 the test examples cannot tell." in text
    )
    assert "right for 88.1 %" in text
    assert "on average, for 70.4 % (17.7 points less)" in text
    assert "in one place for 90.2 % (2.1 points more)" in text
    assert "Zero-shot the backbone as it came not run" in text
    assert "Local only, best site known only after testing them all 79.3 %" in text
    assert "Up, all sites and rounds 9.0 MB" in text
    assert "Down, all sites and rounds 12.0 MB" in text
    assert "Up, per site and round 308.0 kB" in text
    assert "77,000 of 22,000,000 (0.4 %)" in text  # 0.35 %
    assert "2 h 2 min" in text
    assert "No site was dropped in any round." in text
    assert "Updates travelled in clear to the coordinator in this run" in text
    assert "the coordinator sees only the sum over sites" in text
    assert "up to 0.5 verdicts on average" in text
    assert 'name = "wards"' in text.replace("&#34;", '"')
    assert page.count("<svg") == 4


@pytest.mark.parametrize(
    ("task", "key", "figures", "said"),
    [
        ("text-classification", "accuracy", (0.71, 0.7), "is right for 71.0 %"),
        ("text-classification", "accuracy", (0.71, 0.7), "for 70.0 % (1.0 points less)"),
        ("text-classification", "accuracy", (0.71, 0.70996), "for 71.0 % (the same)"),
        ("token-classification", "f1", (0.71, 0.72), "federated model has entity F1 71.0 %"),
        ("token-classification", "f1", (0.71, 0.72), "place 72.0 % (1.0 points more)"),
        ("text-regression", "mae", (0.104, 0.101), "has mean absolute error 0.104"),
        ("text-regression", "mae", (0.104, 0.101), "place 0.101 (0.003 less)"),
        ("text-regression", "mae", (0.1041, 0.10409), "place 0.104 (the same)"),
        ("text-regression", "mae", (1040.0, 2250.0), "(1.21e+03 more)"),
        ("causal-lm", "perplexity", (3.41, 3.44), "place 3.44 (0.03 more)"),
        ("causal-lm", "perplexity", (3.411, 3.412), "place 3.41 (the same)"),
    ],
)
@pytest.mark.usefixtures("words_only")
def test_two_models_are_compared_in_the_words_and_digits_of_the_metric(
    tmp_path: Path, task: str, key: str, figures: tuple[float, float], said: str
) -> None:
    summary, history = make_run(("unclear",))
    summary["job"]["task"] = task
    summary["final"] = {"federated": {key: figures[0]}, "central": {key: figures[1]}}
    text = visible(written(tmp_path, summary, history))
    assert said in text
    assert ("right for" in text) == (task == "text-classification")
    assert "classification head" not in text


@pytest.mark.parametrize(
    ("task", "key", "said"),
    [
        ("image-classification", "accuracy", "Right for 71.0 % of what sites hold out."),
        ("token-classification", "f1", "Entity F1 71.0 % on what sites hold out."),
        ("image-regression", "mae", "Mean absolute error 0.71 on what sites hold out."),
    ],
)
@pytest.mark.usefixtures("words_only")
def test_partners_read_the_name_of_the_metric(
    tmp_path: Path, task: str, key: str, said: str
) -> None:
    summary, history = make_run(())
    summary["job"]["task"] = task
    summary["partners"] = {"sites": ["a"], "missing": [], "validation": {key: 0.71}}
    assert said in visible(written(tmp_path, summary, history))


def test_the_same_run_gives_the_same_bytes_and_replaces_the_old_file(tmp_path: Path) -> None:
    summary, history = make_run()
    before = copy.deepcopy((summary, history))
    first = write_report(tmp_path, summary, history).read_bytes()
    assert (summary, history) == before, "the input was changed"
    (tmp_path / "report.html").write_text("old")
    assert write_report(tmp_path, *json.loads(json.dumps([summary, history]))).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_users_matplotlib_settings_change_nothing(tmp_path: Path) -> None:
    import matplotlib

    summary, history = make_run()
    first = written(tmp_path, summary, history)
    with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red", "svg.hashsalt": "x"}):
        assert written(tmp_path, summary, history) == first
        assert matplotlib.rcParams["font.size"] == 40


def test_nothing_from_data_becomes_markup(tmp_path: Path) -> None:
    summary, history = make_run()
    summary.update(run=ATTACK, folder=ATTACK, job_toml=ATTACK, status=ATTACK, engine=ATTACK,
                   device=ATTACK, environment={ATTACK: ATTACK})  # fmt: skip
    summary["protection"] = {"protocol": ATTACK, "cohort": [ATTACK, 3]}
    summary["job"] = {key: ATTACK for key in ("name", "task", "method", "rule", "backbone")}
    summary["job"]["labels"] = [ATTACK]
    for site in summary["sites"]:
        site.update(name=ATTACK, verdict=ATTACK, shift=ATTACK)
    history[1]["dropped"] = [{"site": ATTACK, "reason": ATTACK}]
    page = written(tmp_path, summary, history)
    assert_sound(page)
    assert "<script" not in page
    assert "<img" not in page
    assert "{{ 7*7 }}" in page and "49" not in visible(page).split()


def test_any_name_can_be_drawn(tmp_path: Path) -> None:
    names = ["a$b$", "\\frac{1}{2}", "$", "病院", "🏥", "é" * 300, " ", "a\nb", "\0\x1b"]
    summary, history = make_run(("helped",) * len(names))
    for site, name in zip(summary["sites"], names, strict=True):
        site["name"] = name
    assert_sound(written(tmp_path, summary, history))


def test_a_lone_surrogate_does_not_stop_the_report(tmp_path: Path) -> None:
    summary, history = make_run()
    summary["sites"][0]["name"] = json.loads('"\\ud800"')
    assert_sound(written(tmp_path, summary, history))


def test_an_empty_run_still_gives_a_report(tmp_path: Path) -> None:
    page = written(tmp_path, {}, [])
    assert_sound(page)
    text = visible(page)
    assert "Whether federating was worth it is not known" in text
    assert "This run has not finished" in text
    assert "No round is on record." in text and "No site is on record." in text
    assert page.count("<svg") == 0


def holes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested data, as a path of keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from holes(inner, (*path, key))


def with_hole(value: Any, path: tuple[Any, ...], filling: object) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if filling is holes:
        del inner[path[-1]]
    else:
        inner[path[-1]] = filling
    return value


@pytest.mark.slow
@pytest.mark.usefixtures("words_only")
def test_any_single_value_may_be_missing_null_or_nonsense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is synced is not the point here, and there are 1,500 reports to write.
    monkeypatch.setattr("os.fsync", lambda _: None)
    summary, history = make_run(("helped", "hurt"), rounds=1)
    summary = with_insights(summary)
    history[0]["dropped"] = [{"site": "site-1", "reason": "late"}]
    fillings: tuple[object, ...] = (holes, None, float("nan"), float("inf"), "words", 7, [], {})
    for path in holes([summary, history]):
        if len(path) > 1:
            for filling in fillings:
                write_report(tmp_path, *with_hole([summary, history], path, filling))


@pytest.mark.parametrize("filling", [None, float("nan")])
def test_all_metrics_may_be_missing_at_once(tmp_path: Path, filling: object) -> None:
    summary, history = make_run()
    summary["final"] = dict.fromkeys(summary["final"], filling)
    for site in summary["sites"]:
        site.update(dict.fromkeys(
            ("federated", "central", "local_only", "head_only", "zero_shot", "federated_tuned",
             "verdict", "classes"), filling), outcome="unknown")  # fmt: skip
    for entry in history:
        entry.update(validation=None, train_loss=filling, dropped=None)
    page = written(tmp_path, summary, history)
    assert_sound(page.replace("nan", "") if filling else page)
    assert visible(page).count("not run") >= 5
    assert page.count("<svg") == 0


def test_one_round_and_one_site(tmp_path: Path) -> None:
    summary, history = make_run(("hurt",), rounds=1)
    page = written(tmp_path, summary, history)
    assert_sound(page)
    assert "Federating hurt the one site of this run." in visible(page)
    assert "<tfoot" not in page


def test_many_sites_without_pairs_have_no_plot(tmp_path: Path) -> None:
    summary, history = make_run(("unknown",) * 60)
    for site in summary["sites"]:
        site["local_only"] = None
    page = written(tmp_path, summary, history)
    assert_sound(page)
    assert page.count("<svg") == 3


@pytest.mark.usefixtures("words_only")
def test_sites_are_sorted_as_people_count(tmp_path: Path) -> None:
    summary, history = make_run(("helped",) * 12)
    summary["sites"].reverse()
    page = written(tmp_path, summary, history)
    rows = re.findall(r'<th scope="row" class="name">(site-\d+)', page)
    assert rows == [f"site-{number}" for number in range(1, 13)]


def test_dropped_sites_are_named_with_round_and_reason(tmp_path: Path) -> None:
    summary, history = make_run()
    history[1] = make_round(2, [{"site": "site-2", "reason": "deadline passed"}])
    page = written(tmp_path, summary, history)
    assert "2 site-2 deadline passed" in visible(page)
    assert "A cross marks a round in which sites were dropped." in visible(page)
    assert "sites dropped</text>" in page


@pytest.mark.parametrize(
    ("outcomes", "sentence"),
    [
        (("helped", "helped"), "Federating helped 2 of 2 sites and hurt none."),
        (("hurt", "hurt"), "Federating helped 0 of 2 sites and hurt 2."),
        (("unclear", "unclear"), "The test examples of 2 sites cannot tell"),
        (("unclear",), "The test examples of the one site cannot tell if federating helped."),
        (("helped",), "Federating helped the one site of this run."),
        (("helped", "unknown"), "hurt none; 1 could not be compared."),
        (("unknown", "unknown"), "Whether federating was worth it is not known"),
        (("splendid", "helped"), "Federating helped 1 of 2 sites and hurt none; 1 could not"),
    ],
)
@pytest.mark.usefixtures("words_only")
def test_the_headline_counts_what_the_verdicts_say(
    tmp_path: Path, outcomes: Sequence[str], sentence: str
) -> None:
    page = written(tmp_path, *make_run(outcomes))
    assert sentence in page.split("<h1>")[1].split("</h1>")[0]


@pytest.mark.usefixtures("words_only")
def test_other_protection_is_not_called_clear(tmp_path: Path) -> None:
    summary, history = make_run()
    summary["protection"] = {
        "protocol": "fedgraft-secagg/1", "rounds": 4, "cohort": [10, 10], "survivors": [8, 10],
        "clip": 0.1, "error_bound": 2.5e-5, "clipped": None,
    }  # fmt: skip
    text = visible(written(tmp_path, summary, history))
    assert "in clear" not in text
    for told in ("Every update was masked", "fedgraft-secagg/1", "8 to 10", "2.5e-05", "±0.100"):
        assert told in text
    assert "What this does not do" in text
    assert "not recorded" in text  # thresholds, which this run did not note


def test_a_folder_that_is_not_there_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write") as caught:
        write_report(tmp_path / "nowhere", *make_run())
    assert caught.value.hint


def test_a_failed_write_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.html").write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(RunError, match="No space left"):
        write_report(tmp_path, *make_run())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.usefixtures("words_only")
def test_every_sites_macro_f1_has_its_interval(tmp_path: Path) -> None:
    site = {
        "name": "site-00",
        "examples": 10,
        "test_examples": 10,
        "federated": {
            "accuracy": 0.5,
            "macro_f1": 0.4321,
            "loss": 1.0,
            "accuracy_interval": [0.4, 0.6],
            "macro_f1_interval": [0.3215, 0.5437],
        },
        "verdict": "so so",
        "outcome": "unclear",
    }
    page = write_report(tmp_path, {"sites": [site]}, []).read_text(encoding="utf-8")
    assert "F1 43.2" in page
    assert "32.1 to 54.4" in page or "32.2 to 54.4" in page
