"""Runs a reconstruction: proves the model, divides the sparsity, and takes the walk through the regions."""

from pathlib import Path
from typing import Any

from ..calibration.gradients import gradient_sums
from ..calibration.inputs import count_sequences, evaluation_mode
from ..calibration.proof import prove
from ..calibration.residence import Residence
from ..model.offload import is_offloaded
from ..pruning.all_weights import allocated_patterns
from ..pruning.offloaded import one_layer_at_a_time
from ..pruning.streamed_model import StreamedModel
from .calls import check_chains
from .finished import FinishedRegions
from .observer import ReconstructionObserver
from .parameters import without_gradients
from .progress import Progress
from .report import RegionReport
from .task import ReconstructionTask
from .walk import Walk


def run(
    task: ReconstructionTask,
    inputs: list[dict[str, Any]],
    residence: Residence,
    state_dir: str | Path | None,
    observer: ReconstructionObserver | None,
    streamed: StreamedModel | None = None,
) -> tuple[RegionReport, ...]:
    """Divide the sparsity, sum up gradients if the criterion needs them, and reconstruct region by region.

    Args:
        task: what is pruned and fitted and how.
        inputs: the calibration data as model inputs.
        residence: (block name, block) -> a context within which the block can run.
        state_dir: where finished regions are kept, or None.
        observer: follows the run, or None.
        streamed: reads and writes the blocks of a model that is not in memory. None for a model in memory.

    Returns:
        The reports of the regions, in the order of the model.
    """
    model, dense, pruning = task.model, task.dense, task.pruning
    pruning.sequences = count_sequences(inputs)
    # Weights that are not in memory are not part of `fingerprint_of_model`.
    by_region = bool(streamed) or any(is_offloaded(weight.layer) for weight in pruning.weights.values())
    progress = Progress(state_dir, task.fingerprint(inputs) if state_dir else {}, by_region=by_region)
    finished = FinishedRegions(pruning, progress, observer or ReconstructionObserver())
    with evaluation_mode(model), evaluation_mode(model if dense is None else dense), without_gradients(model):
        proof = prove(model, inputs, pruning.inside, residence, every_expert=pruning.on_unreached == "error")
        check_chains(proof)
        finished.observer.start(task.fit.steps(len(task.fit.split(len(inputs))[0])))
        if pruning.allocation is not None:
            with one_layer_at_a_time(pruning.weights) as layers:
                reading = layers if streamed is None else streamed.weight_in_memory
                pruning.patterns = allocated_patterns(
                    model, pruning, inputs, task.activations, residence, reading, proof
                )
        if "gradients" in pruning.needs:
            pruning.gradients = gradient_sums(model, pruning.weights, inputs, offload=task.activations != "device")
        Walk(task, residence, proof, finished, None if streamed is None else streamed.save).reconstruct(inputs)
    return finished.reports
