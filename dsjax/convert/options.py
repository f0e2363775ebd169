"""What the commands of `convert_weights.py` are given as text, and what it means."""

import re

UNITS = {"": 1, "B": 1} | {
    prefix + "B": base**power
    for base, prefixes in ((1000, ("k", "M", "G", "T")), (1024, ("Ki", "Mi", "Gi", "Ti")))
    for power, prefix in enumerate(prefixes, start=1)
}
MOST_DIGITS = 20


def num_bytes(text: str) -> int:
    """`5GB` (powers of ten), `5GiB` (powers of two) or plain bytes. ValueError for the rest."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    unit = match and next((u for u in UNITS if u.lower() == match[2].lower()), None)
    if match is None or unit is None or len(match[1]) > MOST_DIGITS:
        number = 0
    else:
        number = int(float(match[1]) * UNITS[unit])
    if number < 1:
        raise ValueError(f"{text[:50]!r} is no size; write it as in 5GB or 512MiB")
    return number


def process(text: str) -> tuple[int, int]:
    """`i/n`, counted from 0, or `jax`: what jax.distributed says. ValueError for the rest."""
    if text == "jax":
        return _of_jax()
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"{text!r} is no process; write i/n with i from 0 to n-1, or jax")
    return int(match[1]), int(match[2])


def _of_jax() -> tuple[int, int]:
    """Asks and lets go: processes end when their share is done, not when the last one's is."""
    import jax

    if jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count()
    try:
        jax.distributed.initialize()
        found = jax.process_index(), jax.process_count()
        jax.distributed.shutdown()
    except RuntimeError as error:
        raise ValueError(
            f"jax.distributed does not say which process this is ({error}); write --process i/n"
        ) from error
    return found
