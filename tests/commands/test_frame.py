"""The frame of the command line: help, the configuration file, and what each kind of error ends in."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from peft_sparse.commands import main as frame
from peft_sparse.commands import outcome
from peft_sparse.commands.main import COMMANDS, main

from texts import save_tiny_model, write_text


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ending(capsys):
    """The lines on standard error."""
    return capsys.readouterr().err.splitlines()


def test_the_help_lists_every_command_with_its_summary(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name in COMMANDS:
        module = importlib.import_module(f"peft_sparse.commands.{name}")
        assert f"  {name:<12}{module.SUMMARY}\n" in printed
    assert "exit codes: 0 done, 1 failed, 2 bad arguments, 3 refused" in printed


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_its_example_and_what_people_need_first(capsys, name):
    module = importlib.import_module(f"peft_sparse.commands.{name}")
    assert main([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert module.EXAMPLE in printed
    assert module.EXAMPLE.startswith(f"peft-sparse {name} ")
    assert "--adam_beta1" not in printed
    assert "--calibration-samples" not in printed
    # The example is one that the parser takes.
    assert frame._parsed(frame._parser(name), shlex.split(module.EXAMPLE)[2:])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_the_command_line_has_every_command_with_its_example(name):
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    assert f"\n## {name}\n\n    {importlib.import_module(f'peft_sparse.commands.{name}').EXAMPLE}\n" in page


def test_all_arguments_of_training_are_shown_if_asked(capsys):
    assert main(["retrain", "--help_all"]) == 0
    printed = capsys.readouterr().out
    assert "--adam_beta1" in printed
    assert printed.index("--learning_rate") < printed.index("--adam_beta1")


def test_the_version(capsys):
    import peft_sparse

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"peft_sparse {peft_sparse.__version__}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prnue"], "there is no command 'prnue'. Did you mean 'prune'?"),
        ([], "the following arguments are required: COMMAND"),
        (["prune", "--sparsty", "0.5"], "unrecognized arguments: --sparsty 0.5"),
        (["prune", "--sparsity", "half"], "argument --sparsity: invalid float value: 'half'"),
        (["prune", "--sparsity", "1.5", "--model", "model"], "1.5"),
        (["prune", "--sparsity", "0.5"], "A model is needed. Give --model with its folder"),
        (["compress", "--recipe", "slow"], "Expected a recipe: 'fast', 'balanced', 'best'"),
        (["prune", "--config", "none.yaml"], "--config: .*none.yaml"),
    ],
)
def test_bad_arguments_end_in_one_line_and_code_2(capsys, arguments, words):
    assert main(arguments) == 2
    lines = ending(capsys)
    assert len(lines) == 1
    assert lines[0].startswith("peft-sparse")
    assert "bad arguments: " in lines[0]
    assert re.search(words, lines[0])


def test_a_refusal_ends_in_one_line_and_code_3(folder, capsys):
    assert main(["prune", "--model", "./nowhere", "--sparsity", "0.5", "--use_cpu"]) == 3
    (line,) = ending(capsys)
    assert line.startswith("peft-sparse prune: refused: There is no folder './nowhere'. Give a folder of a model")
    save_tiny_model(folder / "model")
    # 2:5 divides no width of this model, which `prune` finds out.
    assert main(["prune", "--model", "model", "--pattern", "2:5", "--use_cpu"]) == 3
    assert "refused" in ending(capsys)[-1]


def test_the_traceback_is_shown_if_asked(capsys):
    assert main(["prune", "--model", "./nowhere", "--sparsity", "0.5", "--use_cpu", "--traceback"]) == 3
    lines = ending(capsys)
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("peft-sparse prune: refused: ")


def test_an_error_after_the_work_began_is_a_failure(folder, capsys, monkeypatch):
    from peft_sparse.commands import prune

    def full(*arguments, **options):
        raise OSError("No space left on device")

    save_tiny_model(folder / "model")
    monkeypatch.setattr(prune, "write_report", full)
    assert main(["prune", "--model", "model", "--sparsity", "0.5", "--use_cpu"]) == 1
    assert ending(capsys)[-1] == "peft-sparse prune: failed: No space left on device"


def test_an_error_in_the_middle_of_pruning_is_a_failure(folder, capsys, monkeypatch):
    from peft_sparse.pruning import prune as module

    save_tiny_model(folder / "model")
    former, seen = module.prune_weights, []

    def third(*arguments):
        seen.append(arguments)
        if len(seen) == 3:
            raise ValueError("the third call")
        return former(*arguments)

    monkeypatch.setattr(module, "prune_weights", third)
    assert main(["prune", "--model", "model", "--sparsity", "0.5", "--use_cpu"]) == 1
    line = ending(capsys)[-1]
    assert line.startswith("peft-sparse prune: failed: the third call While pruning block 'model.layers.1'")


@pytest.mark.parametrize(("pruned", "code"), [(False, 3), (True, 1)])
def test_an_error_of_a_compression_is_a_refusal_until_it_has_pruned(folder, capsys, monkeypatch, pruned, code):
    from peft_sparse import prune
    from peft_sparse.commands import compress

    def compressed(model, *arguments, **options):
        if pruned:
            prune(model, 0.5)
        raise ValueError("in the middle")

    save_tiny_model(folder / "model")
    write_text(folder / "text.txt")
    monkeypatch.setattr(compress, "compress", compressed)
    lengths = ["--sequence_length", "16", "--calibration_length", "8", "--evaluation_length", "16"]
    assert main(["compress", "--model", "model", "--text_file", "text.txt", "--use_cpu", *lengths]) == code
    assert "in the middle" in ending(capsys)[-1]


def test_a_defect_shows_its_traceback(capsys, monkeypatch):
    from peft_sparse.commands import prune

    monkeypatch.setattr(prune, "run", lambda args: {}["missing"])
    assert main(["prune"]) == 1
    lines = ending(capsys)
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "peft-sparse prune: failed: KeyError: 'missing'"


def test_an_interruption_is_a_failure_without_a_traceback(capsys, monkeypatch):
    from peft_sparse.commands import prune

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune, "run", interrupted)
    assert main(["prune"]) == 1
    assert ending(capsys) == ["peft-sparse prune: interrupted"]


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(folder):
    (folder / "run.yaml").write_text(
        "sparsity: 0.6\ncriterion: wanda\ntarget_modules: [q_proj, k_proj]\nupdate: true\ncalibration-samples: 4\n"
    )
    parser = frame._parser("prune")
    args = frame._parsed(parser, ["--config", "run.yaml", "--sparsity", "0.7"])
    assert (args.sparsity, args.criterion, args.update, args.calibration_samples) == (0.7, "wanda", True, 4)
    assert args.target_modules == ["q_proj", "k_proj"]


def test_a_run_from_a_file_is_the_run_of_its_arguments(folder):
    save_tiny_model(folder / "model")
    write_text(folder / "text.txt")
    (folder / "run.yaml").write_text(
        "model_name_or_path: model\ntext_file: text.txt\nsparsity: 0.5\ncriterion: sparsegpt\nuse_cpu: true\n"
        "criterion_options: {damping: 0.1}\ncalibration_length: 8\ncalibration_samples: 4\nlearning_rate: 1e-3\n"
    )
    # `prune` has no learning rate, and says so before anything else.
    assert main(["prune", "--config", "run.yaml"]) == 2
    text = (folder / "run.yaml").read_text().replace("learning_rate: 1e-3\n", "")
    (folder / "run.yaml").write_text(text)
    assert main(["prune", "--config", "run.yaml"]) == 0


def test_a_file_may_hold_what_a_command_line_may(folder):
    (folder / "run.yaml").write_text(
        "model: dense\npattern: 2:4\nlearning_rate: 1e-3\nsave_strategy: no\ntarget_modules: q_proj\nseed:\n"
    )
    args = frame._parsed(frame._parser("retrain"), ["--config", "run.yaml"])
    assert (args.model_name_or_path, args.pattern, args.learning_rate) == ("dense", "2:4", 1e-3)
    assert (args.save_strategy, args.target_modules) == ("no", ["q_proj"])
    assert "seed" not in args
    (folder / "models.yaml").write_text("models: [dense, sparse]\nspeed: true\nrounds: 0\n")
    args = frame._parsed(frame._parser("evaluate"), ["--config", "models.yaml"])
    assert (args.models, args.speed, args.rounds) == (["dense", "sparse"], True, 0)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("criterium: wanda\n", "unknown name 'criterium'. Did you mean 'criterion'? `peft-sparse"),
        ("- wanda\n", "got list"),
        ('sparsity: "50%"\n', "argument --sparsity: invalid float value: '50%'"),
        ("sparsity: [0.5]\n", "run.yaml: sparsity: expected one value, got the list [0.5]"),
        ("sparsity: 0.5\n  criterion: wanda\n", "Expected 'run.yaml' to be YAML with names and values"),
        ("traceback: true\n", "unknown name 'traceback'"),
    ],
)
def test_a_file_with_other_names_is_refused(folder, capsys, written, words):
    (folder / "run.yaml").write_text(written)
    assert main(["prune", "--config", "run.yaml"]) == 2
    assert words in ending(capsys)[-1]


def test_which_errors_are_refusals():
    outcome.forget_work()
    assert outcome.code_of(ValueError("x")) == outcome.code_of(FileNotFoundError("x")) == outcome.REFUSED
    assert outcome.code_of(RuntimeError("x")) == outcome.code_of(KeyError("x")) == outcome.FAILED
    assert outcome.code_of(outcome.BadArguments("x")) == outcome.BAD_ARGUMENTS
    noted = ValueError("x")
    noted.add_note("While pruning block 'b'")
    assert outcome.code_of(noted) == outcome.FAILED
    outcome.begin_work()
    assert outcome.code_of(ValueError("x")) == outcome.FAILED
    outcome.forget_work()


def test_a_command_is_a_module_of_this_form():
    for name in COMMANDS:
        module = importlib.import_module(f"peft_sparse.commands.{name}")
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        assert isinstance(module.SUMMARY, str)
        assert callable(module.run)
