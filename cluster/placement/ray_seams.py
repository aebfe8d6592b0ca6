"""The seams with Ray, and the version of Ray that they are written for.

Two things we rely on are not in the table: Ray forgets gauges after 20 s, and `broadcast` is meant
to be rare, while `xyserve steps --follow` calls it twice a second.
"""

import dataclasses
from functools import cache

from workers.seams import SeamTable, seams

VERSION = "2.60.0"
REMEDY = f"install 'ray[serve]=={VERSION}'"

IN_REPLICAS = seams("""
# The routers, one of which carries out what the GlobalScheduler decides. Their base is alpha.
ray.serve.request_router:RequestRouter
    overridden initialize_state(self, **kwargs)
    overridden choose_replicas(self, candidate_replicas, pending_request=None)
    overridden create_replica_wrapper(self, replica_info)
    read app_name
ray.serve.request_router:PendingRequest
    read args metadata routing_context
ray.serve._private.common:RequestMetadata
    read is_streaming
ray.serve._private.request_router.common:RequestRoutingContext
    written should_backoff: bool
ray.serve.request_router:RunningReplica
    overridden try_send_request(self, pr, with_rejection)
    read replica_id
ray.serve._private.replica_result:ActorReplicaResult
    replaced get_rejection_response(self)
ray.serve._private.common
    called ReplicaQueueLengthInfo(accepted, num_ongoing_requests)
ray.serve._private.common:ReplicaID
    read unique_id: str

# What Serve's controller gives the policy that follows the GlobalScheduler's number of workers.
ray.serve.config:AutoscalingContext
    read raw_metrics policy_state target_num_replicas

# Counters that start at zero.
ray.util.metrics:Metric
    called _record(self, value, tags=None)

# What Serve calls on a replica, also when it begins to wait for the end of its calls, for which
# there is no hook, and what asks all replicas of a deployment.
ray.serve
    called ingress(app=None)
ray.serve._private.replica:Replica
    replaced _drain_ongoing_requests(self, min_draining_period_s=0.0, check_immediately=False)
ray.serve._private.constants
    named SERVE_LOGGER_NAME = "ray.serve"
ray.serve._private.logging_utils
    named isinstance(handler, logging.handlers.MemoryHandler)
ray.serve._private.replica
    named __serve_build_asgi_app__
    named self._callable.__del__
ray.serve.handle:DeploymentHandle
    called broadcast(self, method_name, *args, **kwargs)
ray.serve.handle:DeploymentBroadcastResponse
    called results_async(self, *, timeout_s=None, return_exceptions=False)
""")

# Used by the client handle, `xyserve up`, Serve's proxies and the tests; a replica would not import
# this much.
IN_COMMANDS = seams("""
ray.serve.handle:DeploymentBroadcastResponse
    called results(self, *, timeout_s=None, return_exceptions=False)
ray._private.authentication.authentication_token_setup
    called maybe_enable_token_auth_if_token_available(warn_if_disabled=True)
ray._private.gcs_utils
    called create_gcs_channel(address, aio=False)
ray._private.services
    called canonicalize_bootstrap_address(addr, temp_dir=None)
ray.core.generated.gcs_service_pb2
    read CheckAliveRequest
ray.core.generated.gcs_service_pb2_grpc
    read NodeInfoGcsServiceStub
ray.dashboard.modules.serve.sdk:ServeSubmissionClient
    called __init__(self, dashboard_head_address, create_cluster_if_needed=False, cookies=None,
        metadata=None, headers=None)
    called deploy_applications(self, config)
uvicorn.protocols.http.httptools_impl:RequestResponseCycle
    read transport response_complete
uvicorn.protocols.http.h11_impl:RequestResponseCycle
    read transport response_complete
uvicorn.protocols.http.auto
    written AutoHTTPProtocol
uvicorn.protocols.http.httptools_impl:HttpToolsProtocol
    overridden connection_made(self, transport)
    overridden connection_lost(self, exc)
    overridden data_received(self, data)
    read cycle loop transport
uvicorn.protocols.http.h11_impl:H11Protocol
    overridden connection_made(self, transport)
    overridden connection_lost(self, exc)
    overridden data_received(self, data)
    read cycle loop transport
ray._private.worker
    named kwargs.pop("_temp_dir"
ray._private.ray_constants
    named "prom_metrics_service_discovery.json"
""")

RAY = SeamTable("Ray", ("ray",), VERSION, REMEDY, IN_REPLICAS + IN_COMMANDS)


@cache
def check_seams() -> None:
    """Raise SeamBroken if Ray is not the one that our replicas are written for."""
    dataclasses.replace(RAY, seams=IN_REPLICAS).check()
