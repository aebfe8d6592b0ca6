import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from cluster.config.slo import SloClass, SloConfig
from cluster.errors import RequestFailed
from cluster.ingress.protocol import HEADERS, PARAMETERS, Names
from cluster.ingress.targets import Targets, read_targets
from scheduler.request import Slo

CONFIG = SloConfig(classes={"fast": SloClass(ttft_ms=500, tpot_ms=50)})
HUGE = 10**5000
"""With more digits than Python would write."""
FAST = Slo(ttft_s=0.5, tpot_s=0.05)


def of_headers(config: SloConfig = CONFIG, /, **headers: str) -> Targets:
    """The targets by `headers`, with underscores for the hyphens of their names."""
    raw = {name.replace("_", "-"): value for name, value in headers.items()}
    return read_targets(config, Headers(raw), HEADERS)


def refusal_of(**headers: str) -> str:
    with pytest.raises(RequestFailed) as refused:
        of_headers(**headers)
    assert refused.value.status == 400
    return str(refused.value)


def test_the_built_in_classes_are_there_without_a_config() -> None:
    assert SloConfig().all_classes == {
        "interactive": SloClass(ttft_ms=1000, tpot_ms=100),
        "standard": SloClass(ttft_ms=10_000, tpot_ms=250),
        "batch": SloClass(ttft_ms=None, tpot_ms=None),
    }


def test_a_configs_classes_are_added_to_the_built_in_ones_or_replace_them_as_a_whole() -> None:
    config = SloConfig(classes={"night": SloClass(), "interactive": SloClass(ttft_ms=5)})

    assert config.all_classes == SloConfig().all_classes | {
        "night": SloClass(),
        "interactive": SloClass(ttft_ms=5, tpot_ms=None),
    }


def test_a_request_that_names_no_class_is_of_the_default_class() -> None:
    assert of_headers() == Targets(Slo(ttft_s=10, tpot_s=0.25), "standard")
    assert of_headers(SloConfig(default="batch")) == Targets(Slo(), "batch")


def test_a_request_has_the_targets_of_its_class() -> None:
    assert of_headers(x_slo_class="fast") == Targets(FAST, "fast", is_named=True)
    assert of_headers(X_SLO_Class="fast") == Targets(FAST, "fast", is_named=True)


def test_a_request_may_bring_single_targets_of_its_own() -> None:
    assert of_headers(x_slo_class="fast", x_slo_ttft_ms="200") == Targets(
        Slo(0.2, 0.05), "fast", is_named=True
    )
    assert of_headers(x_slo_class="batch", X_SLO_TPOT_MS="12.5") == Targets(
        Slo(math.inf, 0.0125), "batch", is_named=True
    )


@pytest.mark.parametrize("value", ["none", "inf", " None ", "INF"])
def test_a_request_may_lift_a_target_of_its_class(value: str) -> None:
    assert of_headers(x_slo_class="fast", x_slo_tpot_ms=value) == Targets(
        Slo(0.5, math.inf), "fast", is_named=True
    )


@pytest.mark.parametrize("name", ["", "FAST", "fastest", "fast, fast"])
def test_an_unknown_class_is_refused_with_those_there_are(name: str) -> None:
    assert refusal_of(x_slo_class=name) == (
        f"x-slo-class: {name!r} is no service class; known are batch, fast, interactive, standard"
    )


@pytest.mark.parametrize(
    "value", ["0", "-5", "nan", "-inf", "", "soon", "1e999", "1e-999", "5e-324", "5 ms", "0x10"]
)
def test_what_is_no_target_is_refused_with_its_header_and_a_remedy(value: str) -> None:
    assert refusal_of(x_slo_ttft_ms=value) == (
        f"x-slo-ttft-ms: {value!r} is no target; give a positive number of milliseconds, or "
        "`none` for no target"
    )


def test_a_long_value_is_refused_in_few_words() -> None:
    assert len(refusal_of(x_slo_class="x" * 10_000)) < 200
    assert len(refusal_of(x_slo_tpot_ms="9" * 10_000)) < 200


def test_a_call_of_the_handle_has_parameters_of_the_same_meaning() -> None:
    params: dict[str, Any] = {"slo_class": "fast", "slo_ttft_ms": 200, "slo_tpot_ms": math.inf}

    assert read_targets(CONFIG, params, PARAMETERS) == Targets(
        Slo(0.2, math.inf), "fast", is_named=True
    )
    assert read_targets(CONFIG, dict.fromkeys(PARAMETERS), PARAMETERS) == of_headers()


@pytest.mark.parametrize("value", [True, 0, math.nan, [5], b"5", HUGE], ids=type)
def test_a_parameter_that_is_no_target_is_refused_by_its_own_name(value: Any) -> None:
    with pytest.raises(RequestFailed, match=r"^slo_tpot_ms: .* is no target") as refused:
        read_targets(CONFIG, {"slo_tpot_ms": value}, PARAMETERS)
    assert refused.value.status == 400


def answer_to(given: dict[str, Any], names: Names) -> tuple[int, str]:
    """Status and text of the answer to what a request brought, if it were only about that."""
    try:
        return 200, read_targets(CONFIG, given, names).slo_class
    except RequestFailed as failure:
        return failure.status, str(failure)


numbers = st.integers() | st.floats()
raw = st.binary().map(lambda value: value.decode("latin-1"))
written = raw | numbers.map(str) | st.sampled_from(sorted(CONFIG.classes))


@given(st.dictionaries(st.sampled_from(HEADERS), written))
@settings(deadline=None)
@example({"x-slo-ttft-ms": "9" * 400})
@example({"x-slo-class": "fast", "x-slo-tpot-ms": "\u0661"})
def test_any_headers_give_targets_or_the_refusal(given: dict[str, str]) -> None:
    status, text = answer_to(given, HEADERS)

    assert status in (200, 400)
    assert text.encode()


@given(
    st.dictionaries(
        st.sampled_from(PARAMETERS),
        st.none() | st.booleans() | numbers | st.text(st.characters()) | st.binary(),
    )
)
@settings(deadline=None)
@example({"slo_class": "\ud800"})
def test_any_parameters_give_targets_or_the_refusal(given: dict[str, Any]) -> None:
    status, text = answer_to(given, PARAMETERS)

    assert status in (200, 400)
    assert text.encode()
