"""prune_structured: scores the heads and neurons of the dense model, removes the lowest and compensates their means.

The result is an ordinary model in which the removed heads and neurons are zeros. Tuners and reconstruction keep these
zeros, and `compact` cuts them out.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.activations import Activations, check_activations
from ..calibration.inputs import Calibration, as_inputs, evaluation_mode, in_words
from ..calibration.measure import measured_blocks
from ..calibration.proof import prove
from ..calibration.residence import Residence, on_device
from ..calibration.statistics import Statistics
from ..model.blocks import Targets, base_model
from ..model.environment import check_device, peak_memory
from ..model.processes import working_together
from ..model.settings import ordinary_settings
from ..model.weights import WeightView, check_finite
from .filter_metrics import FILTER_METRICS
from .filter_pruning import prune_filters
from .metrics import METRICS, unit_scores
from .proof import prove_units
from .reap import prune_experts
from .report import StructuredReport, UnitsReport
from .saving import make_savable
from .selection import ScoredUnits, Structure, check_structure, select_units
from .units import Units, check_loaded, find_units


# The metric of whole experts.
REAP = "reap"


@ordinary_settings()
def prune_structured(
    model: nn.Module,
    ratio: float,
    calibration: Calibration | None = None,
    *,
    metric: str = "wifv",
    structure: Structure | None = None,
    attention_ratio: float | None = None,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    compensate: bool | None = None,
    batch_size: int = 1,
    activations: Activations = "device",
    device: torch.device | str | None = None,
) -> StructuredReport:
    """Write zeros over whole attention heads, MLP neurons or filters, or cut out whole experts. In place.

    The default is FLAP, for heads and neurons. `metric="reap"` removes experts, and `metric="l1"` and four others
    remove filters of convolutional networks.

    Let W (out, in) be the output projection of an attention or MLP, X_j its input channel j over the tokens of the
    calibration data, S_j the metric of this channel, and m (in,) the mask, 1 for kept channels. Then

        z_j = (S_j - mean(S)) / std(S)      over the channels of one layer
        b  += W (μ ⊙ (1 - m))               if `compensate`, with μ_j = mean(X_j) and W before zeros are written

    A unit is a neuron, or a KV group: a key head, its value head and all query heads that read them. Its score is the
    mean of z_j over its channels. Units with the lowest scores are removed. Of units with equal scores, the one that
    comes first in the model is removed first. Units whose columns of W are already zero are removed before all others.
    Every attention and every MLP keeps at least one unit.

    At least the fraction `ratio` of the parameters of the chosen attentions and MLPs is removed. A head and a neuron
    count with their true numbers of parameters, biases included. What is removed beyond `ratio` is less than the
    parameters of the smallest removed unit; with "al-mm" and "ul-mm" it is less than those of the smallest removed
    neuron, if a neuron is removed. `structure` says over which layers this bound holds.

    All statistics are measured on the dense model, and zeros are written at the end. If `torch.distributed` runs
    several processes and calibration is given, each process calls `prune_structured` with the same model, arguments
    and calibration. The processes share the batches, and all of them write the same zeros.

    `metric="reap"` removes whole experts instead. Let g_j(x) be the weight that the router of a mixture gives to
    expert j for token x, f_j(x) the output of this expert, and X_j the calibration tokens that are sent to it. Then

        S_j = mean over X_j of g_j(x) · ||f_j(x)||_2      0 if X_j is empty

    The experts with the lowest S_j of each mixture are removed. Of equal ones, the first is removed first. Each
    mixture loses the fraction `ratio` of its experts, rounded up to whole experts. Where the router first chooses
    among groups of experts, each group loses this fraction. The rows and biases of the router that belong to removed
    experts are removed too. Each token is sent to as many experts as before. Experts are cut out at once and do not
    wait for `compact`, because no values of a router without biases say that an expert is never chosen. The result
    computes what the dense model computes with the logits of the removed experts at -inf. With `compensate=True` the
    router stays as it is, and the mean of f_j(x) over X_j takes the place of a removed expert. This is shown on a
    small input and on the first batch, before calibration for other experts and at the end for the removed ones. If an
    output differs, the model is put back as it was.

    `metric="l1"`, "l2", "fpgm", "bn_scale" or "wanda" removes whole filters of convolutions (`nn.Conv2d`). Let W
    (filters, in · k · k) be the kernel, γ the weight of the normalisation after it, and X_j its input patches. Then

        S_f = Σ_j |W_fj|                       "l1"
        S_f = ||W_f:||_2                       "l2"
        S_f = Σ_g ||W_f: - W_g:||_2            "fpgm": the filters nearest to the geometric median have the lowest
        S_f = |γ_f|                            "bn_scale"
        S_f = Σ_j |W_fj| · ||X_j||_2           "wanda", the only one that needs calibration

    Filters are removed by channels. A channel has its filter, its entries in normalisations, and the input channels
    that read it. Zeros are written into all of them, so `compact` can cut them out. Channels that are added, as in
    residual blocks, are removed together, and so are the channels at one place of each group of a convolution with
    groups. What belongs together is found by running the model on one batch: an image that is made for it, or the
    first of `calibration`. Channels stay if an operation without a rule reads them, or if the model returns them.
    `report.left_out` names the convolutions with such filters, and the reasons.

    The filters of a channel are scored in each of its convolutions, S divided by its mean over the filters of the
    convolution, except for "bn_scale". The score of the channel is the mean over its convolutions. The dense model, in
    which only the layers that read a channel do not receive it, is compared with the model that has the zeros, for
    every second channel. If the outputs differ, the model is refused, before anything is changed.

    Paper: An et al. 2023, "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    arXiv:2312.11983. The authors' code differs in these points. Here variances are taken over tokens and do not depend
    on the batch size. Heads count with their true numbers of parameters. Compensation is added to an existing bias and
    does not replace it. Grouped-query attention of any shape is pruned. At least `ratio` is removed.

    Experts: Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression",
    arXiv:2510.13999. Their mean outputs: Zhang et al. 2025, "MoNE: Replacing Redundant Experts with Lightweight
    Novices for Structured Pruning of MoE", arXiv:2507.00390, which chooses experts by another metric.

    Filters: "l1" is from Li et al. 2016, "Pruning Filters for Efficient ConvNets", arXiv:1608.08710; "l2" from He et
    al. 2018, arXiv:1808.06866; "fpgm" from He et al. 2018, arXiv:1811.00250; "bn_scale" from Liu et al. 2017,
    arXiv:1708.06519; the scores of "wanda" from Sun et al. 2023, arXiv:2306.11695; coupled filters and the
    division by a mean from Fang et al. 2023, arXiv:2301.12900, who take the mean of the highest scores.

    Args:
        model: a model with blocks, without adapters, with loaded floating-point weights.
        ratio: fraction of the parameters of the chosen attentions and MLPs to remove, or of the experts of each chosen
            mixture, or of the filters of each convolution, in [0, 1). At least this fraction is removed.
        calibration: token ids (sequences, tokens), what a tokenizer returns, or an iterable of model inputs, such as a
            list, a `DataLoader` or a tokenised `datasets.Dataset`. Padding does not count, that is tokens whose
            `attention_mask` is 0. A batch may also hold a `token_mask` (sequences, tokens), or a `decoder_token_mask`,
            which the model does not see: only tokens where it is 1 count. It is required unless
            `metric="magnitude_sp"` and `compensate=False`, or filters are removed by another metric than "wanda". For
            filters it may hold images (images, channels, height, width).
        metric: "wifv" is FLAP's, S_j = Var(X_j) · ||W_:j||². The others are "ifv", S_j = Var(X_j); "wifn",
            S_j = mean_i |W_ij| · ||X_j||; and the paper's baselines "wanda_sp", with the formula of "wifn", and
            "magnitude_sp", S_j = ||W_:j||. "wifv", "ifv" and "wifn" are squared for attention, as in the paper's code.
            "reap" removes experts. "l1", "l2", "fpgm", "bn_scale" and "wanda" remove filters.
        structure: which units are compared with each other. "al-am", the default: all units of the model. "al-mm": all
            heads of the model with each other, and all neurons of the model with each other. "ul-mm": the heads of a
            block with each other, and the neurons of a block with each other. "ul-um": the same as "ul-mm", but
            exactly `ratio`, rounded up to whole units, is removed from each attention and from each MLP. `ratio` and
            the bound above hold for the whole model with "al-am" and "al-mm", for each block with "ul-mm", and for
            each attention and each MLP with "ul-um". With "ul-mm" and "ul-um" blocks of equal shape keep equal shapes.
            Experts are always compared within their mixture, so mixtures of equal size keep equally many. For filters
            there are "ul-um", their default, which removes `ratio` of the channels of each convolution, or of the
            convolutions that are removed together, and "al-am", which removes `ratio` of all filters of the model.
        attention_ratio: for "al-mm" and "ul-mm", the largest fraction of the parameters of the heads to remove, in
            [0, 1). Neurons make up the rest of `ratio`. By default it is `ratio`, and more if the neurons alone are
            too few.
        target_modules: which attentions and MLPs are pruned: None or "all-linear" for all of them, a list of names or
            name endings, or a regular expression for the whole name. An attention or MLP is chosen if its own name, as
            in the report, or the name of one of its linear layers matches. `["self_attn"]` prunes attentions alone.
            Experts are chosen by the name of their mixture, of its router or of one of its parameters. Filters are
            chosen by the name of their convolution, and removed if all convolutions that have a part in them are.
        exclude_modules: a list of names or name endings, or a regular expression for the whole name. An attention or
            MLP is left out if its own name or the name of one of its linear layers matches. Experts are left out by
            the same names by which they are chosen.
        compensate: add the mean contribution of the removed channels to the bias of the output projection. The bias is
            created where there is none. The configuration of the model is then changed so that `save_pretrained` and
            `from_pretrained` keep it. With "reap": put the mean output in the place of each removed expert. None, the
            default, is True for heads and neurons and False for experts and filters, which have no compensation.
        batch_size: how many sequences run together, where they do not come in batches.
        activations: where the hidden states of the calibration data wait between blocks: "device", "cpu" or "disk".
            Filters do not use it: the model runs as a whole.
        device: where each block is moved while it is processed. None computes where the block is. Filters do not use
            it either.

    Returns:
        A report of what was removed from each attention, MLP, mixture of experts or set of convolutions, in units and
        in parameters.

    Raises:
        ValueError: an argument is out of its range; a name in `target_modules` or `exclude_modules` matches nothing;
            the model has adapters, or the heads or neurons of a chosen attention or MLP cannot be found; a weight or a
            statistic is not finite; `calibration` is missing; `ratio` would remove the last unit of a layer or leave
            fewer experts than a token is sent to; the model without some experts computes something else; the model
            has no filters that can be removed, or computes something else with zeros in them.
        RuntimeError: another process of the `torch.distributed` group failed.
    """
    started = time.perf_counter()
    of_experts, of_filters = metric == REAP, metric in FILTER_METRICS
    structure = structure or ("ul-um" if of_experts or of_filters else "al-am")
    compensate = not (of_experts or of_filters) if compensate is None else compensate
    _check_arguments(ratio, metric, structure, attention_ratio, compensate, calibration)
    check_activations(activations)
    check_device(device, is_there=False)
    targets = target_modules, exclude_modules
    if of_filters:
        images = [] if calibration is None else as_inputs(model, calibration, batch_size)
        return prune_filters(model, ratio, images, targets, metric, structure)
    if of_experts and calibration is not None:
        inputs = as_inputs(model, calibration, batch_size)
        return prune_experts(model, ratio, inputs, targets, compensate, activations, on_device(device))
    sets = find_units(model, target_modules, exclude_modules)
    check_loaded(sets)
    check_finite({name: WeightView(layer) for units in sets for name, layer in units.named_layers().items()})
    # Whether `ratio` can be reached does not depend on scores, so this refuses a bad `ratio` before calibration.
    select_units([_unscored(units) for units in sets], ratio, structure, attention_ratio)
    statistics: dict[str, Statistics] = {}
    inputs = [] if calibration is None else as_inputs(model, calibration, batch_size)
    prove_units(model, sets, inputs)
    if inputs:
        statistics = _measured(model, sets, inputs, activations, on_device(device))
    scored = [_score(units, metric, statistics.get(units.output_name, Statistics())) for units in sets]
    masks = select_units(scored, ratio, structure, attention_ratio)
    size = _parameters(model)
    for units, mask in zip(sets, masks, strict=True):
        if compensate:
            _compensate(units, mask, statistics[units.output_name])
        _write_zeros(units, mask)
    if _parameters(model) > size and isinstance(base_model(model), PreTrainedModel):
        make_savable(base_model(model))
    return StructuredReport(
        metric=metric,
        structure=structure,
        ratio=ratio,
        compensated=compensate,
        parameters_added=_parameters(model) - size,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
        layers=tuple(
            UnitsReport(units.name, units.kind, units.count, int(mask.sum()), units.heads_per_unit, score.cost)
            for units, mask, score in zip(sets, masks, scored, strict=True)
        ),
    )


def _measured(
    model: nn.Module, sets: list[Units], inputs: list[dict[str, Any]], activations: Activations, residence: Residence
) -> dict[str, Statistics]:
    """Return the statistics of the inputs of every output layer of `sets`, by the layer's name."""

    def inside(block: str) -> dict[str, WeightView]:
        return {units.output_name: WeightView(units.output) for units in sets if units.block == block}

    what = f"the units of {len(sets)} attentions and MLPs by {in_words(inputs)}"
    with evaluation_mode(model), working_together(what):
        proof = prove(model, inputs, inside, residence)
        measured = measured_blocks(model, inputs, inside, ("inputs", "moments"), activations, residence, proof)
        return {name: block.of(name) for name, block in measured}


@torch.no_grad()
def _score(units: Units, metric: str, statistics: Statistics) -> ScoredUnits:
    """Return the score of every unit; it is -inf for units whose output columns are already zero."""
    rule, weight = METRICS[metric], units.output.weight.detach()
    channels = rule.score(weight, _moved(statistics, weight.device))
    if rule.squared_in_attention and units.kind == "attention":
        channels = channels.square()
    gone = ~(weight != 0).any(0).view(units.count, -1).any(1)
    scores = unit_scores(channels, units.count).masked_fill(gone, -torch.inf)
    return ScoredUnits(units.block, units.kind, scores.cpu(), units.cost)


def _unscored(units: Units) -> ScoredUnits:
    return ScoredUnits(units.block, units.kind, torch.zeros(units.count, device="cpu"), units.cost)


def _moved(statistics: Statistics, device: torch.device) -> Statistics:
    """Return the statistics that metrics use, on `device`. They were measured where the block ran."""
    names = ("input_norm", "input_mean", "input_variance")
    there = {name: getattr(statistics, name) for name in names if getattr(statistics, name) is not None}
    return Statistics(tokens=statistics.tokens, **{name: value.to(device) for name, value in there.items()})


@torch.no_grad()
def _compensate(units: Units, mask: Tensor, statistics: Statistics) -> None:
    """Add W (μ ⊙ (1 - m)) to the bias of the output layer, and create the bias if there is none."""
    layer = units.output
    mean = _moved(statistics, layer.weight.device).input_mean
    assert mean is not None
    lost = layer.weight.float() @ (mean.float() * ~units.columns_of(mask).to(mean.device))
    if not lost.any():
        return
    if layer.bias is None:
        layer.bias = nn.Parameter(lost.to(layer.weight.dtype), layer.weight.requires_grad)
    else:
        layer.bias.copy_(layer.bias.float() + lost)


@torch.no_grad()
def _write_zeros(units: Units, mask: Tensor) -> None:
    mask = mask.to(units.output.weight.device)
    for layer in units.layers:
        gone = ~units.rows_of(layer, mask)
        layer.weight[gone] = 0
        if layer.bias is not None:
            layer.bias[gone] = 0
    units.output.weight[:, ~units.columns_of(mask)] = 0


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check_arguments(
    ratio: float,
    metric: str,
    structure: str,
    attention_ratio: float | None,
    compensate: bool,
    calibration: Calibration | None,
) -> None:
    if not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise ValueError(
            f"`ratio` must be in [0, 1), got {ratio!r}. Use 0.2 to remove a fifth of the heads and neurons, of the "
            "experts, or of the filters."
        )
    if metric not in METRICS and metric not in FILTER_METRICS and metric != REAP:
        raise ValueError(
            f"`metric` must be one of {', '.join(map(repr, METRICS))} for heads and neurons, {REAP!r} for experts, or "
            f"one of {', '.join(map(repr, FILTER_METRICS))} for filters, got {metric!r}."
        )
    check_structure(structure, attention_ratio)
    if metric == REAP and structure != "ul-um":
        raise ValueError(
            'Expected `structure="ul-um"` or none with `metric="reap"`, which removes equally many experts from each '
            f"mixture, got {structure!r}. Leave it out."
        )
    if metric in FILTER_METRICS:
        _check_filter_arguments(metric, structure, compensate)
        needs_inputs = FILTER_METRICS[metric].needs_inputs
    else:
        needs_inputs = metric == REAP or METRICS[metric].needs_inputs
    if calibration is None and (needs_inputs or compensate):
        reason = f"Metric {metric!r}" if needs_inputs else "`compensate=True`"
        raise ValueError(
            f"{reason} needs statistics of the inputs of each layer, and `calibration` is missing. Pass token ids of "
            "shape (sequences, tokens) or an iterable of model inputs. To remove heads and neurons, "
            '`metric="magnitude_sp", compensate=False` needs none. To remove filters, `metric="l1"` needs none.'
        )


def _check_filter_arguments(metric: str, structure: str, compensate: bool) -> None:
    if structure not in ("ul-um", "al-am"):
        raise ValueError(
            f'Expected `structure="ul-um"` or "al-am" with `metric={metric!r}`, got {structure!r}. Filters have no '
            'heads beside them: "ul-um" removes an equal share from each layer, "al-am" compares all layers.'
        )
    if compensate:
        raise ValueError(
            f"`compensate=True` is for heads, neurons and experts, got `metric={metric!r}`. Leave it out, and measure "
            "the statistics of the normalisations anew after pruning."
        )
