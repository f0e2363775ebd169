"""DeepSeek-V2-Lite as published: 15.7B weights, 2.4B of them active.

    python train.py configs/v2_lite.py data.path=DIR data.tokenizer=DIR/tokenizer.json

DIR is a folder of documents with the published tokenizer; the batch is cut for 512 devices or a
divisor. The recipe is that of V2 report appendix B: 302,000 steps, no ramp, one balance loss.
"""

from dsjax.config import Block, Dense, LayerGroup, Mla, Model, Moe, Rope, SoftmaxRouter, Yarn
from dsjax.run import BatchShape, Files, MeshShape, Objective, Optim, Run, StepDecay

SIZE, LENGTH = 4608, 4096

yarn = Yarn(factor=40.0, beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.707)
attention = Mla(
    num_heads=16,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope=Rope(theta=10000.0, yarn=yarn),
)
router = SoftmaxRouter(num_groups=1, kept_groups=1, normalize=False, scale=1.0)
moe = Moe(num_experts=64, num_chosen=6, num_shared=2, intermediate_size=1408, router=router)
dense = Block(attention=attention, ffn=Dense(intermediate_size=10944))
sparse = Block(attention=attention, ffn=moe)
layers = (LayerGroup(repeat=1, pattern=(dense,)), LayerGroup(repeat=26, pattern=(sparse,)))

run = Run(
    model=Model(
        vocab_size=102400,
        hidden_size=2048,
        layers=layers,
        max_position_embeddings=163840,
        initializer_std=0.006,
    ),
    data=Files(path="data/text", tokenizer="data/tokenizer.json"),
    batch=BatchShape(size=SIZE, length=LENGTH, micro=512),
    optim=Optim(learning_rate=StepDecay(peak=4.2e-4, warmup_steps=2000, at=(0.8, 0.9))),
    objective=Objective(balance_weight=0.001),
    steps=round(5.7e12 / (SIZE * LENGTH)),
    run_dir="runs/v2_lite",
    mesh=MeshShape(fsdp=-1, expert=8),
)
