"""Kimi K2 as published: 1,026.4B weights, 32.9B of them active; V3 with other numbers.

    python train.py configs/kimi_k2.py data.path=DIR data.tokenizer=DIR/tokenizer.json

DIR is a folder of documents with a `tokenizer.json`; the batch is cut for 1,024 devices or a
divisor. Moonshot trained with MuonClip on 15.5T tokens, in batches of 67M. The schedule is theirs
(report 2.5: 500 steps of warm-up, constant for 10T tokens, cosine to a tenth); the optimizer is
AdamW, because MuonClip is not here.
"""

from dsjax.config import Block, Dense, LayerGroup, Mla, Model, Moe, Rope, SigmoidRouter, Yarn
from dsjax.run import BatchShape, Files, LearningRate, MeshShape, Optim, Run

SIZE, LENGTH = 16384, 4096

attention = Mla(
    num_heads=64,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope=Rope(theta=50000.0, yarn=Yarn(factor=32.0, beta_fast=1.0, beta_slow=1.0)),
)
router = SigmoidRouter(num_groups=1, kept_groups=1, scale=2.827)
moe = Moe(num_experts=384, num_chosen=8, num_shared=1, intermediate_size=2048, router=router)
dense = Block(attention=attention, ffn=Dense(intermediate_size=18432))
sparse = Block(attention=attention, ffn=moe)
layers = (LayerGroup(repeat=1, pattern=(dense,)), LayerGroup(repeat=60, pattern=(sparse,)))
rate = LearningRate(
    peak=2e-4, warmup_steps=500, constant_until=10 / 15.5, cosine_until=1.0, tail_until=1.0
)

run = Run(
    model=Model(
        vocab_size=163840,
        hidden_size=7168,
        layers=layers,
        max_position_embeddings=131072,
        initializer_std=0.006,
    ),
    data=Files(path="data/text", tokenizer="data/tokenizer.json"),
    batch=BatchShape(size=SIZE, length=LENGTH, micro=1024),
    optim=Optim(learning_rate=rate),
    steps=round(15.5e12 / (SIZE * LENGTH)),
    run_dir="runs/kimi_k2",
    mesh=MeshShape(fsdp=-1, expert=16),
)
