"""Packs a checkpoint on disk, and unpacks it. One tensor is read at a time, in pieces."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.modeling_utils import get_state_dict_dtype, load_state_dict
from transformers.utils import CONFIG_NAME

from ..pruning.checkpoint_files import files_beside
from .card import write_card
from .card_reports import done_in
from .codec import CODEC, VERSION
from .folders import finished_folder, local_folder, read_config, weight_names
from .packed_file import MARK, pack_file, unpack_file
from .packed_weight import PackedError
from .tensor_files import TensorFile


# What config.json names as the method of quantisation.
METHOD = MARK
# Stands where the name of the file with the weights may stand. Transformers shows it in a ValueError, unless the
# import has told it how to read the weights.
IMPORT_FIRST = (
    "packed by peft_sparse. Run `import peft_sparse` before `from_pretrained` (pip install peft_sparse), or write a "
    "plain model with `peft-sparse unpack`"
)


@dataclass(frozen=True)
class PackingReport:
    """What packing or unpacking wrote.

    Args:
        target: the folder that was written.
        plain_bytes: size of the safetensors files when they are not packed.
        packed_bytes: size of the same files when they are packed.
    """

    target: str
    plain_bytes: int
    packed_bytes: int

    @property
    def fraction(self) -> float:
        """The packed size as a fraction of the plain size."""
        return self.packed_bytes / self.plain_bytes

    def __str__(self) -> str:
        return (
            f"{self.target}: {self.packed_bytes / 1e6:,.1f} MB packed, {self.plain_bytes / 1e6:,.1f} MB plain "
            f"({self.fraction:.2f})"
        )


def pack_checkpoint(source: str | Path, target: str | Path, *, report: Any = None) -> PackingReport:
    """Write a saved model in fewer bytes. Nothing is lost: loading and unpacking give the same bits.

    Zeros take at most one bit each, and of the kept entries the bytes with the exponents are deflated. A model in
    bfloat16 with half of its weights zero shrinks to about 0.36 of these weights' size, and dense weights to about
    0.67. The result loads with `from_pretrained` after `import peft_sparse`, as a plain model that takes the same
    memory as before. Without the import Transformers refuses it. `unpack_checkpoint` is the way back.

    Each weight is unpacked again and compared before it is written. `target` appears when it is complete. The files
    that are known to belong to a model are copied, as `prune_checkpoint` does, and a warning names the others. The
    model card tells how the packed model is loaded, and both sizes.

    Args:
        source: a folder that `save_pretrained` wrote, or the id of a repository on the Hub.
        target: a folder that does not exist or is empty.
        report: what `write_card` takes as its report. None takes the `report.json` beside `source`, if it is that of
            the run that saved these weights.

    Returns:
        The sizes before and after.

    Raises:
        TypeError, ValueError: `source` is no folder, holds no config.json or no safetensors, an adapter, a quantised
            or a packed model; a file is damaged; `target` holds files; `report` is no report.
    """
    if report is not None:
        done_in(report)  # refuses what is no report, before any work
    folder = local_folder(source)
    config = read_config(folder)
    files = weight_names(folder, config.get("transformers_weights"))
    _check_packable(folder, config, files)
    with finished_folder(target) as scratch:
        digests = _each_tensor_file(folder, scratch, files, pack_file)
        _write_config(scratch, _marked(config, folder, files))
        _copy_others(folder, scratch, files)
        plain, packed = _bytes(folder, files), _bytes(scratch, files)
    known = report if report is not None else _report_beside(folder, digests)
    write_card(target, report=known, sizes={"plain": plain})
    return PackingReport(str(target), plain, packed)


def unpack_checkpoint(source: str | Path, target: str | Path, *, report: Any = None) -> PackingReport:
    """Write the plain checkpoint that was packed, for programs that do not know packed ones.

    Its safetensors files are those that `pack_checkpoint` was given, byte for byte, which is checked by SHA-256.
    `target` appears when it is complete.

    Args:
        source: a folder that `pack_checkpoint` wrote, or the id of such a repository on the Hub.
        target: a folder that does not exist or is empty.
        report: what `write_card` takes as its report. None leaves what was done to the model out of the card.

    Returns:
        The sizes before and after.

    Raises:
        TypeError, ValueError: `source` is no folder, or is not packed; a file is damaged; `target` holds files;
            `report` is no report.
    """
    if report is not None:
        done_in(report)  # refuses what is no report, before any work
    folder = local_folder(source)
    config = read_config(folder)
    if not is_packed(config):
        raise ValueError(
            f"Expected a checkpoint that `pack_checkpoint` wrote, but config.json in {str(folder)!r} does not say "
            f"quant_method {METHOD!r}. It needs no unpacking."
        )
    expected = config["quantization_config"].get("tensors")
    config = unmarked(config)
    files = weight_names(folder, config.get("transformers_weights"))
    check_count(_count(_tensor_files(folder, files)), expected)
    with finished_folder(target) as scratch:
        _each_tensor_file(folder, scratch, files, unpack_file)
        _write_config(scratch, config)
        _copy_others(folder, scratch, files)
        plain, packed = _bytes(scratch, files), _bytes(folder, files)
    write_card(target, report=report)
    return PackingReport(str(target), plain, packed)


def _report_beside(folder: Path, digests: dict[str, str]) -> Path | None:
    """Return the report of the run that saved files with these SHA-256 in `folder`, if it is in the folder above."""
    path = folder.absolute().parent / "report.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8")).get("saved", [])
    except (OSError, ValueError, AttributeError):
        return None
    return path if any(each.get("sha256") == digests for each in saved) else None


def is_packed(config: dict[str, Any]) -> bool:
    """Return whether the configuration of a checkpoint says that it is packed."""
    return (config.get("quantization_config") or {}).get("quant_method") == METHOD


def check_count(found: int, expected: int | None) -> None:
    """Check that the files of a packed checkpoint hold all of its tensors.

    Raises:
        PackedError: they do not.
    """
    if found != expected:
        raise PackedError(
            f"Expected {expected} tensors in the files of the packed checkpoint, found {found}. Copy or download all "
            "of its files again."
        )


def unmarked(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the plain checkpoint, of that of a packed one."""
    replaced = {"transformers_weights": None} | config["quantization_config"].get("replaced", {})
    plain = {key: value for key, value in config.items() if key != "quantization_config" and key not in replaced}
    return plain | {key: value for key, value in replaced.items() if value is not None}


def _check_packable(folder: Path, config: dict[str, Any], files: list[str]) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{str(folder)!r} holds an adapter, which is small already. Merge it into its base model, save the "
            "result, and pack that."
        )
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise ValueError(
            f"{str(folder)!r} is {'packed already' if method == METHOD else f'quantised by {method}'}. Pack a "
            "checkpoint with plain weights."
        )
    if not config or not files:
        raise ValueError(
            f"Expected config.json and safetensors in {str(folder)!r}. Load the model, and save it with "
            "`save_pretrained`."
        )


def _marked(config: dict[str, Any], folder: Path, files: list[str]) -> dict[str, Any]:
    """Return the configuration of the packed checkpoint, with what it takes to make the given one of it again."""
    replaced = {"transformers_weights": config.get("transformers_weights")}
    paths = _tensor_files(folder, files)
    if not {"dtype", "torch_dtype"} & config.keys():
        # Where the configuration has none, Transformers takes that of the first tensor, which is packed now.
        replaced["dtype"] = None
        found = get_state_dict_dtype(load_state_dict(str(paths[0]), map_location="meta"))
        config = config | {"dtype": str(found).removeprefix("torch.")}
    method = {"quant_method": METHOD, "codec": CODEC, "version": VERSION, "tensors": _count(paths)}
    return config | {"quantization_config": method | {"replaced": replaced}, "transformers_weights": IMPORT_FIRST}


def _count(paths: list[Path]) -> int:
    count = 0
    for path in paths:
        with TensorFile(path) as file:
            count += len(file.entries)
    return count


def _tensor_files(folder: Path, files: list[str]) -> list[Path]:
    return [folder / name for name in files if not name.endswith(".json")]


def _each_tensor_file(
    folder: Path, target: Path, files: list[str], step: Callable[[Path, Path, Callable[[int], object]], Any]
) -> dict[str, Any]:
    """Call `step` for each file with tensors, and return what it returned, by the name of the file.

    `step` takes the source, the target, and a function that is told how many bytes were read.
    """
    paths = _tensor_files(folder, files)
    total = sum(path.stat().st_size for path in paths)
    returned = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc=step.__name__.partition("_")[0]) as progress:
        for path in paths:
            place = target / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            returned[path.name] = step(path, place, progress.update)
    return returned


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    # As Transformers writes it, so that unpacking restores its file.
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def _copy_others(folder: Path, target: Path, files: list[str]) -> None:
    known, others = files_beside(folder)
    copied = {*known, *(name for name in files if name.endswith(".json"))} - {CONFIG_NAME}
    for name in sorted(copied):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)
    if left := [name for name in others if name not in files]:
        warnings.warn(f"These files are not known to belong to a model, and were not copied: {left}", stacklevel=3)


def _bytes(folder: Path, files: list[str]) -> int:
    return sum(path.stat().st_size for path in _tensor_files(folder, files))
