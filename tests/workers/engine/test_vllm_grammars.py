"""What is compiled as a grammar, and what is refused by name."""

import json
from collections.abc import Iterator

import pytest

from tests.workers.byte_grammars import TOKENIZER, matches
from workers.config import WorkerConfig
from workers.engine.vllm_grammars import GrammarCompiler
from workers.errors import GrammarRefused


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(TOKENIZER, WorkerConfig())
    yield compiler
    compiler.close()


@pytest.mark.parametrize("pattern", ["ab?", "(abc|def)?" * 200])
def test_a_grammar_holds_whether_it_was_sent_or_compiled_again(
    compiler: GrammarCompiler, pattern: str
) -> None:
    compiled = compiler.compile_regex(pattern)

    assert compiler.compile_regex(pattern) is compiled
    assert matches(compiled, "ab" if len(pattern) < 9 else "abcdefabc")
    assert not matches(compiled, "ba")


@pytest.mark.parametrize(
    ("method", "spec", "reason"),
    [
        ("compile_regex", "(?i)yes", "modifier flag is not supported"),
        ("compile_regex", r"\p{L}{3}", "Unicode character class escape"),
        ("compile_regex", "(?=a)a", "Lookahead is not supported"),
        ("compile_regex", r"\ba", "Word boundary is not supported"),
        ("compile_regex", r"(a)\1", "Backreference is not supported"),
        ("compile_regex", "a^b", "'^' should be at the start"),
        ("compile_regex", r"\Aa\Z", r"'\A' is not recognized"),
        ("compile_regex", r"[^\s\S]", "no text matches it"),
        ("compile_regex", "((", "parenthesis is not closed"),
        ("compile_grammar", "root ::= foo", '"foo" is not defined'),
        ("compile_grammar", "root ::= root", "no text matches it"),
        ("compile_grammar", "", "root"),
        ("compile_json_schema", '{"$ref": "#"}', "no text matches it"),
        ("compile_json_schema", '{"allOf": [{"type": "integer"}, {"minimum": 3}]}', "allOf"),
        ("compile_json_schema", '{"type": "string", "pattern": "^(?!a).$"}', "Lookahead"),
        ("compile_structural_tag", "{}", "format"),
    ],
)
def test_what_would_be_ignored_or_is_wrong_is_refused_by_name(
    compiler: GrammarCompiler, method: str, spec: str, reason: str
) -> None:
    with pytest.raises(GrammarRefused) as refused:
        getattr(compiler, method)(spec)

    assert reason in str(refused.value)
    assert ".cc:" not in str(refused.value)


@pytest.mark.parametrize(
    ("method", "spec"),
    [
        ("compile_regex", "((a*)*)*"),
        ("compile_regex", "(a{1,1000}){1,1000}"),
        ("compile_grammar", 'root ::= root "a" | "a"'),
        ("compile_grammar", "root ::= " + " | ".join(f'"choice {i}"' for i in range(2000))),
        ("compile_json_schema", json.dumps({"type": "array", "items": {}, "minItems": 10**6})),
        ("compile_json_schema", json.dumps({"type": "string", "maxLength": 10**9})),
    ],
)
def test_what_only_looks_large_is_compiled(
    compiler: GrammarCompiler, method: str, spec: str
) -> None:
    assert getattr(compiler, method)(spec).memory_size_bytes > 0
