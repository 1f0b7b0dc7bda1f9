"""Makes the default configuration of a model class tiny: sizes by the names of their keys, and a few overrides.

The rules know words of configurations ("heads", "layers", "experts"), not models. `OVERRIDES` holds, as data, the
values of those model types that the rules do not make to run.
"""

import re
from typing import Any


VOCABULARY = 96
# Token ids of inputs are drawn from here; special tokens with larger ids get ids above.
PLAIN_TOKENS = range(8, 48)
SPECIAL = range(48, VOCABULARY)

# (words of a key, value), the first match counts. A function gets the default value.
SIZES: list[tuple[str, Any]] = [
    (
        r"type_vocab_size|max_depth_.*|num_labels|num_channels|in_channels|num_residual_layers|num_feat_extract_layers",
        None,
    ),
    (r".*codebook_size|.*codebooks?_size", 64),
    (r"vocab_size_per_layer_input|.*vocab_size|vocabulary_size|n_vocab|num_embeddings", VOCABULARY),
    (r"hidden_size_per_layer_input", 8),
    (r"qk_head_dim", 16),
    (r"rotary_dim|.*rotary_ndims", 4),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 8),
    (r"linear_num_key_heads|index_n_heads|.*index_num_heads", 2),
    (r".*head_dim|d_kv|kv_channels|attention_head_size|d_head|.*head_size", 8),
    (r".*(num_key_value_heads|num_kv_heads|n_kv_heads|kv_heads)|multi_query_group_num|n_head_kv", "kv"),
    (r".*(attention_heads|attn_heads|num_heads|n_heads?)", lambda value: min(value, 4)),
    (r"(moe_)?first_k_dense_replace|.*num_dense_layers|n_hash_layers", lambda value: min(value, 1)),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers|mtp_.*", 0),
    (r"num_adapter_layers|num_.*conv_layers|max_window_layers", lambda value: min(value, 2)),
    (r".*(num_hidden_layers|layers|num_blocks|n_layers?|depth|num_layer)", "layers"),
    (r".*lora_rank|.*lora_dim|lora_rank_.*|.*low_rank_dim", 8),
    (r".*intermediate_(size|dim).*|.*ffn_dim|d_ff|n_inner|.*mlp_dim|.*feedforward.*|ffn_hidden_size|d_inner", 48),
    (r".*ffn_(hidden_)?size|inner_dim|.*inner_hidden_size|mlp_hidden.*|.*feed_forward_(dim|size)", 48),
    (r".*(state_size|d_state|state_dim)", 8),
    (r"time_step_rank|mamba_dt_rank|.*dt_rank", 4),
    (r".*n_groups|num_groups|n_group", lambda value: min(value, 2)),
    (r"topk_group", 1),
    (r"n_shared_experts|(moe_)?num_shared_experts", lambda value: min(value, 1)),
    (r".*(experts_per_tok(en)?|top_?k(_experts)?|moe_k|experts_top_k)|num_selected_experts", lambda v: min(v, 2)),
    (r".*(experts|num_experts|n_routed_experts)|expert_num", lambda value: min(value, 4)),
    (r"index_topk|.*num_position_embeddings", lambda value: min(value, 16)),
    (
        r".*(max_position_embeddings|n_positions|max_target_positions|max_seq(uence)?_len(gth)?|context_length|n_ctx)",
        128,
    ),
    (r"max_2d_position_embeddings|max_rel.*pos.*", 128),
    (r"max_source_positions|num_audio_positions", 32),
    (
        r"sliding_window|block_size|local_attention|attention_window|window_attention_size|.*chunk_size|window",
        lambda v: min(v, 8),
    ),
    (r"num_mel_bins|feature_size|input_feat_per_channel|n_mels|mel_bins", lambda value: min(value, 16)),
    (r"num_conv_pos_embeddings", lambda value: min(value, 16)),
    (r"num_conv_pos_embedding_groups", 4),
    (r"(num_)?(object_)?quer(y_tokens|ies)|num_latents|num_detection_tokens", lambda value: min(value, 8)),
    (r"window_size", lambda value: min(value, 4)),
    (
        r"(attn|expert|.*_layer)_(layer_)?period|full_attention_interval|.*_interval|decoder_sparse_step",
        lambda v: min(v, 2),
    ),
    (r"attn_layer_offset|expert_layer_offset", 1),
    (r"hidden_size|d_model|n_embd|dim|width|hidden_dim|dim_model|model_dim|latent_dim|cross_attention_dim", 32),
    (r".*(hidden_size|_embed_dim|_embd|embed_dim|hidden_dim|embedding_(size|dim)|projection_dim|embed_proj_dim)", 32),
    (
        r".*(_d_model|model_size|_width|output_dim|proj_dim|proj_size|out_dim|fpn_.*_size|pooler_output_size|codevector_dim)",
        32,
    ),
    (
        r"output_channels|input_embedding_size|embedding_size_.*|mask_feature_size|fpn_feature_size|encoder_proj.*dim",
        32,
    ),
    (r"codebook_dim|vector_quantization_hidden_dimension|.*_out_channels", lambda value: min(value, 32)),
]
SIZES_COMPILED = [(re.compile(words), value) for words, value in SIZES]

LISTS: list[tuple[str, Any]] = [
    (
        r"depths|blocks_per_stage|num_blocks_per_stage|layers",
        lambda values: [min(v, 1 + (i == 1)) for i, v in enumerate(values)],
    ),
    (r".*(num_heads|num_attention_heads|attention_heads).*", lambda values: [min(v, 2) for v in values]),
    (
        r"hidden_sizes|embed_dims?|embed_dim_per_stage|neck_hidden_sizes|encoder_hidden_size|decoder_hidden_sizes",
        "growing",
    ),
    (r".*(conv_dim|tdnn_dim|channels)", lambda values: [v if v < 16 else 16 for v in values]),
    (r"attention_window", lambda values: [min(v, 8) for v in values]),
    (r"mrope_section", lambda values: [2, 1, 1]),
    (r"(short|long)_factor", lambda values: values[:4]),
    (r".*inner_group.*|.*sequence_reduction_ratios", None),
]
LISTS_COMPILED = [(re.compile(words), value) for words, value in LISTS]

STAGES = ("depths", "hidden_sizes", "stage_out_channels", "embed_dim_per_stage", "blocks_per_stage")
# Values of keys that have none by default.
UNSET = {"vocab_size": VOCABULARY, "head_dim": 8, "num_key_value_heads": 4, "num_experts_per_tok": 2}

# What the rules above do not make to run, by model type; a dotted key reaches into a sub-configuration.
OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 8, "context_length": 16},
    "bailing_hybrid": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 8},
    "bamba": {"attn_layer_indices": [1]},
    "bros": {"max_2d_position_embeddings": 128, "dim_bbox_sinusoid_emb_2d": 8, "dim_bbox_projection": 8},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"pad_token_id": 1, "mask_token_id": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "glm5_next_text": {"index_kpool": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "informer": {"prediction_length": 8, "context_length": 16},
    "kimi_linear": {"num_expert_group": 1, "topk_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "lilt": {"channel_shrink_ratio": 4, "hidden_size": 48},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mask2former": {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [4, 4],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "swin2sr": {"embed_dim": 24, "num_heads": [2, 2], "depths": [1, 1]},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
    "wavlm": {"feat_extract_norm": "layer"},
    "wav2vec2-bert": {"feature_projection_input_dim": 16},
    "zamba2": {"attention_head_dim": 16, "attention_hidden_size": 64},
    "xmod": {"default_language": "en_XX"},
}


class Shrinker:
    """Shrinks one configuration, given as the dict that `to_dict` returns.

    Args:
        image: height and width of images.
        patch: the largest patch of images.
        layers: number of layers where all of them are alike.
        rest: the largest other number; None leaves them.
        head: width of an attention head where it has a key of its own.
        mrope: `mrope_section` of rotary embeddings that have none; models then take that of their full width.
        lists: whether lists of widths are shrunk.
    """

    def __init__(
        self,
        image: int = 32,
        patch: int = 8,
        layers: int = 2,
        rest: int | None = None,
        head: int = 8,
        mrope: list[int] | None = None,
        lists: bool = True,
    ) -> None:
        self.image, self.patch, self.layers, self.rest = image, patch, layers, rest
        self.head, self.mrope, self.lists = head, mrope, lists
        self.ids: dict[int, int] = {}

    def shrink(self, config: dict[str, Any], depth_of_parent: int = 0) -> dict[str, Any]:
        """Return a small copy of `config`."""
        if not all(isinstance(key, str) for key in config):
            return config
        chosen, count = chosen_layers(config, self.layers)
        heads = next(
            (v for k, v in config.items() if re.fullmatch(r"num_attention_heads|n_heads?|num_heads", k)), None
        )
        small: dict[str, Any] = {"mrope_section": self.mrope} if self.mrope and "rope_type" in config else {}
        for key, value in config.items():
            if value is None and key in UNSET:
                small[key] = UNSET[key]
            elif isinstance(value, bool) or value is None or key in ("id2label", "label2id"):
                small[key] = value
            elif key == "per_layer_config":
                small[key] = {chosen.index(int(k)): self.shrink(v) for k, v in value.items() if int(k) in chosen}
            elif key == "out_indices":
                stages = next((len(v) for k, v in config.items() if k in STAGES and isinstance(v, list)), len(chosen))
                small[key] = sorted({min(v, stages) for v in value})
            elif key == "out_features":
                small[key] = None
            elif key == "stage_names":
                continue
            elif isinstance(value, dict):
                small[key] = self.shrink(value)
            elif isinstance(value, int):
                small[key] = self._number(key, value, chosen, heads)
            elif isinstance(value, (list, tuple)):
                small[key] = self._list(key, list(value), chosen, count)
            else:
                small[key] = value
        return small

    def _number(self, key: str, value: int, chosen: list[int], heads: Any) -> int:
        if re.fullmatch(r".*(token_id|token_index|_idx|_token)|.*(bos|eos|pad|sep|cls)_id", key):
            return self._id(value)
        if value <= 0:
            return value
        if re.fullmatch(r".*image_size|input_size|img_size|resolution", key):
            return min(value, self.image)
        if re.fullmatch(r"patch_size", key):
            return min(value, self.patch)
        for words, new in SIZES_COMPILED:
            if not words.fullmatch(key):
                continue
            if new is None:
                return value
            if new == "kv":
                return min(value, 4 if value == heads else 2)
            if new == 8 and "head" in key:
                return min(value, self.head)
            if new == "layers":
                return min(value, len(chosen))
            return int(new(value)) if callable(new) else min(value, new)
        return min(value, self.rest) if self.rest and value > self.rest else value

    def _list(self, key: str, values: list[Any], chosen: list[int], count: int) -> Any:
        if values and len(values) == count and count > len(chosen):
            return [values[i] for i in chosen]
        if not values or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            return [self.shrink(v) if isinstance(v, dict) else v for v in values]
        if re.fullmatch(r".*token_ids?|.*suppress_tokens", key):
            return [self._id(v) for v in values]
        if re.fullmatch(r"(?!.*(num|depth|block_)).*(indexes|indices|_layers|layer_ids?|layers_idx|_blocks)", key):
            return sorted({v % len(chosen) for v in values})
        if re.fullmatch(r".*image_size|input_size|img_size", key):
            return [min(v, self.image) for v in values]
        for words, new in LISTS_COMPILED:
            if words.fullmatch(key):
                if new is None or not self.lists:
                    return values
                if new == "growing":
                    return [16 if i < len(values) / 2 else 32 for i in range(len(values))]
                return new(values)
        return values

    def _id(self, value: int) -> int:
        if 0 <= value < PLAIN_TOKENS.start or value < 0:
            return value
        return self.ids.setdefault(value, SPECIAL[len(self.ids) % len(SPECIAL)])


def chosen_layers(config: dict[str, Any], least: int) -> tuple[list[int], int]:
    """Return which layers stay, so that each kind of layer occurs, and the number of layers of `config`."""
    counts = [
        v
        for k, v in config.items()
        if re.fullmatch(r"num_hidden_layers|n_layers?|num_layers", k) and isinstance(v, int)
    ]
    count = max(counts, default=0)
    kinds = [v for v in config.values() if isinstance(v, (list, tuple)) and count > 1 and len(v) == count]
    chosen: list[int] = []
    for values in kinds:
        for index, value in enumerate(values):
            new = value not in [values[i] for i in chosen]
            if new and len(chosen) < 4 and not isinstance(value, (dict, float)):
                chosen.append(index)
    index = 0
    least = max(least, len(config.get("out_indices") or ()))
    while len(chosen) < least:
        chosen += [index] if index not in chosen else []
        index += 1
    return sorted(chosen), count
