"""Models without memory: the class that a configuration names, with parameters on the meta device."""

from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto
from transformers.utils import CONFIG_NAME


def configuration_of(source: PretrainedConfig | str | Path) -> PretrainedConfig:
    """Return the configuration of a saved model, or `source` itself if it is one.

    Args:
        source: a configuration, or the folder of a model, or its name on the Hub.

    Raises:
        TypeError: `source` is none of these.
        FileNotFoundError: there is no such model.
    """
    if isinstance(source, PretrainedConfig):
        return source
    if not isinstance(source, (str, Path)):
        raise TypeError(
            f"Expected a model, its configuration, its folder or its name on the Hub, got {type(source).__name__}."
        )
    if Path(source).exists() and not (Path(source) / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"Expected the folder of a saved model, and there is no {CONFIG_NAME} in {str(source)!r}. Give a folder "
            "that `save_pretrained` wrote."
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source)
    except OSError as error:
        raise FileNotFoundError(
            f"There is no folder {str(source)!r}, and no model of this name could be loaded from the Hub. Give the "
            f"folder of a saved model. {error}"
        ) from error
    return config


def empty_model(config: PretrainedConfig, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """Return the model of `config` with parameters on the meta device, which have shapes and take no memory.

    Args:
        config: the configuration.
        model_class: the class of the model. By default the one that the configuration names.

    Raises:
        ValueError: the configuration names no class, or several, and `model_class` is not given.
    """
    if model_class is None:
        names = config.architectures or []
        if len(names) != 1:
            raise ValueError(
                f"Expected a configuration that names one class in `architectures`, got {names}. Write the name of "
                "the model's class there, or give the model."
            )
        model_class = model_classes(config)[0]
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = model_class._from_config(config)
    # Parameters were moved to the meta device one by one, which untied them.
    model.tie_weights()
    return model


def model_classes(
    config: PretrainedConfig, source: str | Path | None = None, trust_remote_code: bool = False
) -> list[type[PreTrainedModel]]:
    """Return the classes that the model of `config` may have: those it names, or if it names none, all that fit it.

    A name stands for a class of transformers, for one that was registered with an Auto class, or for code in `source`.

    Args:
        config: the configuration.
        source: the folder that holds the code which the configuration refers to.
        trust_remote_code: whether this code may run.

    Raises:
        ValueError: no class is found.
    """
    known = _auto_classes(config)
    if trust_remote_code and source is not None:
        references = (getattr(config, "auto_map", None) or {}).items()
        code = {auto: reference for auto, reference in references if auto.startswith("AutoModel")}
        known = {
            reference.rpartition(".")[2]: get_class_from_dynamic_module(reference, str(source))
            for reference in code.values()
        } | ({} if code else known)
    names = config.architectures or list(known)
    found = [known[name] if name in known else getattr(transformers, name, None) for name in names]
    classes = [cls for cls in found if isinstance(cls, type) and issubclass(cls, PreTrainedModel)]
    if not classes:
        raise ValueError(
            f"Expected a configuration whose `architectures` name a class of transformers or a registered one, got "
            f"{config.architectures}. Register the class with `AutoModel.register`, pass `trust_remote_code=True` if "
            "its code lies beside the weights, or load the model and use `prune`."
        )
    return list(dict.fromkeys(classes))


def _auto_classes(config: PretrainedConfig) -> dict[str, type[PreTrainedModel]]:
    """Return the classes that the Auto classes of transformers know for `config`, by name."""
    mappings = [
        getattr(auto, "_model_mapping", None) for auto in vars(modeling_auto).values() if isinstance(auto, type)
    ]
    found = [mapping[type(config)] for mapping in mappings if mapping is not None and type(config) in mapping]
    flat = [cls for entry in found for cls in (entry if isinstance(entry, (list, tuple)) else [entry])]
    return {cls.__name__: cls for cls in flat}


def dtype_of(config: PretrainedConfig, tensors: dict[str, torch.Tensor]) -> torch.dtype:
    """Return the dtype in which `from_pretrained` loads `tensors`: that of `config`, or of the first one."""
    if config.dtype is not None:
        return getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype
    floating = [t.dtype for t in tensors.values() if t.is_floating_point() and t.itemsize > 1]
    return floating[0] if floating else torch.get_default_dtype()
