"""What is found out about a model while its blocks are compared with its own pass."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..model.blocks import find_stacks
from ..model.experts import expert_layers
from ..model.weights import WeightView
from .batch import Order, Trait
from .observing import Sight, called_for
from .residence import Residence
from .runner import BlockRunner


@dataclass
class Proof:
    """What was found out about a model while it was compared with its blocks.

    Args:
        traits: how each block behaves, by name.
        sight: how inputs are seen that the calls of layers do not show.
        orders: for each stack, by the name of its first block, the calls on one batch of each kind: (name of the
            block, links to what earlier calls returned).
        stacks: the names of the first blocks of the stacks, in the order in which the stacks first run.
    """

    traits: dict[str, Trait] = field(default_factory=dict)
    sight: Sight = field(default_factory=Sight)
    orders: dict[str, list[Order]] = field(default_factory=dict)
    stacks: list[str] = field(default_factory=list)


class Findings:
    """What is known of a model, its blocks and its weights, and grows batch by batch.

    Args:
        model: the model.
        inside: name of a block -> the weights in it whose inputs will be measured, by name.
        residence: (name, block) -> a context within which the block's weights are on the device that computes.
    """

    def __init__(self, model: nn.Module, inside: Callable[[str], dict[str, WeightView]], residence: Residence) -> None:
        self.model = model
        self.residence = residence
        self.stacks = find_stacks(model)
        self.weights = {name: inside(name) for stack in self.stacks for name in stack}
        self.all_weights = {name: weight for weights in self.weights.values() for name, weight in weights.items()}
        experts = expert_layers(model)
        self.of_experts = {
            name for name, w in self.all_weights.items() if w.expert is not None or id(w.layer) in experts
        }
        self.traits: dict[str, Trait] = {}
        self.sight = Sight(experts=frozenset(self.of_experts))
        self.orders: dict[str, list[Order]] = {}
        # The names of the first blocks of the stacks, in the order in which the stacks first run.
        self.ran: list[str] = []
        # Number of entries of the inputs that each weight got: in the model's own pass, and in calls of its block.
        self.reached: dict[str, int] = {}
        # Names of weights that a batch reached only with tokens that do not count.
        self.uncounted: set[str] = set()
        # The sum of the sizes of these inputs.
        self.sizes: dict[str, Tensor] = {}

    def add_traits(self, runner: BlockRunner) -> None:
        for index, trait in runner.traits.items():
            name = runner.names[index]
            known = self.traits.get(name, trait)
            mirrored = trait.mirrored if trait.mirrored == known.mirrored else None
            self.traits[name] = Trait(trait.tree, mirrored, trait.writes or known.writes, known.states)

    def layers(self) -> list[tuple[str, nn.Module]]:
        """Return the modules that are called to use the weights that are matrices of their own, with their names."""
        return list(called_for(self.model, self.all_weights, self.sight.bases))
