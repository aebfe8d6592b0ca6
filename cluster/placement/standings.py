"""Which workers are worse than others whatever is to be placed, so that few need be compared."""

from collections.abc import Sequence

FULL, SLOW, SILENT, CLOSED = 1, 2, 4, 8
"""What makes a worker worse, as in the order of `place`: none of the others outweighs the last
one. A closed one takes nothing that another may have."""


class Standings:
    """The sum of what makes a worker worse, by id, for those that are not as good as any."""

    def __init__(self) -> None:
        self._worse: dict[str, int] = {}

    def set(self, worker_id: str, standing: int) -> None:
        """Note how a worker stands; 0: as good as any."""
        if standing:
            self._worse[worker_id] = standing
        else:
            self._worse.pop(worker_id, None)

    def best(self, worker_ids: Sequence[str], kept: str | None) -> Sequence[str]:
        """The best of these workers, and the next best if it is one alone: two at least, if there
        are two. The one `kept` for a trial is closed."""
        if not self._worse and kept is None:
            return worker_ids
        found = [one for one in worker_ids if one not in self._worse and one != kept]
        if len(found) > 1:
            return found
        standings = {one: self._standing(one, kept) for one in worker_ids}
        for limit in sorted(set(standings.values())):
            found = [one for one, standing in standings.items() if standing <= limit]
            if len(found) > 1:
                break
        return found

    def num_closed(self, worker_ids: Sequence[str], kept: str | None) -> int:
        """How many of these workers take nothing."""
        if not self._worse and kept is None:
            return 0
        return sum(self._standing(one, kept) >= CLOSED for one in worker_ids)

    def _standing(self, worker_id: str, kept: str | None) -> int:
        return CLOSED if worker_id == kept else self._worse.get(worker_id, 0)
