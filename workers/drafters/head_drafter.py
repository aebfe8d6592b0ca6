"""A drafter that grows trees of guesses with a draft head, likeliest guesses first."""

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from typing_extensions import override

from workers.drafters.draft_head import DraftHead, attend
from workers.drafters.drafter import ContextKey, Draft, Drafter, HiddenStates
from workers.kernels.gemm import Floats

Hints = dict[int, tuple[float, "Hints"]]
"""Guesses by token, each with its probability and the guesses that follow it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeLimits:
    """How large trees grow, and how much of them one step computes.

    New tokens are read between two steps, so a step has to be short: it runs few rows, those of the
    likeliest guesses.
    """

    max_nodes: int = 32
    """Max guesses of a draft: several times what the worker verifies, so that a branch is at hand
    if the request takes another path."""
    max_depth: int = 12
    """Max guesses in a row, as many as a worker verifies by default."""
    num_children: int = 6
    """Guesses computed after each row; later ones are seldom among the likeliest of the tree."""
    min_path_prob: float = 0.01
    """Min path probability of guesses that are followed: less likely ones are seldom used."""
    max_rows: int = 16
    """Max guesses that one step follows, over all requests."""
    max_rows_per_request: int = 8
    """Max guesses that one step follows for one request: deeper guesses need another step anyway,
    and other requests their turn."""
    max_requests: int = 256
    """Max requests with a cache; beyond it the one that has not grown for longest is forgotten."""


DEFAULT_LIMITS = TreeLimits()


class _Row(NamedTuple):
    """A token, and the state before it: the target's, or the head's guess at that."""

    token_id: int
    state: Floats
    position: int


class _Node(NamedTuple):
    """A guess in a tree."""

    row: _Row
    parent: int
    depth: int  # 1 right after the context
    prob: float
    path_prob: float
    hints: Hints


class _Cache:
    """Keys and values of one request: a ring of its newest rows, and the nodes of its tree.

    Both are contiguous, and so one slice: the tree grows down from the first row of the ring. Keys
    are rotated to their positions, so that their order does not matter.
    """

    def __init__(self, window: int, max_nodes: int, num_heads: int, head_dim: int) -> None:
        self._window, self._max_nodes = window, max_nodes
        self.keys = np.zeros((num_heads, max_nodes + window, head_dim), np.float32)
        self.values = np.zeros_like(self.keys)
        self._num_rows = 0

    def append(self, key: Floats, value: Floats) -> None:
        """Add a row of the context, replacing the oldest if the ring is full."""
        self._put(self._max_nodes + self._num_rows % self._window, key, value)
        self._num_rows += 1

    def put_node(self, number: int, key: Floats, value: Floats) -> None:
        """Write a node of the tree."""
        self._put(self._max_nodes - 1 - number, key, value)

    def _put(self, slot: int, key: Floats, value: Floats) -> None:
        self.keys[:, slot], self.values[:, slot] = key, value

    def slots(self, num_nodes: int) -> slice:
        """Slots of a tree of `num_nodes` nodes, newest first, followed by those of its context."""
        end = self._max_nodes + min(self._num_rows, self._window)
        return slice(self._max_nodes - num_nodes, end)


class _Tree:
    """Guesses of one request; a node is expanded when its row has been run and it has children."""

    def __init__(self, hints: Hints) -> None:
        self.nodes: list[_Node] = []
        self.expanded: dict[int, int] = {}
        """Numbers in the cache of the nodes that have children."""
        self.hints = hints
        """Guesses of the previous tree from here on, used where this one ends."""

    def ancestors(self, node: int) -> list[int]:
        """Numbers in the cache of an expanded node and its ancestors."""
        numbers = []
        while node >= 0:
            numbers.append(self.expanded[node])
            node = self.nodes[node].parent
        return numbers

    def best(self, num_nodes: int) -> list[int]:
        """The likeliest nodes, parents before children."""
        return heapq.nlargest(num_nodes, range(len(self.nodes)), self._path_prob)

    def _path_prob(self, node: int) -> float:
        return self.nodes[node].path_prob

    def add_children(
        self, parent: int, state: Floats, position: int, guesses: list[tuple[int, float]]
    ) -> None:
        """Expand a node; -1 is the context."""
        depth, path_prob, hints = 1, 1.0, self.hints
        if parent >= 0:
            depth, path_prob = self.nodes[parent].depth + 1, self.nodes[parent].path_prob
            hints = self.nodes[parent].hints
        for token_id, prob in guesses:
            row = _Row(token_id, state, position)
            known = hints.get(token_id, (0.0, {}))[1]
            self.nodes.append(_Node(row, parent, depth, prob, path_prob * prob, known))


class _HeadContext:
    """A request: rows to run, and the tree grown so far."""

    def __init__(self, num_tokens: int, cache: _Cache) -> None:
        self.num_tokens = num_tokens
        self.cache = cache
        self.pending: list[_Row] = []
        """Rows that are not in the cache yet; the last is the root of the tree."""
        self.tree = _Tree({})
        self.to_run: list[int] = []
        """Nodes of the tree to run next, likeliest first; -1 is the root."""
        self.hints: Hints = {}
        """Guesses of the last draft."""


class HeadDrafter(Drafter):
    """A `Drafter` on a draft head.

    Each step runs the likeliest guesses not run yet, over all requests; new tokens of a request
    come first, since they are certain. They start a new tree from the target's own states; where it
    ends, the rest of the previous tree continues it.
    """

    def __init__(self, head: DraftHead, limits: TreeLimits = DEFAULT_LIMITS) -> None:
        self.hidden_size = head.config.hidden_size
        self.vocab_size = head.config.vocab_size
        self._head = head
        self._limits = limits
        self._contexts: dict[ContextKey, _HeadContext] = {}

    def extend(
        self,
        key: ContextKey,
        position: int,
        token_ids: list[int],
        hidden_states: HiddenStates | None = None,
    ) -> None:
        """Append tokens and start a new tree, unless the state before the last token is missing."""
        context = self._contexts.pop(key, None)
        if context is None or position != context.num_tokens:
            context = _HeadContext(position, self._new_cache())
        self._contexts[key] = context
        if len(self._contexts) > self._limits.max_requests:
            del self._contexts[next(iter(self._contexts))]
        for token_id in token_ids:
            context.hints = context.hints.get(token_id, (0.0, {}))[1]
        context.num_tokens += len(token_ids)
        num_states = 0 if hidden_states is None else min(len(hidden_states), len(token_ids))
        num_states = min(num_states, self._head.config.window)
        context.tree = _Tree(context.hints)
        # Without the target's state before the last token there is nothing to start from.
        context.to_run = [-1] if num_states else []
        if hidden_states is not None and num_states:
            known = zip(
                token_ids[-num_states:],
                hidden_states[-num_states:].astype(np.float32),
                range(context.num_tokens - num_states, context.num_tokens),
                strict=True,
            )
            context.pending += [_Row(*row) for row in known]
            del context.pending[: -self._head.config.window]

    def _new_cache(self) -> _Cache:
        config = self._head.config
        return _Cache(
            config.window, 2 * self._limits.max_nodes, config.num_kv_heads, config.head_dim
        )

    @override
    def learn(self, token_ids: list[int]) -> None:
        pass  # it drafts from hidden states, not from text

    @override
    def forget(self, key: ContextKey) -> None:
        self._contexts.pop(key, None)

    @override
    def shutdown(self) -> None:
        self._contexts.clear()

    @override
    def has_work(self) -> bool:
        return any(context.to_run for context in self._contexts.values())

    def _to_run(self, tree: _Tree) -> list[int]:
        """The likeliest nodes that have not been run and are worth running."""
        nodes = [
            node
            for node in tree.best(self._limits.max_nodes)
            if node not in tree.expanded
            and tree.nodes[node].depth < self._limits.max_depth
            and tree.nodes[node].path_prob >= self._limits.min_path_prob
        ]
        room = 2 * self._limits.max_nodes - len(tree.expanded)
        return nodes[: min(room, self._limits.max_rows_per_request)]

    def step(self) -> dict[ContextKey, Draft]:
        """Run the likeliest guesses of all requests."""
        chosen = self._choose()
        rows: list[_Row] = []
        for context, nodes in chosen.values():
            rows += context.pending if nodes == [-1] else []
            rows += [context.tree.nodes[node].row for node in nodes if node >= 0]
        if not rows:
            return {}
        tokens, before, positions = zip(*rows, strict=True)
        projected = self._head.project(list(tokens), np.stack(before), list(positions))
        outs: list[int] = []
        attended, start = [], 0
        for context, nodes in chosen.values():
            end = start + (len(context.pending) if nodes == [-1] else len(nodes))
            self._cache_rows(context, nodes, projected.key[start:end], projected.value[start:end])
            outs += range(end - len(nodes), end)
            attended.append(self._attend(context, nodes, projected.query[end - len(nodes) : end]))
            start = end
        states, logits = self._head.finish(projected.residual[outs], np.concatenate(attended))
        guesses = iter(zip(outs, states, self._guesses(logits), strict=True))
        drafts = {}
        for key, (context, nodes) in chosen.items():
            for node in nodes:
                out, state, children = next(guesses)
                context.tree.add_children(node, state, positions[out] + 1, children)
            context.to_run = self._to_run(context.tree)
            drafts[key] = self._draft(context)
        return drafts

    def _choose(self) -> dict[ContextKey, tuple[_HeadContext, list[int]]]:
        """Nodes to run in this step, by request."""
        candidates = [
            (1.0 if node < 0 else context.tree.nodes[node].path_prob, key, node)
            for key, context in self._contexts.items()
            for node in context.to_run
        ]
        chosen: dict[ContextKey, tuple[_HeadContext, list[int]]] = {}
        for _, key, node in heapq.nlargest(self._limits.max_rows, candidates, lambda item: item[0]):
            chosen.setdefault(key, (self._contexts[key], []))[1].append(node)
        return chosen

    def _cache_rows(
        self, context: _HeadContext, nodes: list[int], key: Floats, value: Floats
    ) -> None:
        tree, cache = context.tree, context.cache
        if nodes == [-1]:
            for row in range(len(context.pending)):
                cache.append(key[row], value[row])
            context.pending = []
            return
        for row, node in enumerate(nodes):
            tree.expanded[node] = len(tree.expanded)
            cache.put_node(tree.expanded[node], key[row], value[row])

    def _attend(self, context: _HeadContext, nodes: list[int], query: Floats) -> Floats:
        tree, cache = context.tree, context.cache
        num_nodes = len(tree.expanded)
        slots = cache.slots(num_nodes)
        visible = np.ones((len(nodes), slots.stop - slots.start), bool)
        visible[:, :num_nodes] = False
        for row, node in enumerate(nodes):
            visible[row, [num_nodes - 1 - number for number in tree.ancestors(node)]] = True
        return attend(query, cache.keys[:, slots], cache.values[:, slots], visible)

    def _guesses(self, logits: Floats) -> list[list[tuple[int, float]]]:
        """The likeliest tokens after each row, with their probabilities."""
        rows = np.arange(len(logits))
        largest = logits.max(axis=1, keepdims=True)
        total = np.exp(logits - largest).sum(axis=1)
        found = []
        # Finding the largest a few times is much faster than sorting thousands.
        for _ in range(min(self._limits.num_children, logits.shape[1])):
            column = logits.argmax(axis=1)
            found.append((column, np.exp(logits[rows, column] - largest[:, 0]) / total))
            logits[rows, column] = -np.inf
        return [
            [(int(self._head.vocabulary[column[row]]), float(prob[row])) for column, prob in found]
            for row in rows
        ]

    def _draft(self, context: _HeadContext) -> Draft:
        """The likeliest guesses of the tree, continued by the previous tree where it ends."""
        tree = context.tree
        # Path probability, token, parent and probability.
        guesses = [(n.path_prob, n.row.token_id, n.parent, n.prob) for n in tree.nodes]
        ends = [(i, n.hints) for i, n in enumerate(tree.nodes) if i not in tree.expanded]
        for parent, hints in ends:  # grows while it is read
            for token_id, (prob, after) in hints.items():
                ends.append((len(guesses), after))
                guesses.append((guesses[parent][0] * prob, token_id, parent, prob))
        best = heapq.nlargest(self._limits.max_nodes, range(len(guesses)), lambda i: guesses[i][0])
        number = {-1: -1} | {node: i for i, node in enumerate(sorted(best))}
        kept = [guesses[node] for node in sorted(best)]
        draft = Draft(
            context.num_tokens,
            tuple(guess[1] for guess in kept),
            tuple(number[guess[2]] for guess in kept),
            tuple(guess[3] for guess in kept),
        )
        context.hints = _hints(draft)
        return draft


def _hints(draft: Draft) -> Hints:
    root: Hints = {}
    after: list[Hints] = [{} for _ in draft.token_ids]
    for node, parent in enumerate(draft.parents):
        (root if parent < 0 else after[parent])[draft.token_ids[node]] = (
            draft.probs[node],
            after[node],
        )
    return root
