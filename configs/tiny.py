"""A V3 in miniature on Python's own source code, bytes as tokens: a few minutes on two CPU cores.

    python train.py configs/tiny.py

Expect held-out text below the bigram entropy of the training bytes (3.5 bits per byte), the
experts' load evening out, and a sample that looks like Python from afar.
"""

from dsjax.config import Block, Dense, LayerGroup, Mla, Model, Moe, SigmoidRouter
from dsjax.run import (
    BatchShape,
    Checkpoint,
    Evaluation,
    LearningRate,
    Objective,
    Optim,
    Piecewise,
    Run,
    StandardLibrary,
)

attention = Mla(
    num_heads=4,
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
)
experts = Moe(
    num_experts=8,
    num_chosen=2,
    num_shared=1,
    intermediate_size=64,
    router=SigmoidRouter(num_groups=4, kept_groups=2, scale=2.5),
)
dense = Block(attention=attention, ffn=Dense(intermediate_size=384))
sparse = Block(attention=attention, ffn=experts)

run = Run(
    model=Model(
        vocab_size=320,
        hidden_size=128,
        # Not stacked: on CPU a scan's slices of weights and gradients cost a fifth of the step.
        layers=(LayerGroup(repeat=1, pattern=(dense, sparse, sparse, sparse)),),
        mtp=(sparse,),
        max_position_embeddings=1024,
        initializer_std=0.02,
    ),
    data=StandardLibrary(),
    batch=BatchShape(size=8, length=256),
    optim=Optim(learning_rate=LearningRate(peak=3e-3, warmup_steps=20)),
    # V3's 0.001 is made for 200,000 steps; in 200 it would move a bias by 0.2 at most.
    objective=Objective(bias_rate=Piecewise(steps=((0.0, 0.02), (0.95, 0.0)))),
    steps=200,
    run_dir="runs/tiny",
    precision="fp32",
    remat="none",
    checkpoint=Checkpoint(every=50),
    evaluation=Evaluation(every=50, batches=4),
)
