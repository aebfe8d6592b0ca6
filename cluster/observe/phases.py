"""The phases of a request on one worker: queue, prefill and decode, from the steps it saw."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.task import Reason, Stage
from workers.step_history import RequestStep


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a request's life; times by the wall clock."""

    name: str
    """`queue`, `prefill` (to the first token), or `decode` (to the last)."""
    began_s: float
    ended_s: float
    steps: tuple[RequestStep, ...]

    @property
    def seconds(self) -> float:
        """Duration of the phase."""
        return self.ended_s - self.began_s

    @property
    def num_tokens(self) -> int:
        """Tokens of the request that were computed."""
        return sum(step.task.num_tokens for step in self.steps if step.task)

    @property
    def num_preemptions(self) -> int:
        """Times that its KV blocks were freed for other requests."""
        return sum(step.preempted for step in self.steps)

    @property
    def num_drafts(self) -> int:
        """Drafts that were verified."""
        return sum(s.task.num_tokens - 1 for s in self.steps if s.task and _verifies(s))

    @property
    def num_accepted(self) -> int:
        """Drafts that were accepted."""
        return sum(max(s.num_new_tokens - 1, 0) for s in self.steps if _verifies(s))

    @property
    def waited_s(self) -> dict[Reason, float]:
        """Time in steps that deferred the request, by reason, longest first."""
        waited: defaultdict[Reason, float] = defaultdict(float)
        for step in self.steps:
            if step.reason is not None:
                waited[step.reason] += step.measured_s
        return dict(sorted(waited.items(), key=lambda item: -item[1]))

    def attributes(self) -> dict[str, float]:
        """All figures of the phase, as attributes of a span."""
        waited = {f"xyserve.waited_s.{reason}": s for reason, s in self.waited_s.items()}
        return waited | {
            "xyserve.num_steps": sum(step.task is not None for step in self.steps),
            "xyserve.num_tokens": self.num_tokens,
            "xyserve.num_preemptions": self.num_preemptions,
            "xyserve.num_drafts": self.num_drafts,
            "xyserve.num_accepted": self.num_accepted,
        }


def phases(steps: Sequence[RequestStep], arrived_s: float) -> list[Phase]:
    """The phases that a request has reached, from its arrival and the steps it saw."""
    first = next((i for i, step in enumerate(steps) if step.task), len(steps))
    token = next((i for i, step in enumerate(steps) if step.num_new_tokens), len(steps) - 1)
    found, began_s = [], arrived_s
    for name, part in (
        ("queue", steps[:first]),
        ("prefill", steps[first : token + 1]),
        ("decode", steps[token + 1 :]),
    ):
        if name != "queue" and not part:
            break
        if name == "queue" and first < len(steps):
            ended_s = steps[first].began_s
        else:
            ended_s = part[-1].began_s + part[-1].measured_s if part else began_s
        found.append(Phase(name, began_s, max(ended_s, began_s), tuple(part)))
        began_s = found[-1].ended_s
    return found


def _verifies(step: RequestStep) -> bool:
    return step.task is not None and step.task.stage is Stage.VERIFY
