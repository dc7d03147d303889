"""Models of timm and transformers as the zoo measures them: exact, shrunk, trainable.

The zoo (``benchmarks/zoo.py``) is the oracle: it multiplies the masks into a copy,
without the library, and compares on another input and batch size.
"""

from __future__ import annotations

import pytest
import torch
import zoo
import zoo_models
import zoo_table

from compress import L1FilterPruner

# The largest share of the parameters that may be left where half of the filters of each layer are
# masked, every layer by itself, and with coupled layers together.
TIMM = {
    "timm/convnext": (0.6, 0.3),
    "timm/vision_transformer": (0.7, 0.3),
    "timm/mobilenetv3": (0.5, 0.45),
    "timm/levit": (0.75, 0.4),
    "timm/edgenext": (0.7, 0.45),
    "timm/mobilevit": (0.55, 0.35),
    "timm/nfnet": (0.8, 0.8),
    "timm/eva": (0.55, 0.7),
    "timm/mlp_mixer": (0.6, 0.6),
    "timm/cait": (0.75, 0.3),
    "timm/ghostnet": (0.5, 0.4),
    "timm/pvt_v2": (0.7, 0.55),
}
TRANSFORMERS = {
    "hf/bert": (0.8, 0.6),
    "hf/deberta_v2": (0.8, 0.8),
    "hf/gpt2": (0.75, 0.6),
    "hf/llama": (0.6, 0.6),
    "hf/gemma2": (0.6, 0.6),
    "hf/t5": (0.8, 0.55),
    "hf/whisper": (0.8, 0.55),
    "hf/vit": (0.8, 0.3),
    "hf/swin": (0.7, 0.3),
    "hf/segformer": (0.75, 0.3),
    "hf/clip": (0.8, 0.6),
    "hf/wav2vec2": (0.8, 0.6),
    "hf/mamba": (0.995, 0.99),
}
MODELS = TIMM | TRANSFORMERS


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_a_library_is_exact_shrinks_and_trains(name, capsys):
    pytest.importorskip("timm" if name in TIMM else "transformers")
    torch.manual_seed(0)
    run = zoo.Run(name, zoo_models.zoo().builders[name]())
    run.prepare()
    for mode, bound in zip(("normal", "dependency_aware"), MODELS[name], strict=True):
        run.shrink(mode)
        found = run.record[mode]
        assert zoo_table.exact(found), (found["error"], found.get("error64"))
        assert "refused" not in found
        assert found["blind"] is None
        assert found["trains"] is True
        assert found["left"] <= bound


def test_why_a_conv1d_of_gpt2_stays_is_said():
    """Its weight is (in, out): what it is coupled with is told by its outputs."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8, use_cache=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.arange(3, 9)[None]
    pruner = L1FilterPruner(
        model, [{"sparsity": 0.5, "op_names": ["transformer.h.0.mlp.c_proj"]}],
        mode="dependency_aware", dummy_input={"input_ids": ids},
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"c_proj.*coupled with 'transformer.wte'"):
        pruner.calc_masks()
