"""The atlas: every model class of the installed Transformers at tiny size, and what this package does with it.

    python benchmarks/atlas.py --workers 2
    python benchmarks/atlas.py --only bert llama --stages prune 2:4

It builds one model per model type, finds inputs with which it runs, and tries each stage: Wanda at 0.5 and 2:4 against
an independent implementation (`atlas_reference.py`), reconstruction by submodule and by block, structured pruning with
`compact`, and `prune_checkpoint` against memory. After each, the model is as before but for its weights. It writes
`docs/atlas.md` and `benchmarks/results/atlas.json`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
STAGES = ["prune", "2:4", "submodule", "block", "structured", "checkpoint"]
MEMORY = 10 << 30
# A model that takes longer than all its stages may is stopped with its process.
SILENCE = 500


def try_model(entry: Any, stages: list[str]) -> dict[str, Any]:
    """Return the row of one model type."""
    import torch

    from atlas_inputs import find_batches
    from atlas_models import NotBuilt, build, configurations, first_line
    from atlas_stages import OutOfTime, Stages, limit

    row: dict[str, Any] = {"type": entry.type, "kind": entry.kind, "class": entry.cls}
    started = time.perf_counter()
    failures: list[str] = []
    model = batches = None
    try:
        with limit(90):
            for config in configurations(entry):
                if isinstance(config, Exception):
                    failures.append(first_line(config))
                    continue
                try:
                    model = build(entry, config)
                    batches = find_batches(model)
                    break
                except Exception as error:
                    failures.append(first_line(error) if not isinstance(error, NotBuilt) else str(error))
    except NotBuilt as error:
        failures.append(str(error))
    except OutOfTime:
        failures.append("no inputs within 90 s")
    if model is None or batches is None:
        missing = next((f for f in failures if "requires the" in f), None)
        return row | {"skipped": missing or (failures[0] if failures else "nothing to try")}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["inputs"] = {k: list(v.shape) if isinstance(v, torch.Tensor) else str(v) for k, v in batches[0].items()}
    tried = Stages(model, batches)
    try:
        with limit(60):
            tried.prepare()
    except (Exception, OutOfTime) as error:
        return row | {"skipped": f"its own pass with hooks fails: {first_line(error)}"}
    row["padding"] = tried.how
    for stage in stages:
        began = time.perf_counter()
        row[stage] = tried.run(stage)
        row.setdefault("seconds", {})[stage] = round(time.perf_counter() - began, 2)
    row["seconds"]["all"] = round(time.perf_counter() - started, 2)
    return row


def work(types: list[str], stages: list[str], output: Path) -> None:
    """Try model types one after the other, and write a line before and after each."""
    import resource
    import warnings

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    from atlas_models import entries

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    known = {entry.type: entry for entry in entries()}
    with output.open("a") as file:
        for name in types:
            print(json.dumps({"began": name}), file=file, flush=True)
            print(json.dumps(try_model(known[name], stages)), file=file, flush=True)


def supervise(types: list[str], stages: list[str], workers: int, kept: Path | None = None) -> list[dict[str, Any]]:
    """Run the types in `workers` processes at a time, and go on behind a type that ends its process.

    Each row is appended to the file `kept` as it comes.
    """
    from atlas_models import entries

    known = {entry.type: entry for entry in entries()}
    rows: dict[str, dict[str, Any]] = {}
    queues = [types[i::workers] for i in range(workers)]
    running: list[Any] = [None] * workers
    with tempfile.TemporaryDirectory() as folder:
        while any(queues) or any(running):
            for number in range(workers):
                if running[number] is None and queues[number]:
                    running[number] = _start(queues[number][:40], stages, Path(folder, f"{number}.jsonl"))
                if running[number] is not None:
                    lines, alive = _look(running[number], known)
                    for line in lines:
                        rows[line["type"]] = line
                        print(_short(line), flush=True)
                        if kept is not None:
                            with kept.open("a") as file:
                                print(json.dumps(line), file=file)
                    queues[number] = [t for t in queues[number] if t not in rows]
                    running[number] = running[number] if alive else None
            time.sleep(0.5)
    return [rows[name] for name in types if name in rows]


def _start(types: list[str], stages: list[str], output: Path) -> dict[str, Any]:
    output.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "atlas.py"), "--worker", str(output), "--stages", *stages, "--only", *types]
    log = output.with_suffix(".log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    return {"process": process, "output": output, "read": 0, "now": None, "since": time.monotonic(), "types": types}


def _look(run: dict[str, Any], known: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """Return the new rows of a process, and whether it goes on."""
    code = run["process"].poll()
    lines = run["output"].read_text().splitlines()[run["read"] :] if run["output"].exists() else []
    run["read"] += len(lines)
    rows = []
    for line in map(json.loads, lines):
        run["since"] = time.monotonic()
        run["now"] = line.get("began")
        if "type" in line:
            rows.append(line)
    if code is None and time.monotonic() - run["since"] < SILENCE:
        return rows, True
    if code is None:
        run["process"].kill()
        run["process"].wait()
    name = run["now"] or (run["types"][0] if run["read"] == 0 else None)
    if name is not None:
        entry = known[name]
        reason = "took too long" if code is None else f"ended its process with code {code}"
        tail = run["output"].with_suffix(".log").read_text().strip().splitlines()[-1:]
        rows.append(
            {"type": name, "kind": entry.kind, "class": entry.cls, "crashed": f"{reason} {' '.join(tail)[:150]}"}
        )
    return rows, False


def _short(row: dict[str, Any]) -> str:
    cells = [f"{stage}={row[stage][:90]}" for stage in STAGES if stage in row]
    what = row.get("skipped") or row.get("crashed") or "; ".join(cells)
    return f"{row['kind']:<16} {row['type']:<28} {what}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="model types; all by default")
    parser.add_argument("--stages", nargs="*", default=STAGES, choices=STAGES, metavar="STAGE")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for atlas.md, atlas.json and rows.jsonl, written as rows come; instead of docs and results",
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if args.worker:
        work(args.only, args.stages, args.worker)
        return
    from atlas_models import entries
    from atlas_table import write

    types = [entry.type for entry in entries() if args.only is None or entry.type in args.only]
    started = time.perf_counter()
    kept = None
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        kept = args.output / "rows.jsonl"
        kept.unlink(missing_ok=True)
    rows = supervise(types, args.stages, args.workers, kept)
    if args.output is None and (args.only is not None or args.stages != STAGES):
        print("A part of the atlas is printed and not written; name a folder with --output to keep it.")
        return
    command = " ".join(["python", "benchmarks/atlas.py", *sys.argv[1:]])
    write(rows, args.stages, time.perf_counter() - started, args.output, command)


if __name__ == "__main__":
    main()
