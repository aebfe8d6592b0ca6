"""Ray as it is installed against the table of seams: the report to read before an upgrade."""

import pytest

from cluster.placement.ray_seams import RAY, check_seams
from cluster.placement.router import PlacementRouter, UnaryReplica, UnaryRouter
from workers.seams import Seam, Use


@pytest.mark.parametrize("seam", RAY.seams, ids=lambda seam: f"{seam.use}-{seam}")
def test_ray_has_what_we_use_of_it(seam: Seam) -> None:
    assert seam.fault() is None


def test_replicas_may_start() -> None:
    check_seams()


def test_every_member_of_rays_that_ours_overrides_is_in_the_table() -> None:
    overridden = {
        seam.member
        for seam in RAY.seams
        if seam.use is Use.OVERRIDDEN and seam.owner.startswith("ray.")
    }

    assert overridden == {
        name
        for ours in (PlacementRouter, UnaryRouter, UnaryReplica)
        for name in vars(ours)
        if not name.startswith("_")
        if any(name in vars(base) for base in ours.__mro__[1:])
    }
