"""DeepSeek-V2 in small: compressed queries, softmax router with 3 of 8 groups, scale 16.

    python train.py configs/tiny_v2.py

trains on Python's own source files, bytes as tokens, on a laptop:
the loss starts at ln 320 = 5.8 nats and falls. The switches are those of `v2.py`.
"""

from dsjax.config import Block, Dense, LayerGroup, Mla, Model, Moe, Rope, SoftmaxRouter, Yarn
from dsjax.run import BatchShape, Objective, Optim, Run, StandardLibrary, StepDecay

attention = Mla(
    num_heads=4,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    rope=Rope(theta=10000.0, yarn=Yarn(factor=40.0, mscale=0.707, mscale_all_dim=0.707)),
)
router = SoftmaxRouter(num_groups=8, kept_groups=3, normalize=False, scale=16.0)
moe = Moe(num_experts=16, num_chosen=3, num_shared=2, intermediate_size=64, router=router)
dense = Block(attention=attention, ffn=Dense(intermediate_size=384))
sparse = Block(attention=attention, ffn=moe)
layers = (LayerGroup(repeat=1, pattern=(dense,)), LayerGroup(repeat=3, pattern=(sparse,)))

run = Run(
    # 256 bytes and 2 special tokens, padded to 320 rows.
    model=Model(
        vocab_size=320,
        hidden_size=128,
        layers=layers,
        max_position_embeddings=163840,
        initializer_std=0.02,
    ),
    data=StandardLibrary(),
    batch=BatchShape(size=16, length=256),
    optim=Optim(learning_rate=StepDecay(peak=2e-3, warmup_steps=30, at=(0.6, 0.9))),
    objective=Objective(balance_weight=0.003),
    steps=300,
    run_dir="runs/tiny_v2",
)
