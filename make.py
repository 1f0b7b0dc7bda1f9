#!/usr/bin/env python3
"""Set up an environment and run something in it. Needs Python 3.11 or newer, and PyPI.

python3 make.py demo [arguments of examples/compress.py]  compress a real model by a recipe, about six minutes
python3 make.py test [arguments of pytest]                everything CI runs: format, lint, types, the site, all tests
python3 make.py docs [arguments of sphinx-build]          the documentation as a site, .site/index.html
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
BIN = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")


def main() -> int:
    if sys.version_info < (3, 11):
        sys.exit(f"peft_sparse needs Python 3.11 or newer, this is {sys.version.split()[0]}.")
    commands = {"demo": demo, "docs": docs, "test": test}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    set_up({"demo": "examples", "docs": "docs", "test": "dev"}[sys.argv[1]])
    return commands[sys.argv[1]](sys.argv[2:])


def demo(arguments: list[str]) -> int:
    return run("python", "examples/compress.py", *arguments)


def test(arguments: list[str]) -> int:
    # All commands run even if one fails, so that one report shows every failure.
    codes = [
        run("ruff", "format", "--check", "."),
        run("ruff", "check", "."),
        run("mypy"),
        docs([]),
        run("pytest", "-n", "auto", "--maxprocesses", "4", *(arguments or ["-m", "not atlas"])),
    ]
    return max(codes)


def docs(arguments: list[str]) -> int:
    # A broken link or a docstring that cannot be read is an error.
    return run("sphinx-build", "--fail-on-warning", "--keep-going", "--quiet", *arguments, "docs", ".site")


def set_up(extra: str) -> None:
    """Create `.venv` with the tested versions, or add the packages of `extra` to it.

    If `pyproject.toml` or `constraints.txt` has changed since `.venv` was created, it is created again.
    """
    sources = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    wanted, stamp = hashlib.sha256(sources).hexdigest(), ENVIRONMENT / "made-from"
    made_from, _, extras = stamp.read_text().partition(" ") if stamp.exists() else ("", "", "")
    if made_from == wanted and (extra in extras.split() or "dev" in extras.split()):
        return
    print(f"setting up {ENVIRONMENT}", flush=True)
    if made_from != wanted:
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        extras = ""
    # torch is installed first and alone, so that no other requirement installs another build of it.
    pip = [BIN / "python", "-m", "pip", "install", "--quiet", "-c", "constraints.txt"]
    for what in (["torch"], ["-e", f".[{extra}]"]):
        subprocess.run([*map(str, pip), *what], cwd=ROOT, check=True)
    stamp.write_text(f"{wanted} {extras} {extra}")


def run(program: str, *arguments: str) -> int:
    print(f"\n$ {program} {' '.join(arguments)}", flush=True)
    return subprocess.run([str(BIN / program), *arguments], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
