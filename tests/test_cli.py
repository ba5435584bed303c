"""The command `qtseg`: help without PyTorch, options that take several values, exit statuses, one sentence an error."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
import typer
from conftest import ROOT

from qtseg.cli import app, main, prepare, subcommand
from qtseg.data import phantom_sets
from qtseg.training.config import TrainConfig

COMMANDS = [[name] for name in ("train", "evaluate", "predict", "export", "study")] + [["prepare", command.name or command.callback.__name__]
                                                                                       for command in prepare.registered_commands]


def test_help_shows_an_example_of_every_command_and_needs_no_torch():
    code = ("import contextlib, io, json, sys\nfrom qtseg.cli import main\nsaid = []\n"
            "for words in json.loads(sys.argv[1]):\n"
            "    with contextlib.redirect_stdout(io.StringIO()) as out:\n        assert main([*words, '--help']) == 0\n"
            "    said.append(out.getvalue())\n"
            "heavy = {'torch', 'cv2', 'matplotlib', 'rich'} & sys.modules.keys()\nprint(json.dumps([said, sorted(heavy)]))")
    others = COMMANDS[1:]  # train's names the choices of every key, and imports them
    done = subprocess.run([sys.executable, "-c", code, json.dumps([[], *others])], capture_output=True, text=True, check=True)
    (overview, *pages), heavy = json.loads(done.stdout)
    assert not heavy and all(f"  {words[0]} " in overview for words in COMMANDS) and len(pages) == 17
    for words, page in zip(others, pages):
        assert f"Usage: qtseg {' '.join(words)} " in page and f"\n    qtseg {' '.join(words)} " in page.partition("Examples:")[2], page


def test_help_of_train_lists_every_key_with_default_meaning_and_what_it_takes(capsys):
    assert main(["train", "--help"]) == 0
    page = capsys.readouterr().out
    assert "Usage: qtseg train " in page and "\n    qtseg train " in page
    table = page.partition("Keys and their defaults")[2]
    for key, field in TrainConfig.model_fields.items():
        assert f"\n  {key}=" in table and field.description and field.description.split(",")[0][:40] in " ".join(table.split())
    assert "lr=0.001" in table and "(a number > 0)" in table and "(one of adamw, adam, sgd)" in table


def test_the_console_script_is_this_command():
    scripts = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.scripts]\n")[2].partition("\n\n")[0]
    assert scripts == 'qtseg = "qtseg.cli:main"'


@pytest.mark.parametrize("words, status", [([], 2), (["--help"], 0), (["-h"], 0), (["fly"], 2), (["train", "--help"], 0), (["train"], 2), (["evaluate"], 2), (["study"], 2),
                                           (["export", "x", "--opset", "new"], 2), (["prepare"], 2), (["prepare", "busi", "--folds", "many"], 2),
                                           (["prepare", "own"], 2), (["predict", "run", "image"], 2), (["evaluate", "run", "--split", "exam"], 2)])
def test_wrong_usage_is_status_2(words, status, capsys):
    assert main(words) == status
    captured = capsys.readouterr()
    assert "Usage: qtseg" in captured.out + captured.err and "Traceback" not in captured.err


@pytest.fixture
def command():
    """A function that makes a subcommand for a test and returns its words; it is gone afterwards."""
    before = list(app.registered_commands)

    def make(function, *also) -> list[str]:
        subcommand(app, "  qtseg probe", *also, name="probe")(function)
        return ["probe"]

    yield make
    app.registered_commands[:] = before


class OutOfMemoryError(RuntimeError):
    """As torch's is called."""


@pytest.mark.parametrize("error, status, said", [
    (ValueError("a \x1b[2J name\nof two lines"), 1, "a \\x1b[2J name\\nof two lines"), (FileNotFoundError("no file"), 1, "no file"),
    (FileNotFoundError(2, "No such file or directory", "nope.yaml"), 1, "nope.yaml: No such file or directory"),
    (ModuleNotFoundError("pip install x"), 1, "pip install x"), (FloatingPointError("nan"), 1, "nan"),
    (OutOfMemoryError("CUDA"), 1, "the device has too little memory: choose a smaller batch"), (KeyboardInterrupt(), 130, "stopped; the same command goes on"),
    (KeyboardInterrupt("stopped in epoch 3"), 130, "stopped in epoch 3")])
def test_an_error_is_one_sentence_and_a_status(command, capsys, monkeypatch, error, status, said):
    def fails() -> None:
        raise error

    words = command(fails)
    assert main(words) == status and capsys.readouterr().err == f"qtseg probe: {said}\n"
    monkeypatch.setenv("RANK", "1")  # one of several processes that train together: the first speaks for all
    assert main(words) == status and not capsys.readouterr().err


def test_every_problem_of_a_data_set_has_a_line(command, capsys):
    from qtseg.data.cache import DataProblems

    def fails() -> None:
        raise DataProblems("folder", ["a\x07.png is broken", "b.png has no mask"])

    assert main(command(fails)) == 1
    assert capsys.readouterr().err == "qtseg probe: 2 problem(s) in folder:\n  a\\x07.png is broken\n  b.png has no mask\n"


def test_an_error_that_nobody_expects_keeps_its_traceback(command):
    def fails() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main(command(fails))
    assert main(command(fails, RuntimeError)) == 1


def test_an_option_takes_several_values(command):
    got = []

    def takes(name: str, sizes: list[int] = typer.Option([]), other: int = 0) -> int:
        got.append((name, sizes, other))
        return 3

    words = command(takes)
    for given in (["x", "--sizes", "1", "-2", "3", "--other", "4"], ["--sizes", "1", "--sizes", "-2", "--sizes", "3", "--other", "4", "x"]):
        assert main([*words, *given]) == 3
    assert got == [("x", [1, -2, 3], 4)] * 2
    assert main([*words, "x"]) == 3 and got[-1] == ("x", [], 0)


def test_train_takes_what_papermill_takes_and_says_where_everything_is(tmp_path, capsys, monkeypatch):
    for name in [name for name in os.environ if name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    (tmp_path / "p.yaml").write_text("data: phantoms:dermoscopy:24\nsize: 64\nwidth: 4\nmlp_width: 32\nepochs: 9\nbatch: 4\n")
    assert main(["train", str(tmp_path / "p.yaml"), "depths=[1, 1, 1]", "epochs=1", "lr=3e-4", "device=cpu", "name=one", "progress=false",
                 f"runs={tmp_path}", f"cache={tmp_path / 'cache'}"]) == 0
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (config["epochs"], config["lr"], config["depths"]) == (1, 3e-4, [1, 1, 1])
    said = capsys.readouterr().out
    assert f"(the test split); everything is in {tmp_path / 'one'}" in said and "test Dice" not in said
    assert (tmp_path / "one" / "metrics.json").is_file()


def test_a_warning_is_shown_without_a_line_of_code(tmp_path, capsys, monkeypatch):
    before = warnings.formatwarning
    monkeypatch.setattr(phantom_sets, "write_prepared",
                        lambda out, *_: print(warnings.formatwarning("odd masks", UserWarning, "cli.py", 3)) or out)
    assert main(["prepare", "phantoms", str(tmp_path)]) == 0
    assert "warning: odd masks\n" in capsys.readouterr().out and warnings.formatwarning is before


def test_options_that_need_another_are_refused(tmp_path, capsys):
    assert main(["export", str(tmp_path), "--card", "--public"]) == 1
    assert capsys.readouterr().err == "qtseg export: a public repository needs a name: --public goes with --push USER/NAME\n"
