"""An answer put together from what its client received, without what differs in each call."""

import json
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.kinds import Kind

_OF_ITS_CALL = {
    "id",
    "call_id",
    "completed_at",
    "created",
    "created_at",
    "input_tokens_details",
    "item_id",
    "prompt_tokens_details",
    "system_fingerprint",
}
"""Members that differ from call to call: ids, times, and how much of a prompt was in the cache."""


@dataclass(slots=True)
class Choice:
    """One choice, its pieces joined."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    tools: dict[int, dict[str, str]] = field(default_factory=dict)
    """Names and arguments of the tool calls, by index."""
    ends: list[Any] = field(default_factory=list)
    """Finish reason and stop reason, of each time that it ended."""


@dataclass(slots=True)
class Answer:
    """All that one call was answered with."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: list[Any] = field(default_factory=list)
    responses: list[Any] = field(default_factory=list)
    """Whole answers of the Responses API."""
    num_ends: int = 0
    """Times that its stream, or its only body, ended as the API says."""
    error: str = ""
    """Error that a stream ended with."""
    num_chunks: int = 0

    def take(self, body: dict[str, Any]) -> None:
        """Add a chunk of a stream, or a whole answer."""
        self.num_chunks += 1
        if body.get("error"):
            self.error = json.dumps(body["error"])
        if (event := str(body.get("type", ""))).startswith("response."):
            self._take_event(event, body)
            return
        if body.get("object") == "response":
            self.responses.append(_scrubbed(body))
            return
        for piece in body.get("choices") or ():
            self._take_choice(piece)
        if body.get("usage"):
            self.usage.append(_scrubbed(body["usage"]))
        if body.get("prompt_logprobs"):  # of a chat
            self._choice(0).prompt_logprobs += body["prompt_logprobs"]

    def _take_choice(self, piece: dict[str, Any]) -> None:
        choice = self._choice(piece["index"])
        said = piece.get("delta") or piece.get("message") or {}
        choice.text += piece.get("text") or said.get("content") or ""
        choice.token_ids += piece.get("token_ids") or ()
        choice.prompt_token_ids += piece.get("prompt_token_ids") or ()
        choice.prompt_logprobs += piece.get("prompt_logprobs") or ()
        if logprobs := piece.get("logprobs"):
            choice.logprobs += logprobs.get("content") or _rows(logprobs)
        for index, call in enumerate(said.get("tool_calls") or ()):
            tool = choice.tools.setdefault(call.get("index", index), {"name": "", "arguments": ""})
            for name in tool:
                tool[name] += call.get("function", {}).get(name) or ""
        if piece.get("finish_reason"):
            choice.ends.append([piece["finish_reason"], piece.get("stop_reason")])

    def _take_event(self, event: str, body: dict[str, Any]) -> None:
        if event == "response.output_text.delta":
            self._choice(0).text += body["delta"]
        elif event in ("response.completed", "response.incomplete"):
            self.responses.append(_scrubbed(body["response"]))
            self.num_ends += 1
        elif event in ("response.failed", "error"):
            self.error = json.dumps(body)

    def _choice(self, index: int) -> Choice:
        return self.choices.setdefault(index, Choice())

    def content(self) -> str:
        """Everything that has to be equal, as text that is equal for equal answers only."""
        choices = {str(index): _fields(choice) for index, choice in sorted(self.choices.items())}
        return json.dumps([choices, self.usage, self.responses], sort_keys=True)

    def fault(self, kind: Kind) -> str:
        """How the answer is not a whole one of its kind; empty if it is."""
        if self.error:
            return f"failed: {self.error}"
        if not self.num_ends:
            return "lost: it has no end"
        if self.num_ends > 1:
            return f"doubled: it ended {self.num_ends} times"
        if kind.api == "responses":
            num = len(self.responses)
            return "" if num == 1 else f"{'doubled' if num else 'lost'}: it has {num} responses"
        for index, choice in self.choices.items():
            if len(choice.ends) > 1:
                return f"doubled: choice {index} ended {len(choice.ends)} times"
        num_ended = sum(bool(choice.ends) for choice in self.choices.values())
        if num_ended != kind.num_choices or len(self.choices) != kind.num_choices:
            return f"lost: {num_ended} of {kind.num_choices} choices ended"
        most = kind.params["max_tokens"]
        for index, choice in self.choices.items():
            if (num := len(choice.token_ids)) > most:
                return f"doubled: choice {index} has {num} tokens of at most {most}"
        if kind.params.get("ignore_eos"):
            for used in self.usage:
                if (num := used["completion_tokens"]) != (want := most * kind.num_choices):
                    what = "doubled" if num > want else "lost"
                    return f"{what}: {num} tokens in place of {want}"
        return ""

    def difference(self, other: "Answer") -> str:
        """Where another answer differs from this one first; empty if it is equal."""
        mine, others = self.content(), other.content()
        if mine == others:
            return ""
        at = next(
            (at for at, (a, b) in enumerate(zip(mine, others, strict=False)) if a != b),
            min(len(mine), len(others)),
        )
        since = max(0, at - 60)
        return f"at {at}: {others[since : at + 60]!r} in place of {mine[since : at + 60]!r}"


def _rows(logprobs: dict[str, Any]) -> list[Any]:
    """The log probabilities of a completion, one row for each token."""
    columns = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
    return [list(row) for row in zip(*(logprobs[column] for column in columns), strict=True)]


def _fields(choice: Choice) -> dict[str, Any]:
    return {name: getattr(choice, name) for name in Choice.__slots__}


def _scrubbed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _scrubbed(part) for name, part in value.items() if name not in _OF_ITS_CALL}
    if isinstance(value, list):
        return [_scrubbed(part) for part in value]
    return value
