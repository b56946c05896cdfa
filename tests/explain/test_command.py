"""``sqla-signals explain``, in a process of its own and in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from sqla_signals.cli import main

APP = "tests.explain.application"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "sqla_signals", "explain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_module_is_imported_and_what_it_connects_is_explained():
    """As text where nobody looks at it; status 1 only where asked for."""
    done = run(APP)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("everything  installed for every Session\n")
    assert "1. clinic.weigh  tests/explain/application.py:" in done.stdout
    assert "clinic.write (tests/explain/application.py:" in done.stdout
    assert run(APP, "--check").returncode == 1


def test_each_format_is_what_it_says():
    """And nothing else is on standard output."""
    assert json.loads(run(f"{APP}:Patient", "--format", "json").stdout)["installed"]
    assert run(f"{APP}:Patient", "--format", "mermaid").stdout.startswith("flowchart LR\n")
    assert run(f"{APP}:models", "--format", "dot").stdout.startswith("digraph")


def test_what_an_application_prints_when_it_is_imported_is_not_in_the_way(tmp_path):
    """It goes to standard error, and what is asked for is UTF-8 whatever the machine writes."""
    (tmp_path / "talking.py").write_text(
        "print('hello')\nfrom tests.explain.application import Patient\n"
        "from sqla_signals import post_save\n"
        "post_save.connect(lambda sender, **kwargs: None, Patient, weak=False, name='größe')\n",
        encoding="utf-8",
    )
    paths = os.pathsep.join([str(tmp_path), os.getcwd()])
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "sqla_signals", "explain", "talking:Patient", "--format"]
    for form in ("text", "json", "mermaid", "dot"):
        done = subprocess.run([*command, form], capture_output=True, env=env, timeout=60)
        assert (done.returncode, done.stderr.decode()) == (0, f"hello{os.linesep}")
        text = done.stdout.decode("utf-8")
        assert ("gr\\u00f6\\u00dfe" if form == "json" else "größe") in text
        assert "hello" not in text


def test_nothing_installed_is_told_without_a_warning_besides():
    """The models of the clinic alone have no install()."""
    done = run("tests.explain.clinic:Patient", "--check")
    assert (done.returncode, done.stderr) == (1, "")
    assert "sqla_signals.install()" in done.stdout


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("tests.explain.nowhere", "there is no module tests.explain.nowhere"),
        (":Patient", "give MODULE or MODULE:OBJECT"),
        (".models", "give MODULE or MODULE:OBJECT"),
        ("tests/explain/application.py", "there is no module tests/explain/application"),
        (f"{APP}:nobody", "has no 'nobody'"),
        (f"{APP}:weigh", "give a mapped class"),
    ],
)
def test_what_cannot_be_explained_is_an_error(what, message, capsys):
    """With status 2."""
    assert main(["explain", what]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "--app" not in error


def test_a_terminal_gets_rich_where_it_is_installed(capsys, monkeypatch):
    """And the plain text where it is not."""
    import rich

    shown = []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(rich, "print", shown.append)
    assert main(["explain", "tests.explain.clinic:Patient"]) == 0
    assert len(shown) == 1
    assert capsys.readouterr().out == ""
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["explain", "tests.explain.clinic:Patient"]) == 0
    assert capsys.readouterr().out == f"{shown[0]}\n"
