"""JSON that came from elsewhere: what stands in it twice, or is no JSON at all, is an error."""

import json
from typing import Any, NoReturn


def parse(text: bytes) -> Any:
    """The value written in `text` (UTF-8). ValueError says what is wrong with it."""
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=lambda pairs: (
                fields if len(fields := dict(pairs)) == len(pairs) else _refuse_twice(pairs)
            ),
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_twice(pairs: list[tuple[str, Any]]) -> NoReturn:
    seen: set[str] = set()
    twice = next(name for name, _ in pairs if name in seen or seen.add(name))
    raise ValueError(f"{twice[:200]!r} stands twice in one object")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
