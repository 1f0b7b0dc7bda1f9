"""Prunes a checkpoint on disk block by block, for models larger than memory.

One block's weights are in memory at a time, beside the embeddings and whatever else lies outside the blocks.
"""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
import transformers
from accelerate import PartialState, init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..calibration.activations import Activations, check_activations
from ..calibration.inputs import Calibration, as_inputs, evaluation_mode
from ..calibration.runner import BlockRunner
from ..model.blocks import Targets, block_of, find_blocks, find_stacks
from ..model.weights import check_finite
from .criteria import Criterion, Score
from .patterns import Group
from .prune import prune_blocks, prune_stack
from .report import PruningReport
from .task import PatternLike, PruningTask, check_calibration, count_sequences, plan_pruning


OUTSIDE = "outside"

# Shards without an index beside them are those of a run that did not come to its end.
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_UNFINISHED_INDEX = f"{SAFE_WEIGHTS_INDEX_NAME}.unfinished"


def prune_checkpoint(
    source: str | Path,
    output: str | Path,
    pattern: PatternLike | Mapping[str, PatternLike],
    *,
    criterion: str | Score | Criterion = "magnitude",
    group: Group | None = None,
    refinement: Literal["dsnot", "swap"] | None = None,
    update: bool = False,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    calibration: Calibration | None = None,
    batch_size: int = 1,
    activations: Activations = "cpu",
    device: torch.device | str = "cpu",
) -> PruningReport:
    """Prune the model saved in `source` without loading it whole, and save it to `output` for `from_pretrained`.

    Each block is read from safetensors, pruned as `prune` would, written, and dropped before the next is read. The
    zeros are those of `prune` on the loaded model. Killed midway, `output` holds the finished blocks and no index, so
    that nothing loads it by mistake; `source` is only read.

    Args:
        source: a local folder as `save_pretrained` writes it: config.json and safetensors.
        output: a folder that does not exist yet, is empty, or holds what a killed run left, which is overwritten.
        activations: where hidden states wait between blocks: "cpu", "disk", or "device".
        device: where each block is loaded to.
        everything else: as in `prune`. There is no `allocation`, which reads all weights: give a dict as `pattern`.

    Raises:
        ValueError: as `prune`; an `output` that holds something; a checkpoint whose tensors are named otherwise than
            the model's parameters; more than one stack of blocks; a criterion or group that needs the whole model.
    """
    started = time.perf_counter()
    streamed = StreamedModel(source, output, device)
    model = streamed.model
    task = plan_pruning(
        model,
        pattern,
        criterion,
        group,
        target_modules,
        exclude_modules,
        prune_tied=False,
        refinement=refinement,
        update=update,
        loaded=False,
    )
    check_activations(activations)
    check_calibration(task, calibration)
    streamed.start(task)
    with evaluation_mode(model):
        if calibration is None:
            prune_blocks(task, streamed.blocks, streamed.resident, streamed.save)
        else:
            inputs = as_inputs(model, calibration, batch_size)
            task.sequences = count_sequences(inputs)
            runner = BlockRunner(model, streamed.blocks, inputs, activations=activations, residence=streamed.resident)
            prune_stack(model, runner, task, streamed.save)
    streamed.finish()
    return task.report(time.perf_counter() - started)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model of `config` with parameters on the meta device: names and shapes, no memory.

    Raises:
        ValueError: the configuration does not name a class of transformers.
    """
    names = config.architectures or []
    if len(names) != 1 or not hasattr(transformers, names[0]):
        raise ValueError(
            f"Expected a configuration that names one class of transformers in `architectures`, got {names}. Save the "
            "model with `save_pretrained`, or load it and use `prune`."
        )
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = getattr(transformers, names[0])._from_config(config)
    # Moving to the meta device one by one has parted what was tied.
    model.tie_weights()
    return model


class StreamedModel:
    """A model whose blocks are read from `source` for their turn, and written to `output` when they are finished.

    Args:
        source, output, device: as in `prune_checkpoint`.

    Raises:
        ValueError: an `output` that holds something; a configuration that names no class; no safetensors.
    """

    def __init__(self, source: str | Path, output: str | Path, device: torch.device | str) -> None:
        self.source, self.output, self.device = Path(source), Path(output), device
        if self.output.exists() and not _left_by_a_killed_run(self.output, self.source):
            raise ValueError(
                f"Expected {str(self.output)!r} not to exist, to be empty, or to hold what a killed run left. Give "
                "another `output`."
            )
        self.model = empty_model(AutoConfig.from_pretrained(self.source))
        self.blocks = find_blocks(self.model)
        self.files = _files_by_name(self.source)
        self.parts: dict[str, list[str]] = {name: [] for name in (*self.blocks, OUTSIDE)}
        for name in self.files:
            self.parts[block_of(name, self.blocks) or OUTSIDE].append(name)
        parameters = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        # Where a tensor of a checkpoint may go; the buffers that no checkpoint holds came with the empty model.
        self.places = {*parameters, *(name for name, _ in self.model.named_buffers())}
        self.parameters = set(parameters)
        self.task: PruningTask | None = None
        self.written: dict[str, str] = {}
        self.bytes = 0

    def start(self, task: PruningTask) -> None:
        """Check that `task` can be done block by block, and load what lies outside the blocks.

        Raises:
            ValueError: a checkpoint that lacks a parameter of a block under the model's name; a task that needs the
                whole model; more than one stack of blocks; more than one process.
        """
        _check_streamable(self.model, task)
        if PartialState().num_processes > 1:
            raise ValueError(
                f"Streaming writes one output, got {PartialState().num_processes} processes that would write it. Run "
                "it in one process; what it saves loads in any number."
            )
        missing = [n for n in self.parameters if block_of(n, self.blocks) and n not in self.files]
        if missing:
            raise ValueError(
                f"The checkpoint has no tensor {sorted(missing)[0]!r} ({len(missing)} such parameters): transformers "
                "renames its tensors on loading. Load the model and save it with `save_pretrained(..., "
                "save_original_format=False)`, or use `prune`."
            )
        if outside := task.by_block.get(None):
            raise ValueError(f"{outside[0]!r} lies outside the blocks, where nothing is streamed. Leave it out.")
        self.task = task
        self.output.mkdir(parents=True, exist_ok=True)
        self.load(OUTSIDE)

    @contextlib.contextmanager
    def resident(self, name: str, block: nn.Module) -> Iterator[None]:
        """Hold the weights of a block in memory within the context."""
        assert self.task is not None, "start comes first"
        self.load(name)
        try:
            check_finite(self.task.inside(name))
            yield
        finally:
            for held in self.parts[name]:
                if held in self.places:
                    set_module_tensor_to_device(self.model, held, "meta")

    def read(self, part: str) -> dict[str, Tensor]:
        """Return the tensors of one block, or of everything outside the blocks."""
        tensors: dict[str, Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for name in self.parts[part]:
            by_file.setdefault(self.files[name], []).append(name)
        for path, names in by_file.items():
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in names}
        return tensors

    def load(self, part: str) -> None:
        """Put the tensors of a part into the model; write those that lie outside the blocks."""
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
        """Write a block as it is now; tensors that the model has no place for are left out, as on loading."""
        state = self.blocks[block].state_dict(prefix=f"{block}.")
        self._write(block, {name: state[name].cpu().contiguous() for name in self.parts[block] if name in state})

    def finish(self) -> None:
        """Copy everything that is no weight, and write the index, which makes the output a checkpoint, last."""
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
    """Return the files of a checkpoint that hold no weights and no index of them."""
    files = [path for path in source.iterdir() if path.is_file()]
    return [path for path in files if path.suffix not in (".safetensors", ".bin") and "index.json" not in path.name]


def _left_by_a_killed_run(output: Path, source: Path) -> bool:
    """Tell whether `output` holds nothing but what a run on `source` writes before its index."""
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
            'Streaming holds one block at a time: `group="model"` and criteria that need gradients see the whole '
            'model. Use `prune` on a loaded model, or `group="row"` or "matrix" and another criterion.'
        )
    if len(find_stacks(model)) > 1:
        stacks = ", ".join(next(iter(stack)).rpartition(".")[0] for stack in find_stacks(model))
        raise ValueError(f"Streaming takes one stack of blocks, this model has more: {stacks}. Use `prune`.")
