"""What the patterns of ``tiny_config.py`` and ``tiny_inputs.py`` do not fit, by class or by ``model_type``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiny_config import IMAGE, MELS, TOKENS
from transformers import ResNetConfig

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_PERIODS = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
_RESNET = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_kwargs": None,
    "backbone_config": ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    ),
}
_FOUR = {"num_hidden_layers": 4}

CONFIGS: dict[str, dict[str, Any]] = {
    # Hybrids of attention and state spaces: two layers with one of each.
    "jamba": _PERIODS,
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"mamba_headdim": 8, "n_mamba_heads": 8, "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3]},
    "xlstm": {"qk_dim_factor": 0.5, "v_dim_factor": 1.0},
    # Positions in three parts.
    **{
        kind: {f"{inner}rope_parameters": _MROPE}
        for kind, inner in [
            ("qwen2_vl", "text_config."),
            ("qwen2_5_vl", "text_config."),
            ("qwen2_vl_text", ""),
            ("qwen2_5_vl_text", ""),
            ("qwen2_5_omni_thinker", "text_config."),
            ("glm4v", "text_config."),
            ("glm46v", "text_config."),
            ("glm_ocr", "text_config."),
            ("glm_image", "text_config."),
            ("glm4v_text", ""),
            ("glm_ocr_text", ""),
            ("glm_image_text", ""),
        ]
    },
    "glm4v_moe": {"text_config.rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0]}},
    "glm4v_moe_text": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0]}},
    # Keys and values without groups, and other sizes that must agree.
    "dots1": {"n_shared_experts": 1, "topk_group": 1, "n_group": 1, "num_experts_per_tok": 2},
    "esmc": {"num_key_value_heads": 4},
    "glm5_next": {"text_config.num_key_value_heads": 4},
    "glm5_next_text": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n": {"text_config.activation_sparsity_pattern": [0.95, 0.0]},
    "gemma3n_text": {"activation_sparsity_pattern": [0.95, 0.0]},
    "granite_speech5_ctc": {"encoder_config.context_size": 16},
    "granite_speech5_encoder": {"context_size": 16},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [4, 4],
        "attn_layers": ["local", "lsh"],
    },
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "wav2vec2-bert": {"feature_projection_input_dim": MELS, "vocab_size": TOKENS},
    "seamless_m4t": {"feature_projection_input_dim": MELS},
    "seamless_m4t_v2": {"feature_projection_input_dim": MELS},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "input_size": IMAGE},
    "lilt": {"hidden_size": 24},
    "bros": {"dim_bbox_projection": 8},
    "cvt": {"num_heads": [1, 1, 1], "depth": [1, 1, 2], "cls_token": [False, False, True]},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
    "bit": {"num_groups": 8},
    "dpt": {
        **_FOUR,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 16, 16],
        "readout_type": "project",
    },
    "zoedepth": {"backbone_config.num_hidden_layers": 4, "backbone_config.out_indices": [1, 2, 3, 4]},
    "depth_anything": {"backbone_config.num_hidden_layers": 4, "backbone_config.out_indices": [1, 2, 3, 4]},
    "prompt_depth_anything": {"backbone_config.num_hidden_layers": 4, "backbone_config.out_indices": [1, 2, 3, 4]},
    "tipsv2_dpt": {"backbone_config.num_hidden_layers": 4, "backbone_config.out_indices": [1, 2, 3, 4]},
    "chmv2": {"backbone_config.num_hidden_layers": 4, "backbone_config.out_indices": [1, 2, 3, 4]},
    "beit": {**_FOUR, "out_indices": [1, 2, 3, 4]},
    "data2vec-vision": {**_FOUR, "out_indices": [1, 2, 3, 4]},
    "bridgetower": {"hidden_size": 64, "text_config.hidden_size": 64, "vision_config.hidden_size": 64},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "mimi": {"upsample_groups": 32},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "chameleon": {
        "vocabulary_map": {"<image>": 5, **{f"IMGIMG{chr(65 + number)}Z": 40 + number for number in range(8)}}
    },
    "emu3": {"vocabulary_map": {"<image>": 5, **{f"<|visual token {number:06}|>": 40 + number for number in range(8)}}},
    "qwen3_omni_moe": {"talker_config.text_config.shared_expert_intermediate_size": 64},
    # Backbones that would come from timm.
    **dict.fromkeys(("detr", "conditional_detr", "dab-detr", "deformable_detr", "table-transformer"), _RESNET),
}
INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {}
