"""The command line in processes of its own: exit codes, the last line, and two processes of `accelerate launch`."""

import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from peft_sparse import sparsity
from peft_sparse.commands.main import main

from checks import assert_same_weights
from texts import save_tiny_model, write_text
from trainers import CONFIGS


# What the script `peft-sparse` does.
ALONE = [sys.executable, "-c", "from peft_sparse_command import start; start()"]
DDP = ["--config_file", str(CONFIGS / "ddp.yaml"), "--main_process_port", "0"]
IN_TWO = [sys.executable, "-m", "accelerate.commands.launch", *DDP, "-m", "peft_sparse"]
SMALL = ["--calibration_samples", "4", "--calibration_length", "8", "--use_cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    return tmp_path


def ended(*command):
    """Run a command to its end. Standard error is read until the last process that writes to it has ended."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("asked", ["--help", "--version"])
def test_the_list_of_commands_needs_no_import_of_the_package(asked):
    code = (
        "import atexit, sys; from peft_sparse_command import start; sys.argv = ['peft-sparse', *sys.argv[1:]]\n"
        "atexit.register(lambda: print([name in sys.modules for name in ('torch', 'transformers', 'peft')])); start()"
    )
    run = ended(sys.executable, "-c", code, asked)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[False, False, False]"


@pytest.mark.slow
def test_a_process_ends_with_the_code_of_its_command():
    refused = ended(*ALONE, "prune", "--model", "./nowhere", "--sparsity", "0.5", *SMALL)
    assert refused.returncode == 3
    assert refused.stderr.splitlines()[-1].startswith("peft-sparse prune: refused: There is no folder './nowhere'.")


@pytest.mark.slow
def test_two_processes_retrain_one_model_and_one_of_them_tells_it():
    asked = ["--model", "model", "--text_file", "text.txt", "--sparsity", "0.5", "--criterion", "wanda", *SMALL]
    run = ended(*IN_TWO, "retrain", *asked, "--max_steps", "3", "--sequence_length", "16", "--evaluation_length", "32")
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("| retrained |") == 1
    assert run.stdout.count("written: retrained/sparse") == 1
    assert sparsity(AutoModelForCausalLM.from_pretrained("retrained/sparse")) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "model", "--criterion", "wanda"], "bad arguments: A text is needed. Give --text_file FILE"),
        pytest.param(["--model", "./nowhere"], "refused: There is no folder './nowhere'.", marks=pytest.mark.slow),
    ],
)
def test_a_launcher_does_not_have_the_last_word(arguments, words):
    run = ended(*IN_TWO, "prune", *arguments, "--sparsity", "0.5", *SMALL)
    assert run.returncode == 1  # the launcher's own
    assert run.stderr.splitlines()[-1].startswith(f"peft-sparse prune: {words}")
    assert run.stderr.count("peft-sparse prune: ") == 1


@pytest.mark.slow
def test_two_processes_prune_as_one_does():
    asked = ["--model", "model", "--text_file", "text.txt", "--sparsity", "0.5", "--criterion", "wanda", *SMALL]
    run = ended(*IN_TWO, "prune", *asked)
    assert run.returncode == 0, run.stderr[-3000:]
    assert main(["prune", *asked, "--output_dir", "alone"]) == 0
    assert_same_weights(*(AutoModelForCausalLM.from_pretrained(f"{name}/sparse") for name in ("pruned", "alone")))
