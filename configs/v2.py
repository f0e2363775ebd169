"""DeepSeek-V2 as published: 235.7B weights, 21B of them active.

    python train.py configs/v2.py data.path=DIR data.tokenizer=DIR/tokenizer.json

DIR is a folder of documents with the published tokenizer; the batch is cut for 256 devices or a
divisor. The recipe is that of report section 3.1.2. The two losses that balance devices and the
dropping of tokens belong to V2's hardware and are not here: the expert-level loss is.
"""

from dsjax.config import Block, Dense, LayerGroup, Mla, Model, Moe, Rope, SoftmaxRouter, Yarn
from dsjax.run import BatchShape, Files, MeshShape, Objective, Optim, Run, StepDecay

FIRST, FULL, LENGTH = 2304, 9216, 4096
RAMP_TOKENS = 225e9
RAMP_STEPS = RAMP_TOKENS / (LENGTH * (FIRST + FULL) / 2)
STEPS = round(RAMP_STEPS + (8.1e12 - RAMP_TOKENS) / (LENGTH * FULL))

# The paper's sqrt(t) = 0.0707 ln s + 1 is an mscale of 0.707. Some copies of this checkpoint's
# config.json say 1.0: weights are loaded with what their own file says.
yarn = Yarn(factor=40.0, beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.707)
attention = Mla(
    num_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope=Rope(theta=10000.0, yarn=yarn),
)
router = SoftmaxRouter(num_groups=8, kept_groups=3, normalize=False, scale=16.0)
moe = Moe(num_experts=160, num_chosen=6, num_shared=2, intermediate_size=1536, router=router)
dense = Block(attention=attention, ffn=Dense(intermediate_size=12288))
sparse = Block(attention=attention, ffn=moe)
layers = (LayerGroup(repeat=1, pattern=(dense,)), LayerGroup(repeat=59, pattern=(sparse,)))

run = Run(
    model=Model(
        vocab_size=102400,
        hidden_size=5120,
        layers=layers,
        max_position_embeddings=163840,
        initializer_std=0.006,
    ),
    data=Files(path="data/text", tokenizer="data/tokenizer.json"),
    batch=BatchShape(
        size=FULL, length=LENGTH, micro=256, ramp_from=FIRST, ramp_until=RAMP_STEPS / STEPS
    ),
    optim=Optim(learning_rate=StepDecay(peak=2.4e-4, warmup_steps=2000, at=(0.6, 0.9))),
    objective=Objective(balance_weight=0.003),
    steps=STEPS,
    run_dir="runs/v2",
    mesh=MeshShape(fsdp=-1, expert=8),
)
