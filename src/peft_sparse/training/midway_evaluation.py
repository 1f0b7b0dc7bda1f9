"""Evaluates a model in the middle of its reconstruction, by its trainer, and leaves the reconstruction undisturbed."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer

from .endings import same_random_numbers


class MidwayEvaluation:
    """Calls `evaluate` of a trainer while `reconstruct` fits its model.

    Args:
        trainer: the trainer. Its model is evaluated where it is.
        ignore_keys: keys of the model's outputs that evaluation does not gather.
    """

    def __init__(self, trainer: Trainer, ignore_keys: list[str] | None = None) -> None:
        self.trainer: Any = trainer
        self.ignore_keys = ignore_keys
        self.dtypes: dict[int, torch.dtype] = {}

    def check(self) -> None:
        """Check that the arguments of the trainer ask for evaluations that are possible.

        Raises:
            ValueError: the model is not on the training device as a whole, or several processes share its regions.
        """
        args, model = self.trainer.args, self.trainer.model
        if args.eval_strategy == "no" and not args.eval_on_start:
            return
        if args.reconstruction_mode == "DD" and args.world_size > 1:
            raise ValueError(
                'With `reconstruction_mode="DD"` the processes fit different regions, so that no process has a model '
                'to evaluate before the end. Set `eval_strategy="no"` and call `evaluate` after `train`, or use mode '
                '"SS".'
            )
        elsewhere = {str(p.device) for p in model.parameters() if p.device.type != args.device.type}
        if elsewhere:
            raise ValueError(
                f"`eval_strategy` runs the whole model on {args.device}, and parameters are on "
                f'{", ".join(sorted(elsewhere))}. Move the model there first, or set `eval_strategy="no"` and call '
                "`evaluate` after `train`."
            )

    def start(self) -> None:
        """Remember the dtypes that the parameters have between reconstructions. Blocks are fitted in float32."""
        self.dtypes = {id(parameter): parameter.dtype for parameter in self.trainer.model.parameters()}

    def __call__(self) -> None:
        """Evaluate the model as it would be saved now."""
        with self._undisturbed():
            metrics = self.trainer.evaluate(ignore_keys=self.ignore_keys)
        self.trainer._determine_best_metric(metrics, None)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Give the parameters their own dtypes, and put back what an evaluation changes."""
        trainer, model = self.trainer, self.trainer.model
        fitted = [(p, p.data) for p in model.parameters() if p.dtype != self.dtypes.get(id(p), p.dtype)]
        # To run a model, accelerate wraps its forward. The blocks are recorded through the model's own forward.
        forward = {name: model.__dict__.get(name) for name in ("forward", "_original_forward")}
        modes = [module for module in model.modules() if module.training]
        prepared = list(trainer.accelerator._models)
        # Otherwise `evaluate` would convert the model that is fitted by `fp16_full_eval`.
        was_training, trainer.is_in_train = trainer.is_in_train, True
        try:
            with same_random_numbers():
                for parameter, values in fitted:
                    parameter.data = values.to(self.dtypes[id(parameter)])
                yield
        finally:
            for parameter, values in fitted:
                parameter.data = values
            for name, value in forward.items():
                model.__dict__.pop(name, None)
                if value is not None:
                    model.__dict__[name] = value
            for module in modes:
                module.training = True
            trainer.accelerator._models[:] = prepared
            trainer.is_in_train = was_training
