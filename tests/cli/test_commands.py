"""The command as a whole: quick to answer, light, and every expected error one line with its exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from ebr_engine.cli import group
from ebr_engine.errors import EbrError
from ebr_engine.version import __version__

HEAVY = ("torch", "numpy", "pyvips", "PIL", "transformers", "diffusers")


def python(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["restore", "--help"], ["info", "--help"], []])
def test_help_imports_nothing_heavy(arguments):
    script = f"import sys, ebr_engine.cli as cli\ntry: cli.app({arguments!r}, prog_name='ebr-engine')\n"
    script += f"except SystemExit as end: print('LOADED', end.code, [n for n in {HEAVY!r} if n in sys.modules])"
    result = python(script)
    assert result.stdout.splitlines()[-1] == "LOADED 0 []", result
    assert __version__ in result.stdout if arguments == ["--version"] else "Usage: ebr-engine" in result.stdout


@pytest.mark.skipif(os.name == "nt", reason="no times of child processes")
def test_help_answers_quickly():
    script = "import sys; sys.argv = ['ebr-engine', '--help']; from ebr_engine.cli import main; main()"
    seconds = []
    for _ in range(3):
        before = os.times()  # of the processor: the clock on the wall also counts what else the machine does
        assert python(script).returncode == 0
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    assert 0 < min(seconds) < 0.7  # about 0.2 s


def test_help_lists_every_command(cli):
    _, stdout, _ = cli("--help")
    for name in group._LazyCommands():
        assert f" {name} " in stdout


def test_every_option_of_restore_has_help(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    command = group._LazyCommands()["restore"]
    assert len(command.params) > 15
    assert all(getattr(parameter, "help", None) for parameter in command.params)
    _, stdout, _ = cli("restore", "--help")
    for panel in ("What to repair", "Files", "Sampling", "Computing"):
        assert panel in stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["restor"], ["restor", "Did you mean", "restore"]),
        (["--verbose"], ["--verbose"]),
        (["restore"], ["INPUT"]),
        (["info", "--jsn"], ["--jsn", "--json"]),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(cli, arguments, words):
    code, stdout, stderr = cli(*arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert len(stderr.splitlines()) == 1
    assert "--help)" in stderr
    for word in words:
        assert word in stderr


class OutOfMemoryError(RuntimeError):
    """As torch.OutOfMemoryError is."""


@pytest.fixture
def failing(monkeypatch):
    """Make `ebr-engine info` raise what the test wants."""

    def make(error):
        def command():
            raise error

        app = typer.Typer(add_completion=False)
        app.command("info")(command)
        monkeypatch.setattr(group, "_click_command", lambda name, target: typer.main.get_command(app))

    return make


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (EbrError("the prompt is for wan,\n  not for mini"), 2, "error: the prompt is for wan, not for mini"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), 1, "error: x.png: No such file or directory"),
        (OSError("disk on fire"), 1, "error: disk on fire"),
        (MemoryError(), 1, "error: not enough memory; a smaller --tile needs less"),
        (OutOfMemoryError("CUDA out of memory.\nTried"), 1, "error: not enough memory; a smaller --tile needs less"),
        (ModuleNotFoundError("No", name="scipy"), 2, "error: scipy is not installed: pip install 'ebr-engine[train]'"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_expected_errors_are_one_line(cli, failing, error, code, line):
    failing(error)
    assert cli("info") == (code, "", line + "\n")


def test_bugs_are_not_hidden(cli, failing):
    failing(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli("info")
    failing(ModuleNotFoundError("No module named 'ebr_engine.typo'", name="ebr_engine.typo"))
    with pytest.raises(ModuleNotFoundError):
        cli("info")
    failing(ZeroDivisionError("another"))
    with pytest.raises(ZeroDivisionError):
        cli("info")


@pytest.mark.parametrize("arguments", [["--debug", "info"], ["info", "--debug"]])
def test_debug_shows_where_an_error_came_from(cli, failing, arguments):
    failing(EbrError("bad input"))
    with pytest.raises(EbrError):
        cli(*arguments)


def test_the_environment_can_ask_for_debug_too(cli, failing, monkeypatch):
    failing(EbrError("bad input"))
    monkeypatch.setenv("EBR_DEBUG", "1")
    with pytest.raises(EbrError):
        cli("info")
    monkeypatch.setenv("EBR_DEBUG", "0")
    assert cli("info")[0] == 2


def test_a_traceback_is_printed_with_debug_and_only_then(tmp_path):
    script = "import sys; from ebr_engine.cli import main; sys.argv[1:] = sys.argv[1:] + {}; main()"
    arguments = ["restore", str(tmp_path / "nope.png"), "-o", str(tmp_path / "out"), "--task", "haze"]
    plain, debug = (python(script.format(repr(arguments + more))) for more in ([], ["--debug"]))
    assert plain.returncode == 2
    assert "Traceback" not in plain.stderr
    assert "MediaError" not in plain.stderr
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr
    assert "MediaError" in debug.stderr


def test_a_closed_pipe_ends_quietly():
    if not Path("/bin/sh").exists():
        pytest.skip("needs a shell")
    command = f"{sys.executable} -c 'from ebr_engine.cli import main; main()' --help | true"
    result = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
