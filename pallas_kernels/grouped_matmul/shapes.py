"""Products of experts in real models: (G, rows of all groups, K, N) of x [M, K] by w [G, K, N]."""

SORTED = {
    "V3 gate and up": (256, 32768, 7168, 4096),
    "V3 gate and up, 32 experts to a device": (32, 32768, 7168, 4096),
    "V3 gate, 32 experts to a device": (32, 32768, 7168, 2048),
    "V3 down, 32 experts to a device": (32, 32768, 2048, 7168),
    "V2-Lite gate and up": (64, 49152, 2048, 2816),
    "V2-Lite gate": (64, 49152, 2048, 1408),
    "V2-Lite down": (64, 49152, 1408, 2048),
}
