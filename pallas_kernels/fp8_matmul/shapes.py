"""Products of real models: (M, N, K) of y[M, N] = x[M, K] w[N, K]^T."""

DENSE = {
    "V3 o, 64 tokens": (64, 7168, 16384),
    "V3 o, 128 tokens": (128, 7168, 16384),
    "V3 q_a and kv_a": (4096, 2112, 7168),
    "V3 q_b": (4096, 24576, 1536),
    "V3 kv_b": (4096, 32768, 512),
    "V3 o": (4096, 7168, 16384),
    "V3 gate and up": (4096, 4096, 7168),
    "V3 down": (4096, 7168, 2048),
    "V2-Lite q": (8192, 3072, 2048),
    "V2-Lite kv_a": (8192, 576, 2048),
    "V2-Lite dense gate": (8192, 10944, 2048),
    "V2-Lite dense down": (8192, 2048, 10944),
}
