"""Tensors under published names, their config and the small files beside them, as a directory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsjax.convert import journal, shards
from dsjax.hf.tensors import Tensor
from dsjax.progress import in_bytes


def publish(
    tensors: Mapping[str, Tensor],
    target: Path,
    *,
    plan: Mapping[str, Any],
    config: Mapping[str, Any],
    passed: Mapping[str, Path],
    shard_size: int,
    process: tuple[int, int],
    dry_run: bool,
    say: Callable[[str], None],
) -> None:
    """Writes a Hugging Face directory, or finishes it; does the share of process i of n.

    `plan` says what decides the result, beside `shard_size`; its `command` is the bar's title.
    ValueError if `target` holds something else, OSError if the disk is full or fails.
    """
    plan = {**plan, "shard_size": shard_size}
    journal.check(target, plan)
    if journal.begun(target) and shards.is_complete(target):
        say(f"{target} is complete already")
        return
    planned = shards.plan(tensors, shard_size)
    total = sum(shard.size for shard in planned)
    say(f"{len(tensors):,} tensors, {in_bytes(total)}, in {len(planned):,} files")
    # Before the journal: a directory that nothing was written to belongs to no plan.
    shards.check_space(target, planned if dry_run else shards.share(planned, process))
    if dry_run:
        say("dry run: nothing was written")
        return
    with journal.Journal(target, plan, process) as done:
        whole = shards.write(planned, tensors, done, what=plan["command"])
    if not whole:
        say(f"process {process[0]}/{process[1]} has done its share; others have not yet")
        return
    shards.finish(target, planned, config, passed)
    say(f"complete: {target}")
