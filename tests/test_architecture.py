"""The structure of the package, held by tests: import order, public names, what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import peft_sparse


PACKAGE = Path(peft_sparse.__file__).parent

# Each may import from those above it and from its own folder; a set holds siblings that must not know each other.
ORDER = [
    {"model"},
    {"calibration", "tuners"},
    {"pruning", "structured", "evaluation"},
    {"reconstruction"},
    {"reporting", "sharing"},
    {"training"},
    {"planning"},
    {"recipes"},
    {"__init__"},
    {"commands"},
    {"__main__"},
]


def imports_of(path: Path) -> set[str]:
    """The first component below the package of every relative import in a file."""
    inside = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            absolute = [*inside[: len(inside) - node.level + 1], *(node.module or "").split(".")]
            found.add(next(part for part in absolute if part) if any(absolute) else "__init__")
    return found


def violations(order, package) -> list[str]:
    rank = {name: index for index, names in enumerate(order) for name in names}
    found = []
    for path in sorted(package.rglob("*.py")):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for used in imports_of(path):
            if used != own and rank[used] >= rank[own]:
                found.append(f"{path.relative_to(package)} imports {used}")
    return found


def test_imports_follow_the_chain():
    assert violations(ORDER, PACKAGE) == []


def test_the_import_test_can_fail():
    assert violations(ORDER[::-1], PACKAGE)


def test_every_module_has_its_place():
    modules = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert modules == set.union(*ORDER)


def test_public_names_are_these():
    assert peft_sparse.__all__ == [
        "ERK",
        "GBLM",
        "LAMP",
        "OWL",
        "RIA",
        "Comparison",
        "Criterion",
        "CubicSchedule",
        "DSnoT",
        "Fit",
        "FreezingCallback",
        "GlobalMagnitude",
        "KernelReport",
        "LeastSquares",
        "LoadedModel",
        "Magnitude",
        "MaskLoRAConfig",
        "NormsReport",
        "PerplexityReport",
        "PruningCallback",
        "PruningCycles",
        "PruningReport",
        "Random",
        "Recipe",
        "ReconstructionObserver",
        "ReconstructionReport",
        "RegionReport",
        "ResidualReport",
        "ResidualWeightReport",
        "RunReport",
        "ScaledLoRAConfig",
        "SemiStructured",
        "SparseGPT",
        "SparseTrainer",
        "SparseTrainingArguments",
        "Stage",
        "Statistics",
        "Step",
        "Swap",
        "TaskReport",
        "TextPerplexity",
        "Uniform",
        "UniformPlus",
        "Unstructured",
        "Wanda",
        "ZeroGuardCallback",
        "compact",
        "compare_models",
        "compress",
        "environment",
        "evaluate_tasks",
        "generate_sequences",
        "generation_speeds",
        "inspect_checkpoint",
        "keep_effective_weights",
        "kernel_speed",
        "load_model",
        "load_recipe",
        "merged_state_dict",
        "metric_path",
        "pack_checkpoint",
        "pack_sequences",
        "peak_memory",
        "perplexity",
        "perplexity_by_domain",
        "plan_pruning",
        "plan_reconstruction",
        "plan_training",
        "prune",
        "prune_checkpoint",
        "prune_structured",
        "push_folder",
        "read_report",
        "recalibrate_norms",
        "reconstruct",
        "reconstruct_checkpoint",
        "report_page",
        "residual_lora",
        "retraining_schedule",
        "sample_sequences",
        "sparsity",
        "text_perplexity",
        "trainable_shares",
        "unpack_checkpoint",
        "write_card",
        "write_report",
    ]


def test_importing_stays_light():
    code = "import peft_sparse, sys; print([name in sys.modules for name in ('gguf', 'deepspeed', 'peft')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[False, False, True]"


def test_importing_works_without_the_modules_that_windows_lacks():
    found = [
        f"{path.name} imports {alias.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name in ("fcntl", "grp", "pwd", "resource", "termios")
    ]
    assert found == []


def test_functions_are_short_enough_to_read_whole():
    long = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - _first_statement(node).lineno > 60
    ]
    assert long == []


def _first_statement(function: ast.FunctionDef) -> ast.stmt:
    """The first statement after signature and docstring, which are references, not code."""
    return function.body[1 if ast.get_docstring(function) and len(function.body) > 1 else 0]
