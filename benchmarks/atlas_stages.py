"""The stages of the atlas: what is tried with one model, and how its outcome is called.

An outcome is "works", "refused: ..." (the package said no, with nothing changed), "wrong: ..." (a result that is not
right, or a change after a refusal), "error: ..." (anything else that was raised) or "skipped: ...".
"""

import ast
import copy
import inspect
import re
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peft_sparse
from atlas_inputs import Batch, leaves, run
from atlas_reference import Reference
from atlas_state import State, digest_of, disturb, weights_of
from peft_sparse import Fit, compact, prune, prune_checkpoint, prune_structured, reconstruct
from peft_sparse.model.blocks import prunable_weights


PACKAGE = Path(inspect.getfile(peft_sparse)).parent
SECONDS = 60
# How often the advice of refusals is followed, and how long an outcome is.
TRIES, LENGTH = 4, 500
STAGES = ("prune", "2:4", "submodule", "block", "structured", "checkpoint")


class OutOfTime(BaseException):
    """A stage took longer than its limit."""


class Wrong(Exception):
    """A result that is not right; the message says in what."""


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise OutOfTime in the context after so many seconds."""

    def stop(signum: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_refusal(error: BaseException) -> bool:
    """Return whether the package itself raised `error`: a ValueError or TypeError of a `raise` in its own files."""
    if not isinstance(error, (ValueError, TypeError)):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(last.filename)
    if PACKAGE not in path.parents or last.lineno is None:
        return False
    raises = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
    stated = any(node.lineno <= last.lineno <= (node.end_lineno or 0) for node in raises)
    return stated and str(error).rstrip().endswith((".", "`", ")", '"'))


def words(error: BaseException, length: int = 4000) -> str:
    """Return the message of an error on one line, with the place for errors that are no refusal."""
    text = " ".join(str(error).split())[:length]
    if is_refusal(error):
        return text
    ours = [f for f in traceback.extract_tb(error.__traceback__) if PACKAGE in Path(f.filename).parents]
    where = f" (at {Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name})" if ours else ""
    return f"{type(error).__name__}: {text}{where}"


def outcome(model: nn.Module, call: Callable[[], str]) -> str:
    """Run `call`, which returns the outcome, and check that `model` is as before if it was refused."""
    state, weights = State(model), weights_of(model)
    try:
        with limit(SECONDS):
            return call()
    except OutOfTime:
        return f"error: longer than {SECONDS} s"
    except Wrong as error:
        return f"wrong: {error}"
    except Exception as error:
        kind = "refused" if is_refusal(error) else "error"
        changed = state.differences(State(model))
        if weights_of(model) != weights:
            changed = ["weights", *changed]
        if changed:
            verb = "refused" if kind == "refused" else "failed"
            bad = "wrong" if kind == "refused" else "error"
            return f"{bad}: {verb} with {', '.join(changed)} changed: {words(error)}"
        return f"{kind}: {words(error)}"


def same_state(before: State, model: nn.Module, but: tuple[str, ...] = ()) -> None:
    """Raise Wrong if anything beside the weights is not as before."""
    changed = [name for name in before.differences(State(model)) if name not in but]
    if changed:
        raise Wrong(f"not restored: {', '.join(changed)}")


def advised(message: str) -> list[str]:
    """Return what a refusal says to leave out, as regular expressions for names; the same layer of all blocks."""
    named = re.search(r"exclude_modules=(\[[^\]]*\])", message)
    if named:
        return [rf"(.*\.)?{_of_all_blocks(name)}" for name in ast.literal_eval(named[1])]
    found = re.search(r"No calibration batch runs the blocks of '([^']+)'", message)
    found = found or re.search(r"(?:of|layers of|but in|of layer|and|add) '([^']+)'.*`exclude_modules`", message)
    return [rf"{_of_all_blocks(found[1])}(\..*)?"] if found else []


def _of_all_blocks(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\\\.|$)", r"\\d+", re.escape(name))


def readable(expression: str) -> str:
    """Return a regular expression of `advised` as a name with stars."""
    return expression.replace(r"(.*\.)?", "").replace(r"(\..*)?", "").replace(r"\d+", "*").replace("\\", "")


class Stages:
    """The stages for one model.

    A refusal that says what to do is taken at its word: layers are left out, or padding is, and the stage is tried
    again. The outcome then says so.

    Args:
        model: the dense model. Every stage works on a copy.
        batches: the calibration data.
    """

    def __init__(self, model: Any, batches: list[Batch]) -> None:
        self.model, self.batches = model, batches

    def prepare(self) -> None:
        """Run the model as the reference does."""
        self.how = Reference(copy.deepcopy(self.model), self.batches).how

    def run(self, stage: str) -> str:
        """Return the outcome of a stage."""
        method = {
            "prune": lambda model, batches, **more: self.prune(model, batches, 0.5, **more),
            "2:4": lambda model, batches, **more: self.prune(model, batches, "2:4", **more),
            "submodule": lambda model, batches, **more: self.reconstruct(model, batches, "submodule", **more),
            "block": lambda model, batches, **more: self.reconstruct(model, batches, "block", **more),
            "structured": self.structured,
            "checkpoint": self.checkpoint,
        }[stage]
        first = result = self._try(method, self.batches)
        batches, excluded = self.batches, []
        for _ in range(TRIES):
            if not result.startswith("refused"):
                break
            if batches is self.batches and "without padding" in result:
                batches = self.batches[:1]
            elif left_out := advised(result):
                excluded += left_out
            else:
                break
            more = {"exclude_modules": "|".join(excluded)} if excluded else {}
            result = self._try(method, batches, **more)
        if result.startswith("refused"):
            return first[:LENGTH]
        notes = ["without padding"] if batches is not self.batches else []
        notes += [f"without `{readable(name)}`" for name in dict.fromkeys(excluded)]
        return f"{result} ({', '.join(notes)})"[:LENGTH] if notes and result == "works" else result[:LENGTH]

    def _try(self, method: Callable[..., str], batches: list[Batch], **more: Any) -> str:
        model = copy.deepcopy(self.model)
        disturb(model)
        return outcome(model, lambda: method(model, batches, **more))

    def prune(self, model: nn.Module, batches: list[Batch], pattern: float | str, **more: Any) -> str:
        """Prune, and compare with the reference."""
        before = State(model)
        report = prune(model, pattern, batches, criterion="wanda", **more)
        same_state(before, model)
        targets = [weight.name for weight in report.weights]
        self._only_targets_changed(model, targets)
        result = Reference(copy.deepcopy(self.model), batches).compare(model, targets, pattern)
        if result.different:
            raise Wrong(result.verdict.removeprefix("wrong: "))
        if result.not_compared and not result.entries:
            return f"works (not compared: {next(iter(result.not_compared.values()))})"
        if result.not_compared:
            return f"works ({len(result.not_compared)} of {len(targets)} weights not compared)"
        return "works"

    def _only_targets_changed(self, model: nn.Module, targets: list[str]) -> None:
        stored = {id(view.storage) for name, view in prunable_weights(model).items() if name in targets}
        dense = dict(self.model.named_parameters())
        for name, parameter in model.named_parameters():
            if id(parameter) not in stored and not torch.equal(parameter, dense[name]):
                raise Wrong(f"{name} changed, which is no target")

    def reconstruct(self, model: nn.Module, batches: list[Batch], region: Any, **more: Any) -> str:
        """Reconstruct with one step, and check zeros, errors and what lies outside of the blocks."""
        before = State(model)
        report = reconstruct(
            model, 0.5, batches, criterion="wanda", region=region, fit=Fit(max_steps=1, holdout=0.0), **more
        )
        same_state(before, model)
        views = prunable_weights(model)
        assert report.pruning is not None
        for weight in report.pruning.weights:
            matrix = views[weight.name].matrix()
            if not matrix.isfinite().all():
                raise Wrong(f"{weight.name} is not finite")
            zeros = (matrix == 0).double().mean(1)
            if (zeros * matrix.shape[1]).round().min() < int(0.5 * matrix.shape[1]):
                raise Wrong(f"{weight.name} lost zeros")
        for fitted in report.regions:
            if not fitted.error <= fitted.error_pruned * (1 + 1e-5):
                raise Wrong(f"{fitted.name}: the error grew from {fitted.error_pruned:.6f} to {fitted.error:.6f}")
        inside = {id(p) for block in Reference(model, []).blocks.values() for p in block.parameters()}
        model_train = dict(self.model.named_parameters())
        for name, parameter in model.named_parameters():
            if id(parameter) not in inside and not torch.equal(parameter, model_train[name]):
                raise Wrong(f"{name} changed, which lies outside of the blocks")
        if all(fitted.steps == 0 for fitted in report.regions):
            return "works (no region was trained)"
        return "works"

    def structured(self, model: nn.Module, batches: list[Batch], **more: Any) -> str:
        """Remove heads and neurons, cut them out, and compare the outputs of the masked and the compact model."""
        before = State(model)
        prune_structured(model, 0.3, batches, **more)
        same_state(before, model, ("requires_grad", "dtypes", "identity of parameters", "configuration", "modules"))
        masked = copy.deepcopy(model)
        size = sum(p.numel() for p in model.parameters())
        result = outcome(model, lambda: str(compact(model, batches) is model))
        if not result.startswith("True"):
            return result.replace(": ", ": compact: ", 1)
        if sum(p.numel() for p in model.parameters()) >= size:
            raise Wrong("compact made it no smaller")
        if (apart := self._apart(masked, model)) > 1e-3:
            raise Wrong(f"outputs of compact and masked differ by {apart:.1e}")
        return "works"

    @torch.no_grad()
    def _apart(self, one: nn.Module, other: nn.Module) -> float:
        one.eval(), other.eval()
        largest = 0.0
        for batch in self.batches:
            for a, b in zip(leaves(run(one, batch)), leaves(run(other, batch)), strict=True):
                # What lies inside may have other widths: attentions have fewer heads.
                if a.shape == b.shape and a.numel():
                    largest = max(largest, float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)))
        return largest

    def checkpoint(self, model: nn.Module, batches: list[Batch], **more: Any) -> str:
        """Prune on disk and in memory, and compare bit for bit."""
        cls = type(self.model)
        with tempfile.TemporaryDirectory() as folder:
            source, output = Path(folder, "source"), Path(folder, "output")
            try:
                self.model.save_pretrained(source)
                loaded = cls.from_pretrained(source).eval()
                saved = self.model.state_dict()
                same = all(torch.equal(v, saved[k]) for k, v in loaded.state_dict().items() if k in saved)
            except Exception as error:
                return f"skipped: Transformers saves or loads it not: {type(error).__name__}: {str(error)[:80]}"
            if not same:
                return "skipped: save_pretrained and from_pretrained change tensors"
            files = digest_of_folder(source)
            try:
                prune_checkpoint(source, output, 0.5, batches, criterion="wanda", **more)
            except Exception as error:
                left = sorted(p.name for p in output.glob("*")) if output.exists() else []
                if is_refusal(error) and left:
                    raise Wrong(f"refused, but left {left[:3]}: {words(error)}") from error
                raise
            finally:
                if digest_of_folder(source) != files:
                    raise Wrong("the source was changed")
            prune(loaded, 0.5, batches, criterion="wanda", **more)
            back = cls.from_pretrained(output)
            theirs = back.state_dict()
            for name, tensor in loaded.state_dict().items():
                if name not in theirs or not torch.equal(tensor, theirs[name]):
                    raise Wrong(f"{name} differs from memory")
        return "works"


def digest_of_folder(folder: Path) -> str:
    """Return a hash of all files in a folder."""
    return digest_of((str(p), torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8))
                     for p in sorted(folder.rglob("*")) if p.is_file())  # fmt: skip
