"""What a run says of itself in its summary, which the report shows."""

from pathlib import Path

from support.federations import run_digits, write_digits

from fedgraft.server.runs.summary import bytes_per_site_round


def test_the_report_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "secret-project", 60, 30)
    run, summary = run_digits(tmp_path / "runs", *data, "rounds.count=1")
    assert "secret-project" not in summary["job_toml"]
    report = (run.folder / "report.html").read_text(encoding="utf-8")
    assert str(tmp_path) not in report
    assert 'train = "train"' in summary["job_toml"]


def test_bytes_are_per_site_that_was_asked() -> None:
    history = [
        {"asked": 4, "sites": 3, "bytes_up": 300, "bytes_down": 800},
        {"asked": 2, "sites": 2, "bytes_up": 300, "bytes_down": 400},
    ]
    assert bytes_per_site_round(history) == (100, 200)
    assert bytes_per_site_round([]) == (0, 0)
