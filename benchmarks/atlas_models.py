"""Builds one tiny model per model type of the installed Transformers."""

import copy
import dataclasses
from collections.abc import Iterator

import torch
import transformers
import transformers.models.auto.modeling_auto as auto
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from atlas_sizes import OVERRIDES, Shrinker


# (kind, mapping): the class of a model type is that of the first mapping which knows the type.
KINDS = [
    ("vision-language", "IMAGE_TEXT_TO_TEXT"),
    ("seq2seq", "SEQ_TO_SEQ_CAUSAL_LM"),
    ("speech", "SPEECH_SEQ_2_SEQ"),
    ("encoder", "MASKED_LM"),
    ("causal", "CAUSAL_LM"),
    ("vision-language", "MULTIMODAL_LM"),
    ("speech", "CTC"),
    ("speech", "RNNT"),
    ("speech", "TDT"),
    ("speech", "AUDIO_CLASSIFICATION"),
    ("speech", "TEXT_TO_WAVEFORM"),
    ("speech", "TEXT_TO_SPECTROGRAM"),
    ("vision", "IMAGE_CLASSIFICATION"),
    ("vision", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
    ("vision", "OBJECT_DETECTION"),
    ("vision", "ZERO_SHOT_OBJECT_DETECTION"),
    ("vision", "UNIVERSAL_SEGMENTATION"),
    ("vision", "INSTANCE_SEGMENTATION"),
    ("vision", "SEMANTIC_SEGMENTATION"),
    ("vision", "IMAGE_SEGMENTATION"),
    ("vision", "DEPTH_ESTIMATION"),
    ("vision", "VIDEO_CLASSIFICATION"),
    ("vision", "MASKED_IMAGE_MODELING"),
    ("vision", "MASK_GENERATION"),
    ("vision", "IMAGE_TO_IMAGE"),
    ("vision", "IMAGE_MATTING"),
    ("vision", "KEYPOINT_DETECTION"),
    ("vision", "KEYPOINT_MATCHING"),
    ("vision", "POSE_ESTIMATION"),
    ("vision", "NORMAL_ESTIMATION"),
    ("vision", "POINTMAP_ESTIMATION"),
    ("vision", "TEXT_RECOGNITION"),
    ("vision", "TABLE_RECOGNITION"),
    ("vision", "CAUSAL_IMAGE_MODELING"),
    ("other", "VISUAL_QUESTION_ANSWERING"),
    ("other", "RETRIEVAL"),
    ("other", "TIME_SERIES_PREDICTION"),
    ("other", "TEXT_ENCODING"),
    ("other", "PRETRAINING"),
    ("other", "DECISION"),
    ("vision", "IMAGE"),
    ("vision", "BACKBONE"),
]
LARGEST = 12_000_000


@dataclasses.dataclass
class Entry:
    """One row of the atlas: a model type, its kind, and the name of its class."""

    type: str
    kind: str
    cls: str


class NotBuilt(Exception):
    """The model could not be built at tiny size; the message says why."""


def entries() -> list[Entry]:
    """Return a row for every model type that Transformers' mappings know, by kind and name."""
    found: dict[str, Entry] = {}
    maps = [(kind, f"MODEL_FOR_{name}_MAPPING_NAMES") for kind, name in KINDS] + [("other", "MODEL_MAPPING_NAMES")]
    for kind, mapping in maps:
        for name, cls in getattr(auto, mapping).items():
            first = cls if isinstance(cls, str) else cls[0]
            found.setdefault(name, Entry(name, kind, first))
    order = list(dict.fromkeys(kind for kind, _ in maps))
    return sorted(found.values(), key=lambda entry: (order.index(entry.kind), entry.type))


def shrinkers() -> Iterator[Shrinker]:
    """Yield ways to make a configuration small, the smallest first."""
    yield Shrinker()
    yield Shrinker(image=64, patch=4)
    yield Shrinker(rest=32)
    yield Shrinker(layers=4)
    yield Shrinker(mrope=[2, 1, 1])
    yield Shrinker(mrope=[1, 1, 0])
    yield Shrinker(head=16)
    yield Shrinker(lists=False)
    yield Shrinker(image=224, patch=32)
    yield Shrinker(image=256, patch=16)


def configurations(entry: Entry) -> Iterator[PretrainedConfig]:
    """Yield tiny configurations of a model type; the caller takes the first that runs."""
    try:
        cls = CONFIG_MAPPING[entry.type]
        default = cls().to_dict()
    except Exception as error:
        raise NotBuilt(f"its configuration has no default: {first_line(error)}") from error
    for shrinker in shrinkers():
        small = shrinker.shrink(copy.deepcopy(default))
        for key, value in OVERRIDES.get(entry.type, {}).items():
            *path, last = key.split(".")
            place = small
            for part in path:
                place = place[part]
            place[last] = value
        try:
            config = cls.from_dict(small)
        except Exception as error:
            yield error
            continue
        yield config


def build(entry: Entry, config: PretrainedConfig, seed: int = 0) -> nn.Module:
    """Return the model of `entry` with this configuration, initialised from `seed`, with noise on all parameters."""
    cls = getattr(transformers, entry.cls)
    config = copy.deepcopy(config)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise NotBuilt(f"{size / 1e6:.0f} million parameters after shrinking")
    torch.manual_seed(seed)
    model = cls(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def first_line(error: BaseException, length: int = 160) -> str:
    """Return the type and the beginning of the message of an error, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:length]}"
