"""What is refused before any actor of an app starts."""

from typing import Any

import pytest

from cluster.app import check_device, check_labels
from cluster.config.app_config import parse_args
from cluster.config.nodes import NodesConfig
from cluster.errors import DeviceMissing, NodeMissing


def node(num_cpus: float, **labels: str) -> dict[str, Any]:
    return {"Resources": {"CPU": num_cpus}, "Labels": {"ray.io/node-id": "1", **labels}}


NODES = [node(1, tier="front"), node(4, tier="back", zone="a")]


@pytest.mark.parametrize("labels", [{}, {"tier": "front"}, {"tier": "back", "zone": "a"}])
def test_labels_that_a_node_has_are_taken(labels: dict[str, str]) -> None:
    check_labels(NodesConfig(ingress=labels, worker=labels), NODES)


def test_labels_that_no_node_has_are_refused() -> None:
    with pytest.raises(NodeMissing) as raised:
        check_labels(NodesConfig(draft_worker={"tier": "front", "zone": "a"}), NODES)

    assert str(raised.value) == (
        "nodes.draft_worker is {'tier': 'front', 'zone': 'a'}, and no node of this Ray cluster has "
        "these labels: start one by `ray start --address=HEAD:6379 --labels=tier=front,zone=a`, "
        "change nodes.draft_worker, or set wait_for_device if the cluster grows on demand"
    )


def test_a_device_counts_only_on_nodes_with_the_labels_of_workers() -> None:
    args: dict[str, Any] = {"worker": {"cpus": 2}}
    check_device(parse_args(args), NODES)

    split = {"device": "cuda", "tensor_parallel_size": 2}
    with pytest.raises(DeviceMissing, match=r"needs 2 GPU on one node, but .* has 0: "):
        check_device(parse_args({"worker": split}), NODES)
    with pytest.raises(DeviceMissing, match=r"with the labels .*front.* of nodes.worker has 1:"):
        check_device(parse_args(args | {"nodes": {"worker": {"tier": "front"}}}), NODES)
