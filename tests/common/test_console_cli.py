"""The command: quick help without torch, errors with a next step and an exit code, tidy output."""

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from fedgraft.common import cli, errors
from fedgraft.common.console import Console, print_error

ROOT = Path(__file__).parents[2]
ROOMS = ["common", "client", "server", "simulations"]

# prints the heavy modules that a command loaded, after the command's own output
PROBE = """
import sys
from fedgraft.common.cli import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "peft", "flwr", "numpy", "datasets", "sklearn"}
    print("loaded:", sorted(heavy & set(sys.modules)))
"""


def python(
    *arguments: str, rooms: list[str] = ROOMS, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that sees these rooms only."""
    path = os.pathsep.join(str(ROOT / room) for room in rooms)
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return python("-m", "fedgraft", *arguments, cwd=cwd)


def offered() -> dict[str, str]:
    """First words of verbs, and their line of help: a group's own where verbs come in a group."""
    first = {verb.partition(" ")[0]: line for verb, (*_, line) in cli.VERBS.items()}
    return {verb: cli.GROUPS.get(verb, line) for verb, line in first.items()}


# --- as a user calls it


def test_help_lists_every_verb_without_loading_anything_heavy() -> None:
    result = python("-c", PROBE, "--help")
    assert result.returncode == 0, result.stderr
    listed = result.stdout.split("Commands:")[1]
    for verb, line in offered().items():
        assert f"{verb} " in listed
        assert line in listed
    assert result.stdout.endswith("loaded: []\n")


def test_every_verb_has_help() -> None:
    """In one process: tests/test_layout.py checks what that loads."""
    code = """
from fedgraft.common.cli import VERBS, command
for verb in VERBS:
    command([*verb.split(), "--help"], prog_name="fedgraft", standalone_mode=False)
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    usages = [line for line in result.stdout.splitlines() if line.startswith("Usage:")]
    for verb, usage in zip(cli.VERBS, usages, strict=True):
        assert f"fedgraft {verb} [OPTIONS]" in usage
    assert result.stderr == ""


def test_the_module_is_the_command() -> None:
    result = command("init", "--help")
    assert result.returncode == 0
    assert "Write a commented job file" in result.stdout


def test_an_unknown_verb_exits_2_and_is_named() -> None:
    result = command("simulat")
    assert result.returncode == 2
    assert "simulat" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_option_of_a_verb_exits_2() -> None:
    result = command("runs", "--nope")
    assert result.returncode == 2
    assert "--nope" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_error_is_two_lines_on_stderr_and_its_exit_code() -> None:
    result = command("simulate", "--engine", "steam")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "error: no engine steam\nhint: --engine local or --engine ray\n"


def test_verbose_adds_the_traceback_after_the_error() -> None:
    result = command("-v", "simulate", "--engine", "steam")
    assert result.returncode == 2
    assert result.stderr.startswith("error: no engine steam\nhint: ")
    assert "Traceback (most recent call last)" in result.stderr
    assert "InputError" in result.stderr


def test_a_job_file_is_written_once_and_never_over_another(tmp_path: Path) -> None:
    assert command("init", cwd=tmp_path).returncode == 0
    written = (tmp_path / "job.toml").read_text()
    again = command("init", cwd=tmp_path)
    assert again.returncode == 2
    assert "error: job.toml exists already" in again.stderr
    assert (tmp_path / "job.toml").read_text() == written


def test_a_verb_of_a_room_that_is_not_installed_says_so() -> None:
    code = (
        "import sys\n"
        "keep = lambda path: not path.endswith(('/server', '/simulations', '/client'))\n"
        "sys.path[:] = filter(keep, sys.path)\n"
        "from fedgraft.common.cli import main\n"
        "main()\n"
    )
    for verb in ("check", "simulate"):
        result = python("-c", code, verb, "--help", rooms=["common"])
        assert result.returncode == 2
        assert f"`{verb}` is not part of this install" in result.stderr
        assert "Traceback" not in result.stderr


def test_a_verb_with_two_places_is_that_of_the_first_room_that_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("fedgraft_one", "fedgraft_two"):
        module = types.ModuleType(name)
        module.verb = lambda name=name: print(name)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(cli.VERBS, "twice", ("fedgraft_one:verb", "fedgraft_two:verb", "Say."))
    monkeypatch.setattr(sys, "argv", ["fedgraft", "twice"])
    for installed, said in (("onetwo", "fedgraft_one\n"), ("two", "fedgraft_two\n")):
        found = {f"fedgraft_{name}:verb" for name in ("one", "two") if name in installed}
        monkeypatch.setattr(cli, "_room_is_there", found.__contains__)
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0
        assert capsys.readouterr().out == said


CHECK = """
import sys
sys.path[:] = [path for path in sys.path if not path.endswith(("/simulations", "/client"))]
from fedgraft.common.cli import main
try:
    main()
finally:
    print("simulations:", any("simulations" in name for name in sys.modules))
"""


@pytest.mark.slow
def test_without_simulations_check_is_the_coordinators_own_and_knows_no_sites() -> None:
    """The job has a simulation; everything else of it is checked."""
    job = str(ROOT / "simulations/fedgraft/simulations/demo/digits.toml")
    done = python("-c", CHECK, "check", job, "--json", rooms=["common", "server"])
    assert done.returncode == 0, done.stderr
    facts, _, loaded = done.stdout.rpartition("simulations:")
    said = json.loads(facts)
    assert (said["sites"], said["skipped_files"]) == ([], 0)
    assert said["bytes_up_per_site_round"] > 0
    assert loaded.strip() == "False"


# --- what becomes of an error

Call = Callable[..., int]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the command in this process with a verb ``boom`` that raises."""

    def run(error: BaseException | None, *options: str) -> int:
        def boom() -> None:
            if error is not None:
                raise error

        module = types.ModuleType("fedgraft_boom")
        module.boom = boom  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fedgraft_boom", module)
        monkeypatch.setitem(cli.VERBS, "boom", ("fedgraft_boom:boom", "Raise."))
        monkeypatch.setattr(sys, "argv", ["fedgraft", *options, "boom"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        return caught.value.code

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.FedgraftError, 1),
        (errors.InputError, 2),
        (errors.JobError, 2),
        (errors.DataError, 2),
        (errors.BackboneError, 2),
        (errors.AdapterError, 2),
        (errors.TooFewSites, 4),
        (errors.RunError, 1),
        (errors.CheckpointError, 1),
        (errors.MessageError, 1),
    ],
)
def test_each_error_has_its_exit_code(
    call: Call,
    capsys: pytest.CaptureFixture[str],
    error: type[errors.FedgraftError],
    code: int,
) -> None:
    assert call(error("it broke", hint="mend it")) == code
    assert capsys.readouterr().err == "error: it broke\nhint: mend it\n"


def test_an_error_without_a_next_step_has_no_hint_line(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(errors.SiteFailure("out-of-memory")) == 1
    assert capsys.readouterr().err == "error: out-of-memory\n"


@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_either_flag_shows_the_traceback(
    call: Call, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    call(errors.RunError("it broke"), flag)
    assert "Traceback" in capsys.readouterr().err


def test_a_verb_that_ends_well_exits_0(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(None) == 0
    assert capsys.readouterr().err == ""


def test_an_interrupt_exits_130_without_a_traceback(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(KeyboardInterrupt()) == 130
    error = capsys.readouterr().err
    assert "interrupted" in error
    assert "Traceback" not in error


def test_a_reader_that_went_away_is_no_traceback(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(BrokenPipeError()) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_package_missing_inside_a_verb_is_not_taken_for_a_missing_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fedgraft_needy.py").write_text("import package_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.VERBS, "needy", ("fedgraft_needy:verb", "Need."))
    monkeypatch.setattr(sys, "argv", ["fedgraft", "needy"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    error = capsys.readouterr().err
    assert "package_nobody_has is not installed" in error
    assert "not part of this install" not in error


def test_every_public_error_is_in_the_tree_at_the_top_of_its_file() -> None:
    assert errors.__doc__ is not None
    for name in errors.__all__:
        kind = getattr(errors, name)
        if name == "first_line":  # a function
            continue
        (line,) = (line for line in errors.__doc__.splitlines() if f" {name} " in f" {line} ")
        parent = next(base for base in kind.__mro__ if "exit_code" in vars(base))
        if "exit" in line:
            assert f"exit {kind.exit_code}" in line
        else:
            assert parent is not kind


# --- the console


def test_results_go_to_stdout_and_notes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.text("a result")
    console.note("a note")
    console.json({"a": 1})
    shown = capsys.readouterr()
    assert shown.out == "a result\n"
    assert shown.err == "a note\n"


def test_json_is_all_there_is_on_stdout_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(as_json=True)
    console.text("a result")
    console.table("Title", ["a"], [["1"]])
    console.note("a note")
    console.json({"a": [1, "ü"]})
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"a": [1, "ü"]}
    assert shown.err == "a note\n"


def test_quiet_keeps_results_only(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.note("a note")
    with console.steps("round", 2) as steps:
        steps.done("fine")
    console.text("a result")
    assert capsys.readouterr() == ("a result\n", "")


def test_text_is_never_taken_for_markup_and_never_wrapped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console()
    long = "[bold]x[/bold] " + "word " * 60 + "end"
    console.text(long)
    console.note(long)
    assert capsys.readouterr() == (long + "\n", long + "\n")


def test_a_table_shows_its_title_columns_and_cells(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table("Runs", ["run", "rounds", "status"], [["a", "3", "ok"], ["b", "12", "ok"]])
    out = capsys.readouterr().out
    assert out.splitlines()[0].rstrip() == "Runs"
    (header,) = (line for line in out.splitlines() if "run" in line and "status" in line)
    (row,) = (line for line in out.splitlines() if "12" in line)
    assert row.index("12") + 2 == header.index("rounds") + len("rounds")  # set right


def test_progress_is_one_plain_line_a_step_off_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Console().steps("round", 4, done=2) as steps:
        steps.done("accuracy 50 %")
        steps.done("accuracy 60 %")
    shown = capsys.readouterr()
    assert shown.err == "round 3/4  accuracy 50 %\nround 4/4  accuracy 60 %\n"
    assert shown.out == ""


def test_print_error_writes_to_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(errors.JobError("two\nlines", hint="mend both"))
    assert capsys.readouterr() == ("", "error: two\nlines\nhint: mend both\n")
