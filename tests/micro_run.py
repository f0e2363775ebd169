"""The smallest run with experts and MTP, for tests that start real processes."""

from dsjax.config import Block, LayerGroup, Mla, Model, Moe, SigmoidRouter
from dsjax.run import (
    BatchShape,
    Checkpoint,
    Evaluation,
    LearningRate,
    Optim,
    Run,
    Sample,
    StandardLibrary,
)

attention = Mla(
    num_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
)
experts = Moe(
    num_experts=4,
    num_chosen=2,
    num_shared=1,
    intermediate_size=8,
    router=SigmoidRouter(num_groups=2, kept_groups=1, scale=2.5),
)
sparse = Block(attention=attention, ffn=experts)

run = Run(
    model=Model(
        vocab_size=264,
        hidden_size=16,
        layers=(LayerGroup(repeat=2, pattern=(sparse,)),),
        mtp=(sparse,),
        initializer_std=0.02,
    ),
    data=StandardLibrary(held_out=0.01),
    batch=BatchShape(size=8, length=32, micro=4, ramp_from=4, ramp_until=0.5),
    optim=Optim(learning_rate=LearningRate(peak=3e-3, warmup_steps=4)),
    steps=24,
    run_dir="runs/micro",
    precision="fp32",
    remat="none",
    checkpoint=Checkpoint(every=5),
    evaluation=Evaluation(every=12, batches=2),
    sample=Sample(max_new_tokens=8),
)
