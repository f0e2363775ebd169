"""The block of DeepSeek's FP8 recipe, and sizes that its models quantize."""

BLOCK = 128

# (rows, columns): tokens of one device by a layer's width, and SwiGLU by the experts' width.
ACTIVATIONS = {
    "V2-Lite, 8k tokens": (8192, 2048),
    "V3, 32k tokens": (32768, 7168),
    "V2-Lite, dense layer": (8192, 10944),
}
SWIGLU = {"V2-Lite, 8k tokens by 6 experts": (49152, 2 * 1408)}
# (out, in) of weights whose edge cuts a block: `kv_a_proj` alone and with `q_a_proj`.
WEIGHTS = {"V3 kv_a": (576, 7168), "V3 q_a and kv_a": (2112, 7168), "V2-Lite dense": (10944, 2048)}


def num_blocks(size: int, block: int = BLOCK) -> int:
    """How many blocks cover `size`, the last one cut short where need be."""
    return -(-size // block)
