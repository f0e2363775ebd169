"""A V3 of three million weights, trained in block FP8 as the paper trains: three products of each
linear layer in e4m3, scales for every 1x128 and 128x128.

    python train.py configs/tiny_fp8.py
    python train.py configs/tiny_fp8.py precision=bf16 run_dir=runs/tiny_bf16

On a CPU the arithmetic is emulated: same values as on a chip that has it, and slower than BF16.
How near the two losses stay, and how near chance lets them: `docs/fp8.md`. Sizes are such that sums
run over several blocks, and some blocks are cut short.
"""

from dsjax.config import Block, Dense, LayerGroup, Mla, Model, Moe, SigmoidRouter
from dsjax.run import BatchShape, Evaluation, LearningRate, Optim, Run, StandardLibrary

attention = Mla(
    num_heads=4,
    q_lora_rank=192,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
)
router = SigmoidRouter(num_groups=4, kept_groups=2, scale=2.5)
moe = Moe(num_experts=8, num_chosen=2, num_shared=1, intermediate_size=128, router=router)
dense = Block(attention=attention, ffn=Dense(intermediate_size=640))
sparse = Block(attention=attention, ffn=moe)

run = Run(
    model=Model(
        vocab_size=320,
        hidden_size=256,
        layers=(LayerGroup(repeat=1, pattern=(dense, sparse)),),
        mtp=(sparse,),
        max_position_embeddings=1024,
        initializer_std=0.02,
    ),
    data=StandardLibrary(),
    batch=BatchShape(size=4, length=128),
    optim=Optim(learning_rate=LearningRate(peak=3e-4, warmup_steps=100)),
    steps=1000,
    run_dir="runs/tiny_fp8",
    precision="fp8",
    remat="none",
    evaluation=Evaluation(every=250, batches=4),
)
