"""Estimates of the memory and time of a run, before a weight is loaded."""

from .pruning import PruningPlan, plan_pruning
from .reconstruction import ReconstructionPlan, plan_reconstruction
from .training import TrainingPlan, plan_training


__all__ = ["PruningPlan", "ReconstructionPlan", "TrainingPlan", "plan_pruning", "plan_reconstruction", "plan_training"]
