"""The peer's side of `train_step.py`; runs in the oracle environment (torch, transformers)."""

import sys

import torch
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from turns import take_turns


def main(variant: str) -> None:
    implementation, _, compiled = variant.partition("+")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        max_position_embeddings=512,
        num_mtp_layers=0,
    )
    config._experts_implementation = implementation
    model = DeepseekV3ForCausalLM(config)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, 512, (4, 128))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        if not torch.isfinite(loss):
            raise RuntimeError("the loss is not finite")

    take_turns(
        step,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )


if __name__ == "__main__":
    main(sys.argv[1])
