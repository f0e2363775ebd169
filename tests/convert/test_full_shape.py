"""One layer of V3's experts with every true shape: 11.5 GB of file, of which little is there."""

import json
import os
import shutil
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore

import cases
import convert_weights
from dsjax.convert import importing
from tests.convert import published
from weights import tensor_shapes

# V3's own sizes; only vocabulary, layers and positions are few.
V3 = cases.CASES["v3"] | {
    "first_k_dense_replace": 0,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 1,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": published.FP8,
    "topk_group": 4,
    "v_head_dim": 128,
}
LAYER = "model.layers.0."
# Tensor, the array it is a part of, its first 256 published columns there: our first axis.
FILLED = [
    ("mlp.experts.200.up_proj", "ffn.experts.gate_up_proj", np.s_[0, 200, :256, 1]),
    ("mlp.experts.255.down_proj", "ffn.experts.down_proj", np.s_[0, 255, :256]),
    ("self_attn.kv_a_proj_with_mqa", "attention.kv_a_proj", np.s_[0, :256]),
    ("self_attn.o_proj", "attention.o_proj", np.s_[0, :2]),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sparse file: all scales are 1, the tensors of `FILLED` random, the rest holes."""
    fields, offset = {}, 0
    for name, shape in tensor_shapes(V3).items():
        quantized = not published.is_plain(name)
        kind, size = ("F8_E4M3", 1) if quantized else ("BF16", 2)
        kind, size = ("F32", 4) if name.endswith("bias") else (kind, size)
        parts = [(name, kind, size, shape)]
        if quantized:
            blocks = tuple(-(-n // 128) for n in shape)
            parts.append((name + "_scale_inv", "F32", 4, blocks))
        for part, its_kind, its_size, its_shape in parts:
            end = offset + its_size * int(np.prod(its_shape))
            fields[part] = {"dtype": its_kind, "shape": its_shape, "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(fields).encode()
    directory = tmp_path / "SRC"
    directory.mkdir()
    rng = np.random.default_rng(0)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        first = file.tell()
        file.truncate(first + offset)
        for name, field in fields.items():
            count = int(np.prod(field["shape"]))
            if name.endswith("_scale_inv"):
                file.seek(first + field["data_offsets"][0])
                file.write(np.ones(count, np.float32))
            if name.removeprefix(LAYER).removesuffix(".weight") in [row[0] for row in FILLED]:
                file.seek(first + field["data_offsets"][0])
                file.write(rng.integers(0, 120, count, np.uint8))
    (directory / "config.json").write_text(json.dumps(V3))
    return directory


def test_every_shape_fits_and_values_arrive_where_they_belong(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert os.stat(source / "model.safetensors").st_size > 11.3e9
    assert convert_weights.main(["import", str(source), str(tmp_path / "DST"), "--dry-run"]) == 0
    assert "1,561 tensors, 11.5 GB" in capsys.readouterr().out

    plan = importing.plan(source, dtype=None, layers=None, mtp=None)
    importing.prepare(plan, tmp_path / "DST")
    wanted = {f"{LAYER}{row[0]}.weight" for row in FILLED}
    for unit in plan.units:
        if unit.name in wanted:
            importing.write(unit, tmp_path / "DST", threading.Event())
    for hub, ours, place in FILLED:
        path = tmp_path / f"DST/model/layers.0.blocks.0.{ours}/"
        store = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{path}/"}, open=True)
        found = store.result()[place].read().result()
        values = plan.tensors[f"{LAYER}{hub}.weight"][:, 0:256]
        assert values.dtype == ml_dtypes.float8_e4m3fn and np.ptp(values.view(np.uint8)) > 100
        np.testing.assert_array_equal(
            found.view(np.uint8).reshape(256, -1), values.view(np.uint8).T, hub
        )
