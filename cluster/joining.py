"""Being part of a Ray cluster. It loads no torch, as drivers and routers have no use for it."""

import logging

import ray

LOOPBACK = "127.0.0.1"


def connect_ray() -> None:
    """Join the cluster of RAY_ADDRESS or of this machine, or start one for this process."""
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level=logging.WARNING)


def own_host() -> str:
    """This node's address, as others reach it."""
    host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return host
