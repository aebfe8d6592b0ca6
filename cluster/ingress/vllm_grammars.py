"""What is accepted as structured output, checked alike for every worker before a request is sent.

It is checked here as far as it costs nothing: sizes, and keywords that would be ignored. The rest
is found by the worker that compiles the grammar within its bounds.
"""

import json
from collections.abc import Iterator, Set
from typing import Any

from vllm.entrypoints.serve.engine import protocol
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams, check_json_nesting
from vllm.tool_parsers import structural_tag_registry
from vllm.v1.structured_output import backend_xgrammar
from vllm.v1.structured_output.request import get_structured_output_key
from vllm.v1.structured_output.utils import choice_as_grammar

from cluster.ingress.json_schema import enforceable, first_fault
from cluster.ingress.vllm_seams import FRONT_END
from workers.config import GrammarConfig
from workers.engine_request import Grammar

RESOLVE_TOOL_STRICTNESS = structural_tag_registry.resolve_tool_strictness


def bound_grammars(bounds: GrammarConfig) -> None:
    """Have vLLM check what we accept, in the place of what it tries to compile itself."""

    def check(sampling_params: SamplingParams) -> None:
        _check(sampling_params, bounds)

    FRONT_END.replace(backend_xgrammar, "validate_xgrammar_grammar", check)
    FRONT_END.replace(structural_tag_registry, "resolve_tool_strictness", _resolve_tool_strictness)
    FRONT_END.replace(protocol, "_REMOVED_GUIDED_FIELDS", _GuidedFields())


class _GuidedFields:
    """Old names of structured output, which vLLM would ignore; it looks for them by `&`."""

    def __rand__(self, names: Set[str]) -> Set[str]:
        if guided := sorted(name for name in names if name.startswith("guided_")):
            raise ValueError(f"`{guided[0]}` is no longer known: use `structured_outputs`")
        return frozenset()


def grammar_of(params: SamplingParams) -> Grammar | None:
    """The grammar that a worker compiles for a request."""
    outputs = params.structured_outputs
    if outputs is None or outputs.all_constraints_none():
        return None
    kind, spec = get_structured_output_key(outputs)
    return Grammar(kind.name, spec)


def _check(params: SamplingParams, bounds: GrammarConfig) -> None:
    """Refuse what is too large, or would be ignored; a list of choices becomes a grammar."""
    outputs = params.structured_outputs
    if outputs is None:
        return
    for name in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"):
        if getattr(outputs, name):
            raise VLLMValidationError(
                f"`{name}` of structured output is a setting of the server, not of a request",
                parameter="structured_outputs",
            )
    if outputs.choice is not None:
        outputs.grammar = choice_as_grammar(outputs.choice)
        outputs.choice = None
    kind, spec = get_structured_output_key(outputs)
    name = kind.name.lower()
    if (size := len(spec.encode(errors="replace"))) > bounds.max_bytes:
        raise VLLMValidationError(
            f"The {name} of structured output has {size} bytes, over the limit of "
            f"{bounds.max_bytes} (worker.grammars.max_bytes)",
            parameter="structured_outputs",
        )
    for schema in _schemas(outputs):
        if fault := first_fault(schema):
            raise VLLMValidationError(
                f"The JSON schema of structured output cannot be obeyed: {fault}",
                parameter="structured_outputs",
            )


def _schemas(outputs: StructuredOutputsParams) -> Iterator[Any]:
    """The JSON schemas in what is asked for."""
    if outputs.json is not None:
        check_json_nesting(outputs.json)
        yield _parsed(outputs.json)
    elif outputs.structural_tag is not None:
        check_json_nesting(outputs.structural_tag, structural_tag=True)
        yield from _schemas_in(_parsed(outputs.structural_tag))


def _parsed(document: Any) -> Any:
    try:
        return json.loads(document) if isinstance(document, str) else document
    except ValueError as error:
        raise VLLMValidationError(
            f"The JSON of structured output cannot be read: {error}", parameter="structured_outputs"
        ) from None


def _schemas_in(tag: Any) -> Iterator[Any]:
    if isinstance(tag, dict):
        for name, value in tag.items():
            if name in ("json_schema", "schema"):
                yield value
            else:
                yield from _schemas_in(value)
    elif isinstance(tag, list):
        for item in tag:
            yield from _schemas_in(item)


def _resolve_tool_strictness(tools: Any, tool_choice: Any, strict_level: Any) -> Any:
    """vLLM's decision, but a tool that does not say `strict` is held to what can be obeyed.

    Tools are often made by programs, from schemas that nobody wrote for grammars.
    """
    resolved = RESOLVE_TOOL_STRICTNESS(tools, tool_choice, strict_level)
    if resolved is None:
        return None
    return [
        after if _function(before).strict else _widened(after)
        for before, after in zip(tools, resolved, strict=True)
    ]


def _function(tool: Any) -> Any:
    """What has a tool's `parameters` and `strict`: in chat a part of it, in responses itself."""
    return getattr(tool, "function", tool)


def _widened(tool: Any) -> Any:
    function = _function(tool)
    if getattr(function, "parameters", None) is None:
        return tool
    check_json_nesting(function.parameters)
    function = function.model_copy(update={"parameters": enforceable(function.parameters)})
    return tool.model_copy(update={"function": function}) if hasattr(tool, "function") else function
