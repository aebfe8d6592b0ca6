import pickle

import pytest

from scheduler.drafting import CollapseReason
from scheduler.placement import PlacementReason
from scheduler.task import Reason
from scheduler.worded import Worded

MEMBERS = [*Reason, *PlacementReason, *CollapseReason]


def test_a_member_is_its_value_and_has_its_words() -> None:
    assert Reason.KV.value == "kv"
    assert f"{Reason.KV}: {Reason.KV.text}" == "kv: the KV cache had no room for its tokens"


@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_a_member_is_found_again_by_its_value_and_after_a_journey(member: Worded) -> None:
    assert type(member)(member.value) is member
    assert pickle.loads(pickle.dumps(member)) is member
    assert " " in member.text
