"""Prunes a checkpoint on disk block by block, for models that are larger than memory.

The weights of one block are in memory at a time, and the weights outside of the blocks all the time.
"""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
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

from ..calibration.activations import Activations, check_activations
from ..calibration.inputs import Calibration, as_inputs, evaluation_mode
from ..calibration.runner import BlockRunner
from ..model.blocks import Targets, block_of, find_blocks, find_stacks
from ..model.weights import check_finite
from .all_weights import allocated_patterns
from .allocation import Allocation
from .criteria import CriterionLike
from .least_squares import LeastSquares
from .patterns import Group
from .prune import prune_blocks, prune_stack
from .refinement import Refinement
from .report import PruningReport
from .task import PatternLike, PruningTask, check_calibration, count_sequences


OUTSIDE = "outside"

# Shards without an index belong to a run that did not finish.
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_UNFINISHED_INDEX = f"{SAFE_WEIGHTS_INDEX_NAME}.unfinished"


def prune_checkpoint(
    source: str | Path,
    output: str | Path,
    pattern: PatternLike | Mapping[str, PatternLike] | None = None,
    calibration: Calibration | None = None,
    *,
    sparsity: float | None = None,
    criterion: CriterionLike = "magnitude",
    group: Group | None = None,
    allocation: str | Allocation | Mapping[str, float] | None = None,
    refinement: str | Refinement | None = None,
    update: bool | LeastSquares = False,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    prune_tied: bool = False,
    batch_size: int = 1,
    activations: Activations = "cpu",
    device: torch.device | str = "cpu",
) -> PruningReport:
    """Prune a saved model without loading it as a whole, and save the result for `from_pretrained`.

    One block at a time is read from safetensors, pruned as `prune` does it, written and dropped. The zeros are the
    same as those that `prune` writes into the loaded model. `source` is only read. If the run is killed, `output`
    holds the finished blocks but no index, so no loader takes it for a complete checkpoint.

    Args:
        source: a local folder as `save_pretrained` writes it, with config.json and safetensors.
        output: a folder that does not exist, is empty, or holds what a killed run left. Such remains are overwritten.
        pattern: a sparsity in [0, 1); or "n:m", which keeps n of every m entries along the inputs; or an
            `Unstructured` or `SemiStructured`. A dict gives one of these per layer: its keys are names, name endings
            or regular expressions for the whole name, the first key that matches counts, and a layer that no key
            matches is not pruned.
        calibration: token ids (sequences, tokens), or an iterable of model inputs. Tokens that an input's
            `attention_mask` marks as padding are not counted. A criterion that needs no calibration uses it to report
            output errors.
        sparsity: another way to write a `pattern` that is a number.
        criterion: "magnitude", "random", "wanda", "ria", "sparsegpt" or "gblm"; or one of these as a value with its
            numbers, such as `SparseGPT(damping=0.1)`; or a function (weight (out, in), `Statistics`) -> scores
            (out, in), higher = kept; or a `Criterion`, which also says what the function needs.
        group: which entries are compared with each other: "row" (one output), "matrix" or "model". By default the
            group of the criterion's paper. n:m compares within each m entries and SparseGPT within blocks of columns,
            so these take no group. "model" is refused, because it needs the whole model.
        allocation: how the sparsity is divided among the layers: "uniform", "uniform+", "global", "erk", "lamp" or
            "owl"; or one of these as a value, such as `OWL(spread=0.1)`; or a dict of sparsities, with keys as in
            `pattern`, that together give the requested total. The total is exact to the entry. n:m works with "owl",
            which mixes several n.
        refinement: "dsnot" or "swap", or a value such as `Swap(max_swaps=100)`: exchange pruned entries for kept ones
            after the criterion has selected.
        update: True, or a `LeastSquares` with its numbers: set the kept weights to the solution of a regularised
            least-squares problem, see `masked_least_squares`.
        target_modules: which layers are pruned: a list of names or name endings, or a regular expression for the whole
            name, as in PEFT. By default every linear layer and every fused expert inside the blocks.
        exclude_modules: which layers are not pruned, in the same form.
        prune_tied: allow a target whose weight is also an embedding. The embedding is then pruned with it.
        batch_size: how many sequences of a tensor of token ids run together.
        activations: where the hidden states of the calibration data wait between blocks: "device", "cpu" or "disk".
        device: where each block is loaded.

    Returns:
        A report with the sparsity and, with calibration, the relative output error of each weight.

    Raises:
        TypeError: `update` is neither a bool nor a `LeastSquares`, or a convolution's inputs cannot be measured.
        ValueError: an argument is invalid, or does not go with another one; a target is tied to an embedding, or lies
            outside the blocks; n:m does not divide the inputs; calibration is missing, or never reaches the block of a
            target; a weight, a statistic or a score is not finite; `source` holds no safetensors, or its tensors do
            not have the names of the model's parameters; its configuration names no class of transformers; `output`
            holds other files; the model has more than one stack of blocks; the criterion or `group` needs the whole
            model; several processes run. If an error occurs after some blocks were pruned, its note names the block.
    """
    started = time.perf_counter()
    streamed = StreamedModel(source, output, device)
    model = streamed.model
    task = PruningTask.of(
        model,
        pattern,
        sparsity=sparsity,
        criterion=criterion,
        group=group,
        allocation=allocation,
        refinement=refinement,
        update=update,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        prune_tied=prune_tied,
        loaded=False,
    )
    check_activations(activations)
    check_calibration(task, calibration)
    inputs = None if calibration is None else as_inputs(model, calibration, batch_size)
    task.sequences = count_sequences(inputs or [])
    streamed.start(task)
    with evaluation_mode(model):
        if task.allocation is not None:
            task.patterns = allocated_patterns(
                model, task, inputs, activations, streamed.resident, streamed.weight_in_memory
            )
        if inputs is None:
            prune_blocks(task, streamed.blocks, streamed.resident, streamed.save)
        else:
            runner = BlockRunner(model, streamed.blocks, inputs, activations=activations, residence=streamed.resident)
            prune_stack(model, runner, task, streamed.save)
    streamed.finish()
    return task.report(time.perf_counter() - started)


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
