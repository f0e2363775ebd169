"""Products of experts while tokens are generated: (G, places, places used of each, N, K)."""

MASKED = {
    "V3 gate and up, 1 expert": (1, 1024, 1024, 4096, 7168),
    "V3 gate and up, 2 experts": (2, 1024, 512, 4096, 7168),
    "V3 gate and up, 4 experts": (4, 1024, 256, 4096, 7168),
    "V3 down, 1 expert": (1, 1024, 1024, 7168, 2048),
    "V3 down, 2 experts": (2, 1024, 512, 7168, 2048),
    "V3 down, 4 experts": (4, 1024, 256, 7168, 2048),
    "V2-Lite gate and up, 128 tokens": (64, 128, 12, 2816, 2048),
}
