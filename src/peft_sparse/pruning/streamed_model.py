"""A model on disk whose blocks are in memory one at a time."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from accelerate import PartialState, init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..model.blocks import block_of, find_blocks, find_stacks
from ..model.weights import check_finite
from .task import PruningTask


OUTSIDE = "outside"

# Shards without an index belong to a run that did not finish.
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_UNFINISHED_INDEX = f"{SAFE_WEIGHTS_INDEX_NAME}.unfinished"


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model of `config` with parameters on the meta device, which have shapes and take no memory.

    Raises:
        ValueError: the configuration does not name exactly one class of transformers.
    """
    names = config.architectures or []
    if len(names) != 1 or not hasattr(transformers, names[0]):
        raise ValueError(
            f"Expected a configuration that names one class of transformers in `architectures`, got {names}. Save the "
            "model with `save_pretrained`, or load it and use `prune`."
        )
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = getattr(transformers, names[0])._from_config(config)
    # Parameters were moved to the meta device one by one, which untied them.
    model.tie_weights()
    return model


class StreamedModel:
    """A model whose blocks are read from a folder when they are processed, and written when they are finished.

    Args:
        source: the folder to read from.
        output: the folder to write to.
        device: where each block is loaded.

    Raises:
        ValueError: `output` holds other files, the configuration names no class of transformers, or `source` holds no
            safetensors.
    """

    def __init__(self, source: str | Path, output: str | Path, device: torch.device | str) -> None:
        self.source, self.output, self.device = Path(source), Path(output), device
        if self.output.exists() and not _left_by_a_killed_run(self.output, self.source):
            raise ValueError(
                f"Expected {str(self.output)!r} not to exist, to be empty, or to hold only what a killed run left. "
                "Give another `output`."
            )
        self.model = empty_model(AutoConfig.from_pretrained(self.source))
        self.blocks = find_blocks(self.model)
        self.files = _files_by_name(self.source)
        self.parts: dict[str, list[str]] = {name: [] for name in (*self.blocks, OUTSIDE)}
        for name in self.files:
            self.parts[block_of(name, self.blocks) or OUTSIDE].append(name)
        parameters = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        # The names that a tensor of a checkpoint may have. Buffers that no checkpoint holds are in the empty model.
        self.places = {*parameters, *(name for name, _ in self.model.named_buffers())}
        self.parameters = set(parameters)
        self.task: PruningTask | None = None
        # The parameter that `weight_in_memory` holds.
        self.held: str | None = None
        self.written: dict[str, str] = {}
        self.bytes = 0

    def start(self, task: PruningTask) -> None:
        """Check that `task` can be done block by block, and load the weights outside of the blocks.

        Raises:
            ValueError: the checkpoint has no tensor with the name of a block's parameter; the task needs the whole
                model; the model has more than one stack of blocks; several processes run.
        """
        _check_streamable(self.model, task)
        if PartialState().num_processes > 1:
            raise ValueError(
                f"Expected one process, because one output is written, got {PartialState().num_processes}. Start it "
                "in one process. The saved model can be loaded in any number of processes."
            )
        missing = [n for n in self.parameters if block_of(n, self.blocks) and n not in self.files]
        if missing:
            raise ValueError(
                f"The checkpoint has no tensor {sorted(missing)[0]!r} ({len(missing)} such parameters): transformers "
                "renames its tensors on loading. Load the model and save it with `save_pretrained(..., "
                "save_original_format=False)`, or use `prune`."
            )
        if outside := task.by_block.get(None):
            raise ValueError(
                f"{outside[0]!r} lies outside the blocks, which are all that is pruned on disk. Add it to "
                "`exclude_modules`, or use `prune` on the loaded model."
            )
        self.task = task
        self.output.mkdir(parents=True, exist_ok=True)
        self.load(OUTSIDE)

    @contextlib.contextmanager
    def resident(self, name: str, block: nn.Module) -> Iterator[None]:
        """Hold the weights of a block in memory within the context."""
        assert self.task is not None, "start comes first"
        self._drop_held()
        self.load(name)
        try:
            check_finite(self.task.inside(name))
            yield
        finally:
            for held in self.parts[name]:
                if held in self.places:
                    set_module_tensor_to_device(self.model, held, "meta")

    @contextlib.contextmanager
    def weight_in_memory(self, name: str) -> Iterator[None]:
        """Hold one weight of the task in memory within the context. A parameter is read once for all its experts."""
        assert self.task is not None, "start comes first"
        weight = self.task.weights[name]
        parameter = f"{name}.{weight.parameter}" if weight.expert is None else name.rpartition(".")[0]
        if self.held != parameter:
            self._drop_held()
            with safe_open(self.files[parameter], framework="pt") as file:
                value = file.get_tensor(parameter)
            set_module_tensor_to_device(self.model, parameter, self.device, value=value, dtype=value.dtype)
            self.held = parameter
            check_finite({name: weight})
        try:
            yield
        finally:
            # The next weight is often an expert of the same parameter.
            if weight.expert is None:
                self._drop_held()

    def _drop_held(self) -> None:
        if self.held is not None:
            set_module_tensor_to_device(self.model, self.held, "meta")
            self.held = None

    def read(self, part: str) -> dict[str, Tensor]:
        """Return the tensors of one block, or those outside of all blocks."""
        tensors: dict[str, Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for name in self.parts[part]:
            by_file.setdefault(self.files[name], []).append(name)
        for path, names in by_file.items():
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in names}
        return tensors

    def load(self, part: str) -> None:
        """Put the tensors of a part into the model. Those outside of the blocks are also written."""
        outside = part == OUTSIDE
        device = "cpu" if outside else self.device
        tensors = self.read(part)
        for name, tensor in tensors.items():
            if name in self.places:
                set_module_tensor_to_device(self.model, name, device, value=tensor, dtype=tensor.dtype)
        if outside:
            self._write(OUTSIDE, tensors)
            return
        for name, _ in self.blocks[part].named_buffers(prefix=part):
            set_module_tensor_to_device(self.model, name, device)

    def save(self, block: str) -> None:
        """Write a block as it is now. Tensors of the checkpoint that the model does not have are left out."""
        state = self.blocks[block].state_dict(prefix=f"{block}.")
        self._write(block, {name: state[name].cpu().contiguous() for name in self.parts[block] if name in state})

    def finish(self) -> None:
        """Copy the other files of the checkpoint. Write the index last, because it makes the output a checkpoint."""
        for path in _beside_weights(self.source):
            shutil.copy2(path, self.output)
        index = {"metadata": {"total_size": self.bytes}, "weight_map": self.written}
        unfinished = self.output / _UNFINISHED_INDEX
        unfinished.write_text(json.dumps(index, indent=2) + "\n")
        unfinished.replace(self.output / SAFE_WEIGHTS_INDEX_NAME)

    def _write(self, part: str, tensors: dict[str, Tensor]) -> None:
        number = list(self.parts).index(part) + 1
        name = f"model-{number:05d}-of-{len(self.parts):05d}.safetensors"
        save_file(tensors, self.output / name, metadata={"format": "pt"})
        self.written |= dict.fromkeys(tensors, name)
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())


def _beside_weights(source: Path) -> list[Path]:
    """Return the files of a checkpoint that hold neither weights nor an index of them."""
    files = [path for path in source.iterdir() if path.is_file()]
    return [path for path in files if path.suffix not in (".safetensors", ".bin") and "index.json" not in path.name]


def _left_by_a_killed_run(output: Path, source: Path) -> bool:
    """Return whether `output` holds only what a run on `source` writes before its index."""
    names = {path.name for path in output.iterdir()}
    shards = {name for name in names if _SHARD.fullmatch(name)}
    copied = {path.name for path in _beside_weights(source)} | {_UNFINISHED_INDEX} if shards else set()
    return names <= shards | copied


def _files_by_name(source: Path) -> dict[str, Path]:
    index = source / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        return {name: source / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    if not (source / SAFE_WEIGHTS_NAME).exists():
        raise ValueError(
            f"Expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME} in {str(source)!r}, found neither. Give a "
            "folder that `save_pretrained` wrote."
        )
    with safe_open(source / SAFE_WEIGHTS_NAME, framework="pt") as file:
        return dict.fromkeys(file.keys(), source / SAFE_WEIGHTS_NAME)


def _check_streamable(model: nn.Module, task: PruningTask) -> None:
    if task.group == "model" or "gradients" in task.needs:
        raise ValueError(
            'One block at a time is in memory, but `group="model"` and criteria that need gradients need the whole '
            'model. Use `prune` on the loaded model, or `group="row"` or "matrix" and another criterion.'
        )
    if len(find_stacks(model)) > 1:
        stacks = ", ".join(next(iter(stack)).rpartition(".")[0] for stack in find_stacks(model))
        raise ValueError(
            f"Expected a model with one stack of blocks, got several: {stacks}. Use `prune` on the loaded model."
        )
