r"""Runs one of PEFT's method comparisons with the tuners of this package.

    python benchmarks/method_comparison/run.py CHECKOUT experiments/mask_lora/llama-3.2-3B-rank32 -v
    python benchmarks/method_comparison/run.py --model-id pruned/sparse \
        CHECKOUT experiments/mask_lora/llama-3.2-3B-rank32 -v

PEFT's `run.py` knows only methods that are registered when it starts. This script imports `peft_sparse`, which
registers its methods, and then runs the `run.py` of the checkout. README.md in this folder tells what a run needs.
"""

import argparse
import contextlib
import json
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

# Registers its methods with PEFT. `run.py` of PEFT reads the configuration of the experiment afterwards.
import peft_sparse  # noqa: F401


HERE = Path(__file__).resolve().parent
PARAMETERS = "training_params.json"


def main(arguments: list[str] | None = None) -> None:
    """Run an experiment, as PEFT's `run.py` does.

    Args:
        arguments: those of the command line. None takes `sys.argv`.
    """
    options = parser()
    args = options.parse_args(arguments)
    suite = args.checkout.expanduser().resolve() / "method_comparison" / args.suite
    if not (suite / "run.py").is_file():
        options.error(f"{suite} holds no run.py. Expected a checkout of huggingface/peft, got {args.checkout}.")
    experiment = found(args.experiment, HERE / args.suite, suite)
    if experiment is None:
        options.error(
            f"Expected experiments/METHOD/NAME, a folder in {HERE / args.suite} or in {suite}, got {args.experiment}."
        )
    with tempfile.TemporaryDirectory() as folder:
        name = staged(experiment, Path(folder), args.model_id)
        # What `python run.py` would set. PEFT's script takes the experiment by a path relative to the current folder.
        sys.argv = [str(suite / "run.py"), name, *args.rest]
        sys.path.insert(0, str(suite))
        with contextlib.chdir(folder):
            runpy.run_path(str(suite / "run.py"), run_name="__main__")


def found(experiment: Path, *suites: Path) -> Path | None:
    """Return the folder of the experiment in the first of the suites that has it. None if there is none."""
    if len(experiment.parts) != 3 or experiment.parts[0] != "experiments":
        return None
    return next((suite / experiment for suite in suites if (suite / experiment).is_dir()), None)


def staged(experiment: Path, folder: Path, model_id: str | None) -> str:
    """Copy an experiment into `folder`, with another base model if one is given, and return its path there.

    Args:
        experiment: its folder, experiments/METHOD/NAME.
        folder: where it is copied to.
        model_id: a model of the Hub, or a folder. The name of the copy then ends with the last part of its name.
    """
    name = experiment.name
    if model_id is not None:
        path = Path(model_id).expanduser()
        model_id = str(path.resolve()) if path.is_dir() else model_id
        name = f"{name}-on-{'-'.join(Path(model_id).parts[-2:])}"
    relative = os.path.join("experiments", experiment.parent.name, name)
    copy = folder / relative
    shutil.copytree(experiment, copy)
    if model_id is not None:
        parameters = json.loads((copy / PARAMETERS).read_text()) if (copy / PARAMETERS).exists() else {}
        (copy / PARAMETERS).write_text(json.dumps({**parameters, "model_id": model_id}, indent=2) + "\n")
    return relative


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--suite", default="MetaMathQA", help="folder in method_comparison of the checkout")
    options.add_argument(
        "--model-id", help="another base model: a folder, such as a pruned model, or a name of the Hub"
    )
    options.add_argument("checkout", type=Path, help="a checkout of huggingface/peft")
    options.add_argument("experiment", type=Path, help="experiments/METHOD/NAME, of this folder or of the checkout")
    options.add_argument("rest", nargs=argparse.REMAINDER, help="arguments of PEFT's run.py, such as -v --clean")
    return options


if __name__ == "__main__":
    main()
