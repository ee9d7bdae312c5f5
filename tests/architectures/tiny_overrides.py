"""What the patterns of ``tiny_config.py`` and ``tiny_inputs.py`` do not fit, by class or by ``model_type``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_config import IMAGE, MELS, SPECIAL, TOKENS
from torch import Tensor
from transformers import ResNetConfig

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_PERIODS = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
_RESNET = {
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_kwargs": None,
    "backbone_config": ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 32, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    ),
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA3N = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    "intermediate_size": [64] * 4,
}
_MIMI = {"upsample_groups": 32, "codebook_dim": 32, "vector_quantization_hidden_dimension": 32}
_MIMI_INSIDE = {f"codec_config.{name}": value for name, value in _MIMI.items()}
_HIERA = {"embed_dim_per_stage": [32, 64, 64, 64], "blocks_per_stage": [1, 1, 1, 1], "global_attention_blocks": [2]}
_SAM2_VISION = {
    "backbone_channel_list": [64, 64, 64, 32],
    "backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]],
    **{f"backbone_config.{name}": value for name, value in _HIERA.items()},
}
_SWIN = {"patch_size": 2, "window_size": 2, "num_layers": 4}
_SAM = {
    "vision_config.output_channels": 32,
    "vision_config.num_pos_feats": 16,
    "prompt_encoder_config.image_embedding_size": 4,
    "mask_decoder_config.num_attention_heads": 4,
}
_SWIN_INSIDE = {
    "backbone_config.patch_size": 2,
    "backbone_config.window_size": 2,
    "backbone_config.num_layers": 4,
    "feature_size": 32,
    "mask_feature_size": 32,
    "fpn_feature_size": 32,
}
_FOUR = {"num_hidden_layers": 4}

TRAINING = ("reformer",)
"""Goes back in training mode alone."""

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
    "xlstm": {"qk_dim_factor": 0.5, "v_dim_factor": 1.0, "chunk_size": 12, "num_blocks": 2},
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
    "granite_speech5_ctc": {"encoder_config.context_size": 16},
    "granite_speech5_encoder": {"context_size": 16},
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
    "bros": {"dim_bbox_projection": 8},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "qwen4_exp": {"pad_token_id": 0},
    "clap": {
        "audio_config.num_mel_bins": 64,
        "audio_config.patch_size": 4,
        "audio_config.window_size": 2,
        "audio_config.spec_size": 64,
        "audio_config.patch_stride": [4, 4],
        "audio_config.depths": [1, 1],
        "audio_config.num_attention_heads": [2, 2],
        "audio_config.hidden_size": 64,
        "audio_config.patch_embeds_hidden_size": 32,
        "audio_config.enable_fusion": False,
    },
    "mobilevitv2": {"image_size": 64},
    "vision-text-dual-encoder": {},
    "cvt": {"num_heads": [1, 1, 1], "depth": [1, 2, 3], "cls_token": [False, False, True]},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
    "bit": {"num_groups": 8},
    "dpt": {
        **_FOUR,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 16, 16],
        "readout_type": "project",
    },
    "depth_anything": {"backbone_config.num_hidden_layers": 4, "backbone_config.out_indices": [1, 2, 3, 4]},
    "prompt_depth_anything": {"backbone_config.num_hidden_layers": 4, "backbone_config.out_indices": [1, 2, 3, 4]},
    "tipsv2_dpt": {"backbone_config.num_hidden_layers": 4, "backbone_config.out_indices": [1, 2, 3, 4]},
    "chmv2": {"backbone_config.num_hidden_layers": 4, "backbone_config.out_indices": [1, 2, 3, 4]},
    "beit": {**_FOUR, "out_indices": [1, 2, 3, 4]},
    "data2vec-vision": {**_FOUR, "out_indices": [1, 2, 3, 4]},
    "bridgetower": {"hidden_size": 64, "text_config.hidden_size": 64, "vision_config.hidden_size": 64},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "mimi": _MIMI,
    "mimi_decoder": _MIMI,
    "pocket_tts_audio_tokenizer": _MIMI,
    "pocket_tts_audio_tokenizer_decoder": _MIMI,
    "csm": _MIMI_INSIDE,
    "kyutai_speech_to_text": _MIMI_INSIDE,
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "chameleon": {
        "vocabulary_map": {"<image>": 5, **{f"IMGIMG{chr(65 + number)}Z": 40 + number for number in range(8)}}
    },
    "emu3": {"vocabulary_map": {"<image>": 5, **{f"<|visual token {number:06}|>": 40 + number for number in range(8)}}},
    "qwen3_omni_moe": {"talker_config.text_config.shared_expert_intermediate_size": 64},
    "bailing_hybrid": {"num_expert_group": 2, "topk_group": 1},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "donut-swin": _SWIN,
    "maskformer-swin": _SWIN,
    "nemotron3_diarization": {"chunk_right_context": 2},
    "nemotron3_5_transcribe_audio": {"chunk_right_context": 2},
    "nemo_speechlm": {"audio_config.chunk_right_context": 2, "encoder_config.chunk_right_context": 2},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "num_query_groups": 4,
        "kv_channels": 8,
    },
    "swin2sr": {"patch_size": 1, "window_size": 4, "image_size": 16},
    "lilt": {"num_attention_heads": 2, "hidden_size": 48},
    "T5ForSequenceClassification": {"decoder_start_token_id": 0},
    "MT5ForSequenceClassification": {"decoder_start_token_id": 0},
    "UMT5ForSequenceClassification": {"decoder_start_token_id": 0},
    "T5ForTokenClassification": {"decoder_start_token_id": 0},
    "ReformerForMaskedLM": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [4, 4],
        "attn_layers": ["local", "lsh"],
    },
    "ReformerForSequenceClassification": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [4, 4],
        "attn_layers": ["local", "lsh"],
    },
    "sam": _SAM,
    "sam2_hiera_det_model": _HIERA,
    "sam2_vision_model": _SAM2_VISION,
    "sam2": {f"vision_config.{name}": value for name, value in _SAM2_VISION.items()},
    "diffusion_gemma": {"text_config.top_k_experts": 2},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32, "embedding_size": 16},
    "perceiver": {"num_self_attention_heads": 1, "num_cross_attention_heads": 1},
    "lw_detr": {"backbone_config.image_size": 64, "backbone_config.patch_size": 4},
    "lw_detr_vit": {"image_size": 64, "patch_size": 4},
    "superpoint": {"keypoint_decoder_dim": 65},
    "lightglue": {"keypoint_detector_config.keypoint_decoder_dim": 65},
    "superglue": {"keypoint_detector_config.keypoint_decoder_dim": 65},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "molmo2": {"adapter_config.vision_feature_layer": [0, 1], "adapter_config.vit_layers": [0, 1]},
    "colqwen2": {"vlm_config.text_config.rope_parameters": _MROPE},
    "paddleocr_vl": {"text_config.rope_parameters": _MROPE},
    "vitmatte": {"backbone_config.patch_size": 16},
    "sam_hq": {**_SAM, "mask_decoder_config.vit_dim": 32},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "gemma3n_text": _GEMMA3N,
    "gemma3n": {f"text_config.{name}": value for name, value in _GEMMA3N.items()},
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 2},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0},
    "zoedepth": {"bottleneck_features": 32, "backbone_config.use_relative_position_bias": True},
    "textnet": {"stem_out_channels": 8, "hidden_sizes": [8, 8, 16, 16, 16]},
    "ernie4_5_vl_moe": {
        "text_config.moe_intermediate_size": [64, 64],
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_layer_map": None},
    "mask2former": _SWIN_INSIDE,
    "maskformer": {**_SWIN_INSIDE, "decoder_config.encoder_layers": 1},
    "oneformer": _SWIN_INSIDE,
    "siglip": {"text_config.projection_size": 32},
    "siglip2": {"text_config.projection_size": 32, "vision_config.num_patches": 16},
    "videoprism": {},
    "dinov3_vit": {},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "neomme": {"head_dim": 16},
    "mistral4": {"head_dim": 16},
    "step3p7": {"text_config.sliding_window": 8},
    "pp_lcnet_v4": {"stem_channels": [3, 8, 8], "stage_out_channels": [8, 8, 24, 48]},
    "align": {
        "vision_config.width_coefficient": 0.1,
        "vision_config.depth_coefficient": 0.1,
        "vision_config.hidden_dim": 128,
    },
    # Backbones that would come from timm.
    **dict.fromkeys(("detr", "conditional_detr", "dab-detr", "deformable_detr", "table-transformer"), _RESNET),
}
INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "MusicgenForCausalLM": lambda model: {"input_ids": _ids(2 * 4, 12)},
    "MusicgenMelodyForCausalLM": lambda model: {"input_ids": _ids(2 * 4, 12)},
    "MusicgenForConditionalGeneration": lambda model: {"input_ids": _ids(2, 12), "decoder_input_ids": _ids(2 * 4, 7)},
    "MusicgenMelodyForConditionalGeneration": lambda model: {
        "input_ids": _ids(2, 12),
        "decoder_input_ids": _ids(2 * 4, 7),
    },
    "oneformer": lambda model: {
        "pixel_values": torch.randn(2, 3, 64, 64),
        "task_inputs": _ids(2, model.config.task_seq_len),
    },
    "reformer": lambda model: {"input_ids": _ids(2, 16)},
    "rwkv": lambda model: {"input_ids": _ids(2, 12), "use_cache": False},
    "blip-2": lambda model: {"pixel_values": torch.randn(2, 3, IMAGE, IMAGE), "input_ids": _with_places(model, 8)},
    "instructblip": lambda model: {
        "pixel_values": torch.randn(2, 3, IMAGE, IMAGE),
        "qformer_input_ids": _ids(2, 6),
        "input_ids": _with_places(model, 8),
    },
    "instructblipvideo": lambda model: {
        "pixel_values": torch.randn(2, 4, 3, IMAGE, IMAGE),
        "qformer_input_ids": _ids(2, 6),
        "input_ids": _with_places(model, 32),
    },
    "kosmos-2": lambda model: {
        "pixel_values": torch.randn(2, 3, IMAGE, IMAGE),
        "input_ids": _ids(2, 80),
        "image_embeds_position_mask": torch.tensor(
            [[0] + [1] * model.config.latent_query_num + [0] * (79 - model.config.latent_query_num)] * 2
        ).bool(),
    },
    "idefics": lambda model: {
        "pixel_values": torch.randn(2, 1, 3, IMAGE, IMAGE),
        "input_ids": _ids(2, 12),
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
        "image_attention_mask": torch.ones(2, 12, 1, dtype=torch.long),
    },
    "lightglue": lambda model: {"pixel_values": torch.rand(1, 2, 3, 64, 64)},
    "superglue": lambda model: {"pixel_values": torch.rand(1, 2, 3, 64, 64)},
    "efficientloftr": lambda model: {"pixel_values": torch.rand(1, 2, 3, 64, 64)},
    "lxmert": lambda model: {
        "input_ids": _ids(2, 12),
        "visual_feats": torch.randn(2, 5, model.config.visual_feat_dim),
        "visual_pos": torch.rand(2, 5, model.config.visual_pos_dim),
    },
    "siglip2": lambda model: _siglip2(
        model, {"input_ids": _ids(2, 12)} if "ForImage" not in type(model).__name__ else {}
    ),
    "siglip2_vision_model": lambda model: _siglip2(model, {}),
    "DiaForConditionalGeneration": lambda model: {
        "input_ids": _ids(2, 12),
        "decoder_input_ids": torch.randint(20, 100, (2, 7, model.config.decoder_config.num_channels)),
    },
    "seggpt": lambda model: {
        "pixel_values": torch.randn(2, 3, IMAGE // 2, IMAGE),
        "prompt_pixel_values": torch.randn(2, 3, IMAGE // 2, IMAGE),
        "prompt_masks": torch.randn(2, 3, IMAGE // 2, IMAGE),
    },
    "blip_2_qformer": lambda model: {
        "query_embeds": torch.randn(2, 8, 32),
        "encoder_hidden_states": torch.randn(2, 5, model.config.encoder_hidden_size),
    },
    "decision_transformer": lambda model: {
        "states": torch.randn(2, 6, model.config.state_dim),
        "actions": torch.randn(2, 6, model.config.act_dim),
        "rewards": torch.randn(2, 6, 1),
        "returns_to_go": torch.randn(2, 6, 1),
        "timesteps": torch.arange(6).repeat(2, 1),
        "attention_mask": torch.ones(2, 6),
    },
    "gemma3n_audio": lambda model: {
        "audio_mel": torch.randn(2, 32, model.config.input_feat_size),
        "audio_mel_mask": torch.zeros(2, 32, dtype=torch.bool),
    },
    "gemma4_vision": lambda model: {
        "pixel_values": torch.rand(2, 16, 3 * model.config.patch_size**2),
        "pixel_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4)).repeat(2, 1, 1),
    },
    "clap": lambda model: {
        "input_ids": _ids(2, 12),
        "input_features": torch.randn(2, 1, 64, 16),
        "is_longer": torch.zeros(2, 1, dtype=torch.bool),
    },
    "SpeechT5ForTextToSpeech": lambda model: {
        "input_ids": _ids(2, 12),
        "decoder_input_values": torch.randn(2, 6, model.config.num_mel_bins),
    },
    "BlipForQuestionAnswering": lambda model: {
        "input_ids": _ids(2, 12),
        "pixel_values": torch.randn(2, 3, IMAGE, IMAGE),
        "decoder_input_ids": _ids(2, 7),
    },
    "speech-encoder-decoder": lambda model: {"inputs": 0.1 * torch.randn(2, 2400), "decoder_input_ids": _ids(2, 7)},
    "xcodec": lambda model: {"input_values": 0.1 * torch.randn(2, 1, 16000)},
    "videoprism": lambda model: {"pixel_values_videos": torch.randn(2, 4, 3, IMAGE, IMAGE), "input_ids": _ids(2, 12)},
    "pix2struct": lambda model: {
        "flattened_patches": torch.randn(2, 16, 2 + model.config.vision_config.patch_embed_hidden_size),
        "decoder_input_ids": _ids(2, 7),
    },
    "PerceiverForMaskedLM": lambda model: {"inputs": _ids(2, 12)},
    "PerceiverForSequenceClassification": lambda model: {"inputs": _ids(2, 12)},
    "perceiver": lambda model: {"inputs": torch.randn(2, 3, IMAGE, IMAGE)},
}


def _ids(rows: int, length: int) -> Tensor:
    return torch.randint(SPECIAL, TOKENS // 2, (rows, length))


def _with_places(model: Any, count: int) -> Tensor:
    """Text with ``count`` places for what an image becomes."""
    token = getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)
    if token is None:
        token = getattr(model.config, "video_token_index", None)
    if token is None:
        token = model.config.image_token_id = model.config.video_token_index = 5
    return torch.cat([torch.full((2, count), token), _ids(2, 8)], 1)


def _siglip2(model: Any, beside: dict[str, Any]) -> dict[str, Any]:
    config = getattr(model.config, "vision_config", model.config)
    return {
        "pixel_values": torch.randn(2, 16, 3 * config.patch_size**2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * 2),
        **beside,
    }
