"""Every notation of device groups against the groups written out."""

import pytest

from dsjax.plan.groups import groups, pairs
from dsjax.plan.hlo import Instruction


def collective(attributes: str) -> Instruction:
    return Instruction("c", "all-reduce", (), "%x", f", channel_id=1, {attributes}, to_apply=%add")


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={{0,2,1,3}}", [[0, 2, 1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}", [[0, 2, 1, 3]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
            [[0, 2, 4, 6], [1, 3, 5, 7]],
        ),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'a'}", [[0, 1], [2, 3]]),
    ],
)
def test_each_notation(attributes, expected):
    assert groups(collective(attributes), 4) == expected


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match=r"all-reduce c has no replica_groups that can be read"):
        groups(collective("replica_groups=@new_fashion"), 4)


def test_pairs_leave_out_who_stays():
    permute = collective("source_target_pairs={{0,1},{1,0},{2,2}}")
    assert pairs(permute) == [[0, 1], [1, 0]]
    assert pairs(collective("source_target_pairs={}")) == []
