"""A model's config.json, written and read back; what no config.json can say."""

import dataclasses
import json
from pathlib import Path

import pytest

import cases
from dsjax import config, hf
from dsjax.hf.config import Quantization, quantization
from dsjax.run_file import load

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
R1 = ROOT.parent / "shared" / "checkpoints" / "deepseek_r1.config.json"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_ours_reads_back(path: Path):
    model = load(path).model
    written = json.loads(json.dumps(hf.hf_config(model)))
    read = hf.model_config(written)
    # Which layers share a compiled body is no part of a config.json, nor (`initializer_range` is
    # idle) how weights were drawn.
    same = {"layers": model.layers, "initializer_std": model.initializer_std}
    assert read.blocks == model.blocks and dataclasses.replace(read, **same) == model
    is_v2 = "v2" in path.stem
    assert written["model_type"] == ("deepseek_v2" if is_v2 else "deepseek_v3")
    assert written["architectures"] == [f"DeepseekV{2 if is_v2 else 3}ForCausalLM"]


@pytest.mark.parametrize("name", cases.CASES)
def test_every_case_reads_back(name: str):
    model = hf.model_config(cases.CASES[name])
    written = hf.hf_config(model)
    read = hf.model_config(written)
    assert read == model
    # And says what the published one says, field by field, where both say something.
    published = cases.CASES[name] | {"model_type": written["model_type"]}
    both = written.keys() & published.keys() - {"rope_scaling", "torch_dtype"}
    idle = {"initializer_range", "use_cache"}
    if name.startswith("v2") and published["topk_method"] == "greedy":
        idle |= {"n_group", "topk_group"}
    assert {k: written[k] for k in both - idle} == {k: published[k] for k in both - idle}


def test_r1_s_own_fields_come_back():
    if not R1.exists():
        pytest.skip(f"the published {R1.name} is not beside this project")
    published = json.loads(R1.read_text())
    written = hf.hf_config(hf.model_config(published), quantization=quantization(published))
    del written["initializer_range"]
    assert {name: published[name] for name in written} == written
    unsaid = published.keys() - written.keys()
    assert unsaid == {
        *("aux_loss_alpha", "auto_map", "bos_token_id", "eos_token_id", "ep_size"),
        *("initializer_range", "pretraining_tp", "seq_aux", "transformers_version"),
    }


def test_how_scales_are_is_said_and_read():
    for ue8m0 in (False, True):
        model = hf.model_config(cases.CASES["v3"])
        written = hf.hf_config(model, quantization=Quantization(ue8m0=ue8m0))
        assert quantization(written) == Quantization(ue8m0=ue8m0)
        assert hf.model_config(written) == model
    assert quantization(cases.CASES["v3"]) is None
    by_hand = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert quantization(by_hand | {"fmt": "e4m3"}) == Quantization(ue8m0=False)


def of(*pattern: config.Block) -> config.LayerGroup:
    return config.LayerGroup(repeat=1, pattern=pattern)


def changed(model: config.Model, **fields: object) -> config.Model:
    return dataclasses.replace(model, **fields)


@pytest.mark.parametrize("what", ["order", "two attentions", "eps", "mtp", "routers"])
def test_what_no_config_json_can_say_is_refused(what: str):
    model = hf.model_config(cases.CASES["v3"])
    dense, moe = model.layers[0].pattern[0], model.layers[1].pattern[0]
    narrow = dataclasses.replace(dense.attention, kv_lora_rank=9)
    scaled = dataclasses.replace(moe.ffn, router=dataclasses.replace(moe.ffn.router, scale=9.0))
    odd_attention = dataclasses.replace(dense, attention=narrow)
    odd_router = dataclasses.replace(moe, ffn=scaled)
    strange = {
        "order": {"layers": model.layers[::-1]},
        "two attentions": {"layers": (of(odd_attention), *model.layers)},
        "eps": {"rms_norm_eps": 1e-5},
        "mtp": {"mtp": (dense,)},
        "routers": {"layers": (*model.layers, of(odd_router))},
    }
    with pytest.raises(ValueError, match=r"config\.json"):
        hf.hf_config(changed(model, **strange[what]))


def test_layers_grouped_otherwise_are_the_same_model():
    model = hf.model_config(cases.CASES["v3"])
    dense, moe = model.layers[0].pattern[0], model.layers[1].pattern[0]
    apart = changed(model, layers=(of(dense, dense), of(moe), of(moe)))
    assert hf.model_config(hf.hf_config(apart)) == model
