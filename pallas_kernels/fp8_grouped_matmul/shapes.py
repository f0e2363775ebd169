"""Products of experts in real models: (G, rows to each group, N, K)."""

CONTIGUOUS = {
    "V3 gate and up, 4 experts": (4, 8192, 4096, 7168),
    "V3 down, 8 experts": (8, 4096, 7168, 2048),
    "V2-Lite gate and up": (64, 768, 2816, 2048),
    "V2-Lite down": (64, 768, 2048, 1408),
}
