"""Errors of a worker that its callers handle in different ways."""


class WorkerDraining(RuntimeError):
    """The worker takes no new requests; place the request on another one."""


class WrongWorker(RuntimeError):
    """The request was placed on another worker, which Serve could not reach; place it again."""


class EngineDead(RuntimeError):
    """The engine failed or hangs; its worker must be replaced."""


class ClientLost(RuntimeError):
    """The client of a request has taken no tokens for a long time."""
