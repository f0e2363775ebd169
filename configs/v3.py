"""DeepSeek-V3 as published: 671.0B weights and 11.6B of MTP. R1 and V3.1 are this model too.

    python train.py configs/v3.py data.path=DIR data.tokenizer=DIR/tokenizer.json

DIR holds documents and the published tokenizer; the batch is cut for 1,024 devices or a divisor.
The recipe is that of report section 4.2, its phases turned from tokens into 240,209 steps. YaRN is
on from the start, as the released weights want it; the report adds it at the end.
"""

from dsjax.config import Block, Dense, LayerGroup, Mla, Model, Moe, Rope, SigmoidRouter, Yarn
from dsjax.run import BatchShape, Files, LearningRate, MeshShape, Objective, Optim, Piecewise, Run

FIRST, FULL, LENGTH = 3072, 15360, 4096
RAMP_TOKENS = 469e9
RAMP_STEPS = RAMP_TOKENS / (LENGTH * (FIRST + FULL) / 2)


def steps_for(tokens: float) -> float:
    return RAMP_STEPS + (tokens - RAMP_TOKENS) / (LENGTH * FULL)


STEPS = round(steps_for(14.8e12))
CONSTANT, COSINE, TAIL = (steps_for(tokens) / STEPS for tokens in (10e12, 14.3e12, 14.633e12))

attention = Mla(
    num_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope=Rope(theta=10000.0, yarn=Yarn(factor=40.0, beta_fast=32.0, beta_slow=1.0)),
)
router = SigmoidRouter(num_groups=8, kept_groups=4, scale=2.5)
moe = Moe(num_experts=256, num_chosen=8, num_shared=1, intermediate_size=2048, router=router)
dense = Block(attention=attention, ffn=Dense(intermediate_size=18432))
sparse = Block(attention=attention, ffn=moe)
layers = (LayerGroup(repeat=3, pattern=(dense,)), LayerGroup(repeat=58, pattern=(sparse,)))
rate = LearningRate(
    peak=2.2e-4, warmup_steps=2000, constant_until=CONSTANT, cosine_until=COSINE, tail_until=TAIL
)
sizes = dict(vocab_size=129280, hidden_size=7168, max_position_embeddings=163840)
batch = BatchShape(
    size=FULL, length=LENGTH, micro=1024, ramp_from=FIRST, ramp_until=RAMP_STEPS / STEPS
)
objective = Objective(
    mtp_weight=Piecewise(steps=((0.0, 0.3), (CONSTANT, 0.1))),
    balance_weight=1e-4,
    bias_rate=Piecewise(steps=((0.0, 0.001), (COSINE, 0.0))),
)
run = Run(
    model=Model(**sizes, layers=layers, mtp=(sparse,), initializer_std=0.006),
    data=Files(path="data/text", tokenizer="data/tokenizer.json"),
    batch=batch,
    optim=Optim(learning_rate=rate),
    objective=objective,
    steps=STEPS,
    run_dir="runs/v3",
    mesh=MeshShape(fsdp=-1, expert=16),
)
