"""The metrics page of an app, made of what Ray's endpoints show."""

from prometheus_client.parser import text_string_to_metric_families

from cluster.observe.app_metrics import page_of

OF_RAY = 'Component="core_worker",NodeAddress="10.0.0.1",SessionName="s",Version="2",WorkerId="f"'
STARTED = 'ray_xyserve_start_time_seconds{{{ray},application="{app}",replica="{replica}"}} 9.0'
NODE = """\
# HELP ray_node_cpu_utilization Of Ray itself.
# TYPE ray_node_cpu_utilization gauge
ray_node_cpu_utilization{{{ray}}} 12.0
# HELP ray_xyserve_start_time_seconds Start.
# TYPE ray_xyserve_start_time_seconds gauge
{started}
# HELP ray_vllm_num_requests_running Number of requests.
# TYPE ray_vllm_num_requests_running gauge
ray_vllm_num_requests_running{{{ray},ReplicaId="{replica}",engine="0"}} {running}
# HELP ray_xyserve_step_tokens_total Tokens.
# TYPE ray_xyserve_step_tokens_total counter
ray_xyserve_step_tokens_total{{{ray},application="{app}",replica="{replica}",stage="decode"}} 0.0
# HELP ray_xyserve_step_seconds Duration.
# TYPE ray_xyserve_step_seconds histogram
ray_xyserve_step_seconds_bucket{{{ray},application="{app}",le="0.1",replica="{replica}"}} 3.0
ray_xyserve_step_seconds_bucket{{{ray},application="{app}",le="+Inf",replica="{replica}"}} 4.0
ray_xyserve_step_seconds_count{{{ray},application="{app}",replica="{replica}"}} 4.0
ray_xyserve_step_seconds_sum{{{ray},application="{app}",replica="{replica}"}} 0.77
"""


def node(app: str, replica: str, running: int) -> str:
    started = STARTED.format(ray=OF_RAY, app=app, replica=replica)
    return NODE.format(ray=OF_RAY, app=app, replica=replica, running=running, started=started)


def samples(page: bytes) -> dict[tuple[str, str], float]:
    """Values by the name of the sample and the replica."""
    return {
        (sample.name, sample.labels["replica"]): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def test_replicas_of_the_app_on_all_nodes_are_shown_and_those_of_others_are_not() -> None:
    texts = [node("mine", "a", 3), node("mine", "b", 4), node("other", "c", 5)]

    found = samples(page_of("mine", texts))

    assert {of for _, of in found} == {"a", "b"}
    assert found["vllm:num_requests_running", "a"] == 3.0
    assert found["vllm:num_requests_running", "b"] == 4.0


def test_names_and_types_are_the_own_ones_without_what_ray_adds() -> None:
    page = page_of("mine", [node("mine", "a", 3), node("mine", "b", 4)]).decode()

    assert "node_cpu" not in page
    assert "ray" not in page.replace("array", "")
    assert "NodeAddress" not in page
    assert "# TYPE vllm:num_requests_running gauge" in page
    assert page.count("# TYPE xyserve_step_tokens_total counter") == 1
    assert 'vllm:num_requests_running{engine="0",replica="a"} 3.0' in page


def test_a_zero_is_shown_and_an_estimated_sum_is_not() -> None:
    found = samples(page_of("mine", [node("mine", "a", 0)]))

    assert found["xyserve_step_tokens_total", "a"] == 0.0
    assert found["xyserve_step_seconds_count", "a"] == 4.0
    assert "xyserve_step_seconds_sum" not in {name for name, _ in found}


def test_an_app_that_has_exported_nothing_yet_has_an_empty_page() -> None:
    assert samples(page_of("mine", ["", node("other", "c", 5)])) == {}
