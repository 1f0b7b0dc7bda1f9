"""What a run will take, beforehand: from names and shapes, without a weight."""

from .pruning import PruningPlan, plan
from .reconstruction import ReconstructionPlan, plan_reconstruction
from .training import TrainingPlan, plan_training


__all__ = ["PruningPlan", "ReconstructionPlan", "TrainingPlan", "plan", "plan_reconstruction", "plan_training"]
