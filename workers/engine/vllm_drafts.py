"""The drafts of each request: which are offered for verification, and what is sent for new ones."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from vllm.sampling_params import SamplingType
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request as VllmRequest

from scheduler.speculation import Acceptance, num_expected
from workers.drafts.draft_client import DraftClient, DraftPath
from workers.engine.vllm_requests import LiveRequests
from workers.engine.vllm_speculation import MAX_HIDDEN_STATES

OWN_DRAFTER = "vllm"
"""Name of the drafter of drafts that vLLM made itself."""
OWN_PROB = 0.7
"""Probability assumed for each of vLLM's own drafts, which come without one: what simulations
assume, too. It matters for the first drafts only: `Acceptance` learns what they are worth."""


class DraftOffers:
    """Offers each decoding request its best drafts before a step, and asks for more after it.

    They come from a draft worker once there is a client of one, else from vLLM itself.
    """

    def __init__(
        self,
        requests: Mapping[str, VllmRequest],
        live: LiveRequests,
        num_speculative_tokens: int,
        set_drafts: Callable[[DraftTokenIds], None],
    ) -> None:
        """`requests` and `live` are the scheduler's; `set_drafts` is vLLM's way of giving a request
        drafts, of which it keeps those that a grammar allows.
        """
        self.client: DraftClient | None = None
        self.verifies_all = False
        """Whether drafts change no answer, whatever a request asks for."""
        self.max_drafts: int | None = None
        """Drafts of one request that the stage policy allows; None: all that there can be."""
        self._requests = requests
        self._live = live
        self._num_speculative_tokens = num_speculative_tokens
        self._set_drafts = set_drafts
        self._hidden_rows: Callable[[int, int], list[bytes]] | None = None
        self._hidden_states: dict[str, list[bytes]] = {}
        """Hidden states of each request's tokens computed since the last update to the draft
        worker."""

    def connect(
        self, client: DraftClient, hidden_rows: Callable[[int, int], list[bytes]] | None
    ) -> None:
        """Take drafts from `client`'s draft worker from now on.

        `hidden_rows` gives the hidden states of a range of the last step's tokens, if a drafter
        wants them.
        """
        self.client, self._hidden_rows = client, hidden_rows

    def offer(self, running: Iterable[VllmRequest], acceptance: Acceptance, step_s: float) -> None:
        """Give each request that decodes its drafts for the next step, which takes about `step_s`.

        Their chances go to the notes on the request.
        """
        if self.client:
            now = time.monotonic()
            if acceptance.is_resting:
                self.client.poll(now)
            else:
                self.client.await_answer(step_s, now)
        max_drafts = 0 if self._must_withhold() else self._num_allowed
        offers = {}
        decodes = False
        for request in running:
            notes = self._live[request.request_id]
            notes.draft_chances = ()
            if request.is_prefill_chunk or not request.num_output_tokens:
                continue
            decodes = True
            if chances := self._offer(request, acceptance, max_drafts):
                offers[request.request_id] = notes.draft_chances = chances
        if decodes and (probe := acceptance.next_probe(offers)):
            self._live[probe].draft_chances = (1.0,)
            self._requests[probe].spec_token_ids = self._requests[probe].spec_token_ids[:1]

    def verified(
        self, request_id: str, num_drafts: int, num_accepted: int, acceptance: Acceptance
    ) -> None:
        """Count drafts of a request that a step has verified, and learn from them."""
        drafter = acceptance.verified(request_id, num_drafts, num_accepted)
        if self.client and drafter is not None:
            self.client.counts_of[drafter].count(num_drafts, num_accepted)

    def starts(self, scheduled: Mapping[str, int]) -> dict[str, int]:
        """Where the tokens of a step begin in each request; called before vLLM takes in its output.

        Empty if there is no draft worker to send to.
        """
        if self.client is None:
            return {}
        return {
            request_id: self._requests[request_id].num_computed_tokens - num_tokens
            for request_id, num_tokens in scheduled.items()
            if request_id in self._requests
        }

    def send(
        self,
        req_ids: Sequence[str],
        scheduled: Mapping[str, int],
        starts: Mapping[str, int],
        acceptance: Acceptance,
    ) -> None:
        """Send the draft worker the new tokens of a step whose rows are those of `req_ids`."""
        if self.client is None:
            return
        num_wanted = 0 if acceptance.is_resting else self._num_allowed
        now = time.monotonic()
        row = 0
        for request_id in req_ids:
            request = self._requests.get(request_id)
            if request and request_id in self._live and self._may_speculate(request):
                # Hidden states of rejected drafts are of no use.
                num_rows = max(request.num_computed_tokens - starts[request_id], 0)
                states = self._collect(request_id, row, row + num_rows)
                # A prompt is sent as its prefill begins, its states when that is over.
                sent = states if request.num_output_tokens else []
                if self.client.update(
                    request_id, request.all_token_ids, num_wanted, b"".join(sent), now
                ):
                    sent.clear()
            row += scheduled[request_id]
        self.client.flush(now)

    def finish(self, request_id: str) -> None:
        """Drop a request that has ended."""
        self._hidden_states.pop(request_id, None)
        if self.client:
            self.client.finish(request_id)

    @property
    def _num_allowed(self) -> int:
        if self.max_drafts is None:
            return self._num_speculative_tokens
        return min(self.max_drafts, self._num_speculative_tokens)

    def _offer(
        self, request: VllmRequest, acceptance: Acceptance, max_drafts: int
    ) -> tuple[float, ...]:
        """Choose the request's drafts: the path with most tokens expected to be accepted."""
        request_id = request.request_id
        if self.client is None:
            probs = [OWN_PROB] * len(request.spec_token_ids)
            chances = acceptance.chances(request_id, OWN_DRAFTER, probs)
            acceptance.offer(request_id, OWN_DRAFTER, probs)
            return chances
        request.spec_token_ids = []
        # The last token is never a draft: it would be the one that verification adds.
        num_left = request.max_tokens - request.num_output_tokens - 1
        max_drafts = max(min(max_drafts, num_left), 0)
        best: DraftPath | None = None
        best_chances: tuple[float, ...] = ()
        for path in self.client.paths(request_id, request.all_token_ids):
            chances = acceptance.chances(request_id, path.drafter, path.probs[:max_drafts])
            if num_expected(chances) > num_expected(best_chances):
                best, best_chances = path, chances
        if best is None:
            return ()
        self._set_drafts(DraftTokenIds([request_id], [best.token_ids[: len(best_chances)]]))
        best_chances = best_chances[: len(request.spec_token_ids)]
        acceptance.offer(request_id, best.drafter, best.probs[: len(best_chances)])
        return best_chances

    def _collect(self, request_id: str, begin: int, end: int) -> list[bytes]:
        """The request's hidden states that are not sent yet, those of the step's rows included."""
        if self._hidden_rows is None:
            return []
        states = self._hidden_states.setdefault(request_id, [])
        states += self._hidden_rows(begin, end)
        del states[:-MAX_HIDDEN_STATES]
        return states

    def _may_speculate(self, request: VllmRequest) -> bool:
        """Whether the verification of drafts honours all that the request asks for.

        A custom logits processor, which `extra_args` are for, may count steps. vLLM's own
        verification ignores more, and uses up random numbers, so that an equal seed would no
        longer give an equal answer.
        """
        params = request.sampling_params
        if params is None or params.extra_args:
            return False
        if self.verifies_all:
            return True
        is_seeded = params.sampling_type is SamplingType.RANDOM_SEED
        return not (params.min_p or params.logit_bias or params.min_tokens or is_seeded)

    def _must_withhold(self) -> bool:
        """Whether the next step could hold a request next to which vLLM can verify no drafts."""
        return not self.verifies_all and any(
            request.sampling_params and request.sampling_params.logprob_token_ids is not None
            for request in self._requests.values()
        )
