"""Joining a Ray cluster: its address is tried first, which Ray would retry for many minutes."""

import logging
import os
import re
from contextlib import closing

import grpc
import ray
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray._private.gcs_utils import create_gcs_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import AuthenticationError

ANSWER_TIMEOUT_S = 4.0
"""Time that a cluster has to answer; one that is busy answers in milliseconds."""

HOST_AND_PORT = re.compile(r"(?:[^:/\[\]\s]+|\[[0-9a-fA-F:.%]+\]):([0-9]{1,5})")

START_ONE = "start one with `xyserve up` or `ray start --head`"
RIGHT_ADDRESS = (
    "give the Ray address that `xyserve up` shows, or HOST:6379 if `ray start --head` started it"
)
TOKEN = "put what `ray get-auth-token` shows on its head node into ~/.ray/auth_token"


def join_ray_cluster(address: str | None) -> None:
    """Make this process a driver of the Ray cluster at `address`; see `find_ray_cluster`."""
    # It warns that a token is in use, which is for those who start a cluster.
    logging.getLogger(maybe_enable_token_auth_if_token_available.__module__).setLevel(logging.ERROR)
    # Ray itself does so only if it is to find the cluster, not for a given address.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    ray.init(address=find_ray_cluster(address), log_to_driver=False, logging_level="warning")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def find_ray_cluster(address: str | None) -> str:
    """HOST:PORT of the Ray cluster at `address`, by default RAY_ADDRESS or the one of this machine.

    ConnectionError within 5 s, with the address and a remedy, if no Ray cluster answers there.
    """
    name, remedy = repr(address), RIGHT_ADDRESS
    if address in (None, "", "auto") and (address := os.environ.get("RAY_ADDRESS")):
        name = f"RAY_ADDRESS={address}"
        remedy = f"{RIGHT_ADDRESS}, or unset RAY_ADDRESS for the cluster of this machine"
    if address in (None, "", "auto"):
        try:
            found = canonicalize_bootstrap_address("auto")
        except ConnectionError:
            raise ConnectionError(
                f"no Ray cluster runs on this machine; {START_ONE}, or give HOST:PORT of another"
            ) from None
        name, remedy = f"{found}, the latest of this machine", START_ONE
    elif (match := HOST_AND_PORT.fullmatch(address)) and 0 < int(match[1]) < 1 << 16:
        found = canonicalize_bootstrap_address(address)  # of 127.0.0.1, this machine's address
    else:
        raise ConnectionError(f"no address of a Ray cluster: {name} is not HOST:PORT; {remedy}")
    if fault := _fault(found):
        raise ConnectionError(f"no Ray cluster at {name}: {fault}; {remedy}")
    return str(found)


def _fault(address: str) -> str | None:
    """Why the server at HOST:PORT is no Ray cluster; None if it is one.

    ConnectionError if it is one that wants a token which this process does not have.
    """
    try:
        with closing(create_gcs_channel(address)) as channel:
            stub = NodeInfoGcsServiceStub(channel)
            stub.CheckAlive(CheckAliveRequest(), timeout=ANSWER_TIMEOUT_S)
    except AuthenticationError:
        raise ConnectionError(f"RAY_AUTH_MODE is token, but no token is found; {TOKEN}") from None
    except grpc.RpcError as error:
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.UNAUTHENTICATED:
            raise ConnectionError(
                f"the Ray cluster at {address} refuses our token; {TOKEN}"
            ) from None
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"nothing answers within {ANSWER_TIMEOUT_S:g} s"
        if code is grpc.StatusCode.UNIMPLEMENTED or "HTTP/2" in details:
            return "another server answers there"
        if "lookup" in details or "DNS" in details:
            return f"there is no host {address.rpartition(':')[0]}"
        return details.rpartition(": ")[2] or code.name
    return None
