"""DeepSeek-V3 in small: sigmoid router with a bias, 4 of 8 groups, three dense layers, MTP.

    python train.py configs/tiny_v3.py

trains on Python's own source files, bytes as tokens, on a laptop:
the loss starts at ln 320 = 5.8 nats and falls. The switches are those of `v3.py`.
"""

from dsjax.config import Block, Dense, LayerGroup, Mla, Model, Moe, Rope, SigmoidRouter, Yarn
from dsjax.run import BatchShape, LearningRate, Optim, Run, StandardLibrary

attention = Mla(
    num_heads=4,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    rope=Rope(theta=10000.0, yarn=Yarn(factor=40.0)),
)
router = SigmoidRouter(num_groups=8, kept_groups=4, scale=2.5)
moe = Moe(num_experts=16, num_chosen=4, num_shared=1, intermediate_size=64, router=router)
dense = Block(attention=attention, ffn=Dense(intermediate_size=384))
sparse = Block(attention=attention, ffn=moe)
layers = (LayerGroup(repeat=3, pattern=(dense,)), LayerGroup(repeat=3, pattern=(sparse,)))

run = Run(
    # 256 bytes and 2 special tokens, padded to 320 rows.
    model=Model(
        vocab_size=320,
        hidden_size=128,
        layers=layers,
        mtp=(sparse,),
        max_position_embeddings=163840,
        initializer_std=0.02,
    ),
    data=StandardLibrary(),
    batch=BatchShape(size=16, length=256),
    optim=Optim(learning_rate=LearningRate(peak=2e-3, warmup_steps=30)),
    steps=300,
    run_dir="runs/tiny_v3",
)
