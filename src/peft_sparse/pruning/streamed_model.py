"""A model on disk whose blocks are in memory one at a time."""

import contextlib
import json
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import PartialState
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..model.blocks import block_of, find_blocks
from ..model.empty import dtype_of, model_classes
from ..model.environment import check_device
from ..model.weights import check_finite
from .checkpoint_files import described, files_beside, weight_files
from .checkpoint_layout import Step, loading_plan, saving_plan
from .checkpoint_model import aliases_of, check_round_trip, dtypes_of, fitting_model
from .task import PruningTask


OUTSIDE = "outside"

# Shards without an index belong to a run that did not finish.
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_UNFINISHED_INDEX = f"{SAFE_WEIGHTS_INDEX_NAME}.unfinished"


class StreamedModel:
    """A model whose blocks are read from a folder when they are processed, and written when they are finished.

    Tensors are converted as `from_pretrained` and `save_pretrained` convert them, so the names in the checkpoint may
    be others than those in the model.

    Args:
        source: the folder to read from.
        output: the folder to write to.
        device: where each block is loaded.
        trust_remote_code: whether Python code in `source` may define the model.

    Raises:
        TypeError: `source` or `output` is no path.
        OSError: nothing can be written to `output`.
        ValueError: there is no such device; `source` is no folder with a model, or holds no safetensors; `output` is a
            file or holds other files; no class of the configuration fits the checkpoint; the checkpoint lacks a
            tensor of the model, or holds it in another shape or quantised.
    """

    def __init__(
        self,
        source: str | Path,
        output: str | Path,
        device: torch.device | str,
        trust_remote_code: bool = False,
    ) -> None:
        for name, path in {"source": source, "output": output}.items():
            if not isinstance(path, (str, Path)):
                raise TypeError(f"Expected `{name}` as the path of a folder, got {type(path).__name__}.")
        check_device(device)
        self.source, self.output, self.device = Path(source), Path(output), device
        if not (self.source / CONFIG_NAME).is_file():
            raise ValueError(
                f"Expected a folder with {CONFIG_NAME} and safetensors, as `save_pretrained` writes it, at "
                f"{str(source)!r}. Download a model of the Hub by `huggingface_hub.snapshot_download` first."
            )
        _check_output(self.output, self.source)
        config = AutoConfig.from_pretrained(self.source, trust_remote_code=trust_remote_code)
        self.read_files = weight_files(self.source, config)
        tensors, self.files = described(self.read_files)
        config.dtype = dtype_of(config, tensors)
        classes = model_classes(config, self.source, trust_remote_code)
        self.model, self.plan = fitting_model(config, classes, tensors)
        self.dtypes = dtypes_of(self.model, config.dtype)
        self.blocks = find_blocks(self.model)
        self.aliases = aliases_of(self.model, self.blocks)
        self.steps = self._by_part(self.plan.steps, of_results=True)
        self.task: PruningTask | None = None
        # How finished blocks are written, and how they are read again.
        self.savings: dict[str, list[Step]] = {}
        self.again: dict[str, list[Step]] = {}
        # Blocks that are in memory, with the number of contexts that need them; blocks whose weights were checked.
        self.entered: Counter[str] = Counter()
        self.checked: set[str] = set()
        # The parameters that `weight_in_memory` holds.
        self.held: list[str] = []
        self.finished: set[str] = set()
        self.written: dict[str, str] = {}
        self.bytes = 0

    def start(self, task: PruningTask) -> None:
        """Check that `task` can be done block by block, and load the weights outside the blocks. Nothing is written.

        Raises:
            ValueError: the task needs the whole model, or prunes outside the blocks; several processes run; what
                would be written cannot be read again.
        """
        _check_streamable(task)
        if PartialState().num_processes > 1:
            raise ValueError(
                f"Expected one process, because one output is written, got {PartialState().num_processes}. Start it "
                "in one process. The saved model can be loaded in any number of processes."
            )
        if outside := task.by_block.get(None):
            raise ValueError(
                f"{outside[0]!r} lies outside the blocks, which are all that is pruned on disk. Add it to "
                "`exclude_modules`, or use `prune` on the loaded model."
            )
        self.task = task
        self._load_outside()
        saved = saving_plan(self.model, self.plan.transforms)
        loaded = loading_plan(self.model, saved.results)
        check_round_trip(self.model, saved, loaded)
        self.savings = self._by_part(saved.steps, of_results=False)
        self.again = self._by_part(loaded.steps, of_results=True)

    @contextlib.contextmanager
    def resident(self, name: str, block: nn.Module) -> Iterator[None]:
        """Keep the weights of a block in memory within the context.

        The weights of a block that is finished are read from the files that were written.
        """
        assert self.task is not None, "start comes first"
        self._drop_held()
        self.entered[name] += 1
        try:
            if self.entered[name] == 1:
                self.load(name)
                if name not in self.checked:
                    check_finite(self.task.inside(name))
                    self.checked.add(name)
            yield
        finally:
            self.entered[name] -= 1
            if not self.entered[name]:
                self._drop([held for step in self.steps[name] for held in step.outputs])

    @contextlib.contextmanager
    def weight_in_memory(self, name: str) -> Iterator[None]:
        """Hold one weight of the task in memory within the context.

        What is converted together is read together: a parameter is read once for all its experts.
        """
        assert self.task is not None, "start comes first"
        weight = self.task.weights[name]
        parameter = f"{name}.{weight.parameter}" if weight.expert is None else name.rpartition(".")[0]
        part = block_of(parameter, self.blocks) or OUTSIDE
        if self.entered[part]:
            yield
            return
        if parameter not in self.held:
            self._drop_held()
            alike = [name for name in self.aliases.get(parameter, [parameter]) if name in self.plan.results]
            steps = [step for step in self.steps[part] if alike[0] in step.outputs]
            tensors = self._read(steps, self.files)
            self.held = list(self._place(tensors, self.device))
            check_finite({name: weight})
        yield

    def _drop_held(self) -> None:
        self._drop(self.held)
        self.held = []

    def read(self, part: str) -> dict[str, Tensor]:
        """Return the tensors of one block, or those outside of all blocks, by their names in the model."""
        if part in self.finished:
            return self._read(self.again[part], {name: self.output / file for name, file in self.written.items()})
        return self._read(self.steps[part], self.files)

    def load(self, part: str) -> None:
        """Put the tensors of a block into the model."""
        self._place(self.read(part), self.device)
        for name, _ in self.blocks[part].named_buffers(prefix=part):
            set_module_tensor_to_device(self.model, name, self.device)

    def save(self, block: str) -> None:
        """Write a block as it is now. The first time, write what lies outside the blocks, too."""
        if OUTSIDE not in self.finished:
            self.output.mkdir(parents=True, exist_ok=True)
            self._write(OUTSIDE, self.model.state_dict())
        self._write(block, self.blocks[block].state_dict(prefix=f"{block}."))

    def finish(self) -> None:
        """Write the blocks that were not pruned, and copy the other files of the checkpoint.

        The index is written last, because it makes the output a checkpoint. A warning names what was left out.
        """
        for name, block in self.blocks.items():
            if name not in self.finished:
                with self.resident(name, block):
                    self.save(name)
        known, unknown = files_beside(self.source)
        unknown = [name for name in unknown if self.output.resolve() not in (self.source / name).resolve().parents]
        for name in known:
            (self.output / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.source / name, self.output / name)
        index = {"metadata": {"total_size": self.bytes}, "weight_map": self.written}
        unfinished = self.output / _UNFINISHED_INDEX
        unfinished.write_text(json.dumps(index, indent=2) + "\n")
        unfinished.replace(self.output / SAFE_WEIGHTS_INDEX_NAME)
        read = {path.relative_to(self.source).as_posix() for path in self.read_files}
        _warn_of_what_was_left_out(self.model, self.plan.left_out, [name for name in unknown if name not in read])

    def _load_outside(self) -> None:
        """Load the tensors outside of the blocks, and tie and initialise what `from_pretrained` does."""
        present = self.plan.results
        missing = {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - present.keys()
        for name in sorted(missing):
            if not any(alias in present for alias in self.aliases.get(name, ())):
                self._initialise(name)
        for name, tensor in self.read(OUTSIDE).items():
            set_module_tensor_to_device(self.model, name, "cpu", value=tensor, dtype=tensor.dtype)
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)

    @torch.no_grad()
    def _initialise(self, name: str) -> None:
        """Compute a parameter that no checkpoint of the model holds, such as sinusoidal positions."""
        module = self.model.get_submodule(name.rpartition(".")[0])
        set_module_tensor_to_device(
            self.model, name, "cpu", value=torch.empty_like(_at(self.model, name), device="cpu")
        )
        self.model._init_weights(module)

    def _by_part(self, steps: list[Step], of_results: bool) -> dict[str, list[Step]]:
        """Return the steps of each block and those outside, by the tensors of the model that they give or take."""
        parts: dict[str, list[Step]] = {name: [] for name in (*self.blocks, OUTSIDE)}
        for step in steps:
            names = step.outputs if of_results else step.inputs
            found = list(dict.fromkeys(block_of(name, self.blocks) or OUTSIDE for name in names))
            if len(found) > 1:
                raise ValueError(
                    f"{next(iter(step.inputs))!r} is converted together with tensors of {found[0]!r} and of "
                    f"{found[1]!r}, and one block at a time is in memory. Use `prune` on the loaded model."
                )
            parts[found[0]].append(step)
        return parts

    def _read(self, steps: list[Step], files: Mapping[str, Path]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        with contextlib.ExitStack() as opened:
            handles = {
                path: opened.enter_context(safe_open(path, framework="pt"))
                for path in dict.fromkeys(files[name] for step in steps for name in step.inputs)
            }
            for step in steps:
                tensors |= step.run(self.model, lambda name: handles[files[name]].get_tensor(name))
        return {name: tensor.to(self.dtypes[name]) for name, tensor in tensors.items()}

    def _place(self, tensors: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
        """Put tensors into the model, also under the other names that they have in the same block."""
        for name, tensor in tensors.items():
            set_module_tensor_to_device(self.model, name, device, value=tensor, dtype=tensor.dtype)
            for alias in self.aliases.get(name, ()):
                if alias not in tensors:
                    setattr(self.model.get_submodule(alias.rpartition(".")[0]), alias.rpartition(".")[2],
                            _at(self.model, name))  # fmt: skip
        return tensors

    def _drop(self, names: list[str]) -> None:
        for held in dict.fromkeys(alias for name in names for alias in self.aliases.get(name, [name])):
            set_module_tensor_to_device(self.model, held, "meta")

    def _write(self, part: str, state: Mapping[str, Tensor]) -> None:
        number = list(self.savings).index(part) + 1
        file = f"model-{number:05d}-of-{len(self.savings):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for step in self.savings[part]:
            tensors |= step.run(self.model, lambda name: state[name].cpu())
        save_file({n: t.contiguous() for n, t in tensors.items()}, self.output / file, metadata={"format": "pt"})
        self.written |= dict.fromkeys(tensors, file)
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        self.finished.add(part)


def _at(model: nn.Module, name: str) -> Tensor:
    found: Tensor = getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
    return found


def _warn_of_what_was_left_out(model: PreTrainedModel, tensors: list[str], files: list[str]) -> None:
    """Warn of tensors that the model does not have, and of files that are not known to belong to it."""
    more = f" and {len(tensors) - 5} more" if len(tensors) > 5 else ""
    parts = [f"tensors that {type(model).__name__} does not have: {', '.join(tensors[:5])}{more}"] if tensors else []
    parts += [f"files that may hold dense weights or belong to no model: {', '.join(files)}"] if files else []
    if parts:
        warnings.warn(f"Not copied: {'; '.join(parts)}. Copy what the pruned model needs.", stacklevel=3)


def _check_output(output: Path, source: Path) -> None:
    """Check that a checkpoint can be written to `output`, before anything is computed. Nothing is left there."""
    if output.is_symlink() and not output.exists():
        raise ValueError(
            f"Expected `output` to be a folder or new, got the link {str(output)!r} to what is not there."
        )
    if output.exists() and not output.is_dir():
        raise ValueError(f"Expected `output` to be a folder or new, got the file {str(output)!r}.")
    if output.exists() and not _left_by_a_killed_run(output, source):
        raise ValueError(
            f"Expected {str(output)!r} not to exist, to be empty, or to hold only what a killed run left. "
            "Give another `output`."
        )
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    try:
        with TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise type(error)(f"Nothing can be written to {str(there)!r}. Give another `output`. {error}") from error


def _left_by_a_killed_run(output: Path, source: Path) -> bool:
    """Return whether `output` holds only what a run on `source` writes before its index."""
    names = {path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir()}
    shards = {name for name in names if _SHARD.fullmatch(name)}
    copied = {*files_beside(source)[0], _UNFINISHED_INDEX} if shards else set()
    return names <= shards | copied


def _check_streamable(task: PruningTask) -> None:
    if task.group == "model" or "gradients" in task.needs:
        raise ValueError(
            'One block at a time is in memory, but `group="model"` and criteria that need gradients need the whole '
            'model. Use `prune` on the loaded model, or `group="row"` or "matrix" and another criterion.'
        )
