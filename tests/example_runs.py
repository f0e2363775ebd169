"""Runs for the tests of what a `Run` can do: one with every kind of value in it."""

from dsjax.config import Block, Dense, LayerGroup, Mla, Model, Moe, Rope, SigmoidRouter, Yarn
from dsjax.run import BatchShape, Files, LearningRate, MeshShape, Optim, Run


def v3_like() -> Run:
    """DeepSeek-V3 as published, on a folder of files: nested unions, tuples, None and Yarn."""
    attention = Mla(
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope=Rope(yarn=Yarn(factor=40.0)),
    )
    router = SigmoidRouter(num_groups=8, kept_groups=4, scale=2.5)
    moe = Moe(num_experts=256, num_chosen=8, num_shared=1, intermediate_size=2048, router=router)
    dense = Block(attention=attention, ffn=Dense(intermediate_size=18432))
    sparse = Block(attention=attention, ffn=moe)
    return Run(
        model=Model(
            vocab_size=129280,
            hidden_size=7168,
            layers=(
                LayerGroup(repeat=3, pattern=(dense,)),
                LayerGroup(repeat=58, pattern=(sparse,)),
            ),
            mtp=(sparse,),
        ),
        data=Files(path="/data/text", tokenizer="/data/tokenizer.json"),
        batch=BatchShape(size=8, length=4096, micro=4),
        optim=Optim(learning_rate=LearningRate(peak=2.2e-4, warmup_steps=2000)),
        steps=1000,
        run_dir="runs/v3",
        mesh=MeshShape(expert=64),
    )
