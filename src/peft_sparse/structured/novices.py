"""Experts of which some are constants, as in MoNE: each removed expert returns the mean of its outputs.

The router goes on choosing among all. What it sends to a removed expert gets a constant vector, times its weight.
"""

import torch
from torch import Tensor, nn

from .cutting import Cuts
from .experts import Experts
from .routing import as_routed


class ExpertsAndNovices(nn.Module):
    """Experts that stay, and a constant output in the place of each of the others.

    Args:
        experts: the module of the experts that stay.
        novices: the constants, (novices, hidden).
        place: for each choice of the router, the number of its expert, or the number of experts that stay plus the
            number of its novice, (choices,).
        trained: whether the constants get gradients.
    """

    def __init__(self, experts: nn.Module, novices: Tensor, place: Tensor, trained: bool) -> None:
        super().__init__()
        self.experts = experts
        self.novices = nn.Parameter(novices, trained)
        self.place: Tensor
        self.register_buffer("place", place)
        # The number of choices of the router. Transformers calls it so, and what looks for routers reads it.
        self.num_experts = len(place)

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Take and return what the experts do: states, the chosen experts and their weights -> the weighted sum."""
        routed = as_routed(args, kwargs)
        assert routed is not None, "`prune_structured` checked the calls"
        place = self.place[routed.chosen]
        staying = self.num_experts - len(self.novices)
        constant = place >= staying
        # Kernels of experts need an expert for each choice. One with weight 0 adds nothing.
        chosen = place.masked_fill(constant, 0).to(routed.chosen.dtype)
        own, own_kwargs = routed.replaced(routed.states, chosen, routed.weights.masked_fill(constant, 0))
        shares = routed.weights.new_zeros(len(place), len(self.novices)).scatter_add(
            1, (place - staying).clamp_min(0), routed.weights.masked_fill(~constant, 0)
        )
        output: Tensor = self.experts(*own, **own_kwargs)
        return output + shares.to(output.dtype) @ self.novices.to(output.dtype)


def install(experts: Experts, kept: Tensor, novices: Tensor, cuts: Cuts) -> None:
    """Cut out the experts that are False in `kept` (count,), and let `novices` (removed, hidden) take their place."""
    holder = next(module for module in experts.around[1].modules() if experts.module in module.children())
    leaf = next(name for name, child in holder.named_children() if child is experts.module)
    weight = next(experts.module.parameters())
    cuts.on_undo(setattr, holder, leaf, experts.module)
    experts.cut(kept, cuts, with_router=False)
    place = torch.where(kept, kept.cumsum(0) - 1, int(kept.sum()) + (~kept).cumsum(0) - 1)
    module = ExpertsAndNovices(
        experts.module,
        novices.to(weight.device, weight.dtype),
        place.to(weight.device),
        weight.requires_grad,
    )
    setattr(holder, leaf, module.train(experts.module.training))
