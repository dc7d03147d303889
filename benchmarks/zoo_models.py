"""The models of the zoo: how each is built at a size for one core, what it takes, where it ends.

Weights are always random. timm: one model of each of its modules; transformers: small configs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

Inputs = Callable[[int], Any]


@dataclass(frozen=True)
class Entry:
    """A model in eval mode.

    ``inputs(n)`` is what it takes for a batch of n: a tensor, a tuple of arguments or a dict of
    keyword arguments; ``train_inputs`` is that for train mode, where it differs. ``heads`` is a
    regular expression of the layers that make the outputs, besides the last layer that runs.
    """

    model: nn.Module
    inputs: Inputs
    heads: str = ""
    train_inputs: Inputs | None = None


@dataclass(frozen=True)
class Zoo:
    """Builders by name, in the order in which they run; ``heavy`` ones only run when named."""

    builders: dict[str, Callable[[], Entry]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    heavy: set[str] = field(default_factory=set)

    def add(self, group: str, name: str, build: Callable[[], Entry], heavy: bool = False) -> None:
        self.builders[name], self.groups[name] = build, group
        if heavy:
            self.heavy.add(name)


def pictures(*shape: int) -> Inputs:
    return lambda batch: torch.randn(batch, *shape)


# -- torchvision ---------------------------------------------------------------------------

FAMILIES = """
alexnet vgg11 vgg11_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 squeezenet1_1 densenet121
googlenet inception_v3 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5
shufflenet_v2_x0_5 efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny
vit_b_32 swin_t swin_v2_t maxvit_t
"""
SEGMENTATION = """
fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large
"""
VIDEO = "r3d_18 mc3_18 r2plus1d_18 s3d mvit_v1_b mvit_v2_s swin3d_t"
FLOW = "raft_small raft_large"
DETECTION = """
fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fasterrcnn_mobilenet_v3_large_320_fpn
maskrcnn_resnet50_fpn keypointrcnn_resnet50_fpn retinanet_resnet50_fpn fcos_resnet50_fpn
ssd300_vgg16 ssdlite320_mobilenet_v3_large
"""
VARIANTS = """
vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn resnet34 resnet101 resnet152 resnext101_32x8d
resnext101_64x4d wide_resnet101_2 squeezenet1_0 densenet161 densenet169 densenet201 mnasnet0_75
mnasnet1_0 mnasnet1_3 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 efficientnet_b1
efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_v2_m regnet_x_800mf
regnet_x_1_6gf regnet_x_3_2gf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf convnext_small vit_b_16
swin_s swin_v2_s fcn_resnet101 deeplabv3_resnet101 swin3d_s fasterrcnn_mobilenet_v3_large_fpn
maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn_v2
"""
HEAVY = """
efficientnet_b6 efficientnet_b7 efficientnet_v2_l regnet_x_8gf regnet_x_16gf regnet_x_32gf
regnet_y_8gf regnet_y_16gf regnet_y_32gf regnet_y_128gf convnext_base convnext_large vit_l_16
vit_l_32 vit_h_14 swin_b swin_v2_b swin3d_b
"""
SIZES = {"inception_v3": 299, "alexnet": 127, "vit_h_14": 518}
FULL_SIZE = ("vit", "swin_v", "maxvit", "swin_t", "swin_s", "swin_b")


def torchvision_model(name: str) -> Entry:
    import torchvision

    classes = {"num_classes": 21} if name.startswith(("ssd", "fcos", "retina", "faster")) else {}
    options: dict[str, Any] = {"weights": None, **classes}
    if name in (SEGMENTATION + DETECTION + VARIANTS).split() and "_" in name:
        options |= _backbone_option(name)
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if _detects(name):
        options |= _few_but_some(name)
    if name.startswith("mvit"):
        return Entry(small_mvit(name), pictures(3, 8, 64, 64))
    model = torchvision.models.get_model(name, **options)
    if name in VIDEO.split() or name.startswith("swin3d"):
        frames, size = (14, 224) if name == "s3d" else (8, 64)
        return Entry(model, pictures(3, frames, size, size))
    if name in FLOW.split():
        return Entry(model, _flow)
    if _detects(name):
        return _detector(name, model)
    size = SIZES.get(name, 224 if name.startswith(FULL_SIZE) else 96)
    return Entry(model, pictures(3, size, size), heads=r"aux\w*\.(fc2?|4)$|^classifier\.(low|high)")


def _backbone_option(name: str) -> dict[str, Any]:
    segments = name.startswith(("fcn_", "deeplab", "lraspp"))
    return {"weights_backbone": None} if segments or _detects(name) else {}


def small_mvit(name: str) -> nn.Module:
    """The builders fix the size of the film, which the position tables have in them."""
    from torchvision.models.video import mvit

    make = mvit._mvit
    with mock.patch.object(mvit, "_mvit", lambda **o: make(**o | FILM)):
        model: nn.Module = getattr(mvit, name)(weights=None)
        return model


FILM = {"spatial_size": (64, 64), "temporal_size": 8}


def _few_but_some(name: str) -> dict[str, Any]:
    """Detections whatever the scores: with random weights there would be none to compare."""
    if "rcnn" in name:
        proposals = {"box_batch_size_per_image": 20, "rpn_batch_size_per_image": 20}
        for when in ("train", "test"):
            proposals |= {f"rpn_post_nms_top_n_{when}": 40, f"rpn_pre_nms_top_n_{when}": 80}
        return {"box_score_thresh": 0.0, "box_detections_per_img": 20, **proposals}
    return {"score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 40}


def _detects(name: str) -> bool:
    starts = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos", "ssd")
    return name.startswith(starts)


def _flow(batch: int) -> tuple[Tensor, Tensor, int]:
    return torch.randn(batch, 3, 128, 128), torch.randn(batch, 3, 128, 128), 3


def _detector(name: str, model: nn.Module) -> Entry:
    size = 300 if name.startswith("ssd") else 128
    # Their transform scales every picture to 800 pixels: that would take minutes.
    if hasattr(model, "transform") and not name.startswith("ssd"):
        transform: Any = model.transform
        transform.min_size, transform.max_size = (size,), size

    def inputs(batch: int) -> tuple[list[Tensor]]:
        return ([torch.rand(3, size, size) for _ in range(batch)],)

    def train_inputs(batch: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        box = torch.tensor([[10.0, 12.0, 80.0, 90.0]])
        target = {"boxes": box, "labels": torch.ones(1, dtype=torch.long)}
        target["masks"] = torch.ones(1, size, size, dtype=torch.uint8)
        target["keypoints"] = torch.full((1, 17, 3), 30.0)
        return inputs(batch)[0], [dict(target) for _ in range(batch)]

    heads = (
        r"cls_logits|bbox_pred|cls_score|mask_fcn_logits|kps_score_lowres|bbox_reg|bbox_ctrness"
        r"|head\.(classification|regression)_head\.module_list\.\d+(\.1)?$"
    )
    return Entry(model, inputs, heads, train_inputs)


# -- timm ----------------------------------------------------------------------------------

# Per module a small model. After a colon: the picture's size, then options for timm.create_model.
TIMM: dict[str, tuple[str, int, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", 224, {"depth": 3}),
    "byoanet": ("halonet_h1", 256, {}),
    "byobnet": ("mobileone_s1", 96, {}),
    "cait": ("cait_xxs24_224", 224, {"depth": 6}),
    "coat": ("coat_tiny", 224, {}),
    "convit": ("convit_tiny", 224, {}),
    "convmixer": ("convmixer_768_32", 96, {}),
    "convnext": ("convnext_atto", 96, {}),
    "cpubone": ("cpubone_nano", 128, {}),
    "crossvit": ("crossvit_tiny_240", 240, {}),
    "csatv2": ("csatv2", 256, {}),
    "cspnet": ("cs3darknet_focus_s", 96, {}),
    "cspnext": ("cspnext_tiny", 96, {}),
    "davit": ("davit_tiny", 128, {}),
    "deepseek_vit": ("deepseek_vit_412m", 224, {"depth": 2}),
    "deit": ("deit_tiny_distilled_patch16_224", 224, {}),
    "densenet": ("densenetblur121d", 96, {}),
    "dla": ("dla46_c", 96, {}),
    "dpn": ("dpn48b", 96, {}),
    "edgenext": ("edgenext_xx_small", 128, {}),
    "efficientformer": ("efficientformer_l1", 224, {}),
    "efficientformer_v2": ("efficientformerv2_s0", 224, {}),
    "efficientnet": ("efficientnet_lite0", 96, {}),
    "efficientvim": ("efficientvim_m1", 128, {}),
    "efficientvit_mit": ("efficientvit_b0", 96, {}),
    "efficientvit_msra": ("efficientvit_m0", 224, {}),
    "eva": ("eva02_tiny_patch14_224", 224, {}),
    "fasternet": ("fasternet_t0", 96, {}),
    "fastvit": ("fastvit_t8", 128, {}),
    "focalnet": ("focalnet_tiny_srf", 128, {}),
    "gcvit": ("gcvit_xxtiny", 224, {}),
    "gemma4_vit": ("gemma4_vit_167m", 192, {"depth": 2}),
    "ghostnet": ("ghostnet_050", 96, {}),
    "hardcorenas": ("hardcorenas_a", 96, {}),
    "hgnet": ("hgnetv2_b0", 96, {}),
    "hiera": ("hiera_tiny_224", 224, {}),
    "hieradet_sam2": ("hieradet_small", 128, {}),
    "hrnet": ("hrnet_w18_small", 96, {}),
    "iformer": ("iformer_t", 128, {}),
    "inception_next": ("inception_next_atto", 96, {}),
    "inception_resnet_v2": ("inception_resnet_v2", 128, {}),
    "inception_v3": ("inception_v3", 128, {}),
    "inception_v4": ("inception_v4", 128, {}),
    "lcnetv2": ("lcnetv2_small", 96, {}),
    "levit": ("levit_128s", 224, {}),
    "lowformer": ("lowformer_b0", 128, {}),
    "mambaout": ("mambaout_femto", 96, {}),
    "maxxvit": ("maxvit_pico_rw_256", 256, {}),
    "metaformer": ("poolformer_s12", 96, {}),
    "mlp_mixer": ("mixer_s32_224", 224, {}),
    "mobilenetv3": ("mobilenetv3_small_050", 96, {}),
    "mobilenetv5": ("mobilenetv5_base", 128, {}),
    "mobilevit": ("mobilevit_xxs", 128, {}),
    "mvitv2": ("mvitv2_tiny", 224, {}),
    "naflexvit": ("naflexvit_base_patch16_gap", 224, {"depth": 3}),
    "nasnet": ("nasnetalarge", 128, {}),
    "nest": ("nest_tiny", 224, {}),
    "nextvit": ("nextvit_small", 128, {}),
    "nfnet": ("nf_regnet_b0", 96, {}),
    "pit": ("pit_ti_224", 224, {}),
    "pnasnet": ("pnasnet5large", 128, {}),
    "pvt_v2": ("pvt_v2_b0", 128, {}),
    "qwen3_vit": ("qwen3_vit_88m", 224, {"depth": 2}),
    "rdnet": ("rdnet_tiny", 96, {}),
    "regnet": ("regnety_002", 96, {}),
    "repghost": ("repghostnet_050", 96, {}),
    "repvit": ("repvit_m0_9", 96, {}),
    "res2net": ("res2net50_26w_4s", 96, {}),
    "resnest": ("resnest14d", 96, {}),
    "resnet": ("resnet26t", 96, {}),
    "resnetv2": ("resnetv2_50", 96, {}),
    "rexnet": ("rexnet_100", 96, {}),
    "selecsls": ("selecsls42", 96, {}),
    "senet": ("legacy_seresnet18", 96, {}),
    "sequencer": ("sequencer2d_s", 224, {}),
    "shvit": ("shvit_s1", 128, {}),
    "sknet": ("skresnet18", 96, {}),
    "starnet": ("starnet_s1", 96, {}),
    "swiftformer": ("swiftformer_xs", 128, {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 224, {}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 256, {}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_ns_224", 224, {}),
    "tiny_vit": ("tiny_vit_5m_224", 224, {}),
    "tnt": ("tnt_s_legacy_patch16_224", 224, {}),
    "tresnet": ("tresnet_m", 96, {}),
    "twins": ("twins_pcpvt_small", 224, {}),
    "vgg": ("vgg11_bn", 96, {}),
    "visformer": ("visformer_tiny", 224, {}),
    "vision_transformer": ("vit_tiny_patch16_224", 224, {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 224, {}),
    "vision_transformer_relpos": ("vit_relpos_small_patch16_224", 224, {}),
    "vision_transformer_sam": ("samvit_base_patch16", 224, {"depth": 4, "img_size": 224}),
    "vitamin": ("vitamin_small_224", 224, {}),
    "volo": ("volo_d1_224", 224, {}),
    "vovnet": ("ese_vovnet19b_slim", 96, {}),
    "xception": ("legacy_xception", 128, {}),
    "xception_aligned": ("xception41", 96, {}),
    "xcit": ("xcit_nano_12_p16_224", 224, {}),
}


def timm_model(module: str) -> Entry:
    import timm

    name, size, options = TIMM[module]
    return Entry(timm.create_model(name, pretrained=False, **options), pictures(3, size, size))


# -- transformers --------------------------------------------------------------------------

WORDS = 120
COMMON = {"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = COMMON | {"intermediate_size": 128, "max_position_embeddings": 64}
GROUPED = WIDE | {"num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0}


def tokens(batch: int) -> dict[str, Tensor]:
    ids = torch.randint(5, WORDS, (batch, 12))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def spoken(batch: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, 2000)}


def seq2seq(batch: int) -> dict[str, Tensor]:
    return tokens(batch) | {"decoder_input_ids": torch.randint(5, WORDS, (batch, 7))}


def heard(batch: int) -> dict[str, Tensor]:
    features = torch.randn(batch, 16, 40)
    return {"input_features": features, "decoder_input_ids": torch.randint(5, WORDS, (batch, 7))}


def both(batch: int) -> dict[str, Tensor]:
    return tokens(batch) | {"pixel_values": torch.randn(batch, 3, 32, 32)}


def seen(size: int) -> Inputs:
    return lambda batch: {"pixel_values": torch.randn(batch, 3, size, size)}


VIT = {k: v for k, v in WIDE.items() if k not in ("vocab_size", "max_position_embeddings")}

# name: (class of the model, class of the config, options of the config, inputs, heads)
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], Inputs, str]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", WIDE, tokens, ""),
    "bert_mlm": ("BertForMaskedLM", "BertConfig", WIDE, tokens, ""),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", WIDE, tokens, ""),
    "distilbert": (
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": WORDS, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
        tokens, "",
    ),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        WIDE | {"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
                "pos_att_type": ["p2c", "c2p"], "share_att_key": True}, tokens, "",
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": WORDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
         "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, tokens, "",
    ),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        COMMON | {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64,
                  "use_cache": False}, tokens, "",
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, tokens, ""),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED, tokens, ""),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 16}, tokens, ""),
    "mistral": (
        "MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 8}, tokens, "",
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED, tokens, ""),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED | {"head_dim": 16}, tokens, ""),
    "mixtral": (
        "MixtralForCausalLM", "MixtralConfig", GROUPED | {"num_local_experts": 4}, tokens, "",
    ),
    "mamba": (
        "MambaForCausalLM", "MambaConfig",
        {"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "use_cache": False},
        lambda batch: {"input_ids": tokens(batch)["input_ids"]}, "",
    ),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": WORDS, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2,
         "num_heads": 4, "use_cache": False, "decoder_start_token_id": 0}, seq2seq, "",
    ),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        {"vocab_size": WORDS, "num_mel_bins": 16, "d_model": 64, "encoder_layers": 2,
         "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_source_positions": 20,
         "max_target_positions": 32, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "decoder_start_token_id": 3, "suppress_tokens": [],
         "begin_suppress_tokens": []}, heard, "",
    ),
    "vit": (
        "ViTForImageClassification", "ViTConfig", VIT | {"image_size": 32, "patch_size": 8},
        seen(32), "",
    ),
    "swin": (
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2],
         "num_heads": [2, 4], "window_size": 4}, seen(32), "",
    ),
    "convnext": (
        "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}, seen(64), "",
    ),
    "segformer": (
        "SegformerForSemanticSegmentation", "SegformerConfig",
        {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32,
         "num_labels": 5}, seen(64), "",
    ),
    "clip": (
        "CLIPModel", "CLIPConfig",
        {"text_config": WIDE | {"eos_token_id": 2}, "projection_dim": 32,
         "vision_config": VIT | {"image_size": 32, "patch_size": 8}}, both,
        "text_projection|visual_projection",
    ),
    "detr": (
        "DetrForObjectDetection", "DetrConfig",
        {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
         "num_queries": 6, "num_labels": 5}, seen(96), "class_labels_classifier|bbox_predictor",
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC", "Wav2Vec2Config",
        WIDE | {"conv_dim": [32, 32, 32], "conv_stride": [5, 4, 4], "conv_kernel": [10, 8, 4],
                "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}, spoken, "",
    ),
}  # fmt: skip
# As their authors published them: the above have two layers, so that a zoo is done in minutes.
PUBLISHED: dict[str, tuple[str, str, dict[str, Any], Inputs, str]] = {
    "bert_base": ("BertForSequenceClassification", "BertConfig", {}, tokens, ""),
    "roberta_base": ("RobertaForMaskedLM", "RobertaConfig", {}, tokens, ""),
    "distilbert_base": (
        "DistilBertForSequenceClassification", "DistilBertConfig", {}, tokens, "",
    ),
    "opt_125m": (
        "OPTForCausalLM", "OPTConfig",
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072,
         "word_embed_proj_dim": 768, "use_cache": False}, tokens, "",
    ),
    "vit_base": ("ViTForImageClassification", "ViTConfig", {}, seen(224), ""),
    "wav2vec2_base": (
        "Wav2Vec2ForCTC", "Wav2Vec2Config", {},
        lambda batch: {"input_values": torch.randn(batch, 8000)}, "",
    ),
}  # fmt: skip
# The same models with the attention written out in the model's own code.
EAGER = ("bert", "gpt2", "llama", "t5", "vit", "whisper")


def transformers_model(name: str, attention: str | None = None) -> Entry:
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model, config, options, inputs, heads = (TRANSFORMERS | PUBLISHED)[name]
    made = getattr(transformers, config)(**options)
    if attention is not None:
        made._attn_implementation = attention
    return Entry(getattr(transformers, model)(made), inputs, heads)


# -- all of them ---------------------------------------------------------------------------


def zoo() -> Zoo:
    """All models. A timm model goes by ``timm/module``, one of transformers by ``hf/name``."""
    found = Zoo()
    names = (FAMILIES + SEGMENTATION + VIDEO + " " + FLOW + DETECTION + VARIANTS).split()
    for name in names + HEAVY.split():
        heavy = name in HEAVY.split()
        found.add("torchvision", name, partial(torchvision_model, name), heavy)
    for module in TIMM:
        found.add("timm", f"timm/{module}", partial(timm_model, module))
    for name in TRANSFORMERS:
        found.add("transformers", f"hf/{name}", partial(transformers_model, name))
    for name in EAGER:
        found.add("transformers", f"hf/{name}_eager", partial(transformers_model, name, "eager"))
    for name in PUBLISHED:
        found.add("transformers of full size", f"hf/{name}", partial(transformers_model, name))
    return found
