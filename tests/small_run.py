"""A run smaller than `micro_run.py`, for tests of many processes: little to compile.

Its schedules do not depend on `steps`, so that a test may stop and prolong it at will.
"""

from dsjax.config import Block, Dense, LayerGroup, Mla, Model
from dsjax.run import (
    BatchShape,
    Checkpoint,
    Evaluation,
    MeshShape,
    Optim,
    Run,
    Sample,
    StandardLibrary,
    StepDecay,
)

attention = Mla(
    num_heads=1,
    q_lora_rank=None,
    kv_lora_rank=4,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
)
block = Block(attention=attention, ffn=Dense(intermediate_size=16))

run = Run(
    model=Model(
        vocab_size=264,
        hidden_size=8,
        layers=(LayerGroup(repeat=1, pattern=(block,)),),
        initializer_std=0.02,
    ),
    data=StandardLibrary(streams=6, held_out=0.01),
    batch=BatchShape(size=8, length=32, micro=4),
    optim=Optim(learning_rate=StepDecay(peak=3e-3, warmup_steps=4, at=())),
    steps=8,
    run_dir="runs/small",
    precision="fp32",
    remat="none",
    mesh=MeshShape(data=2, fsdp=2),
    checkpoint=Checkpoint(every=2),
    evaluation=Evaluation(every=1000, batches=1),
    sample=Sample(max_new_tokens=2),
)
