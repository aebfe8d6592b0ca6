"""Errors of a worker that its callers handle in different ways."""


class WorkerError(RuntimeError):
    """A request that its worker did not finish; returned to the client, as Serve would log it as a
    crash of the replica, with a traceback, if it were raised."""


class WorkerDraining(WorkerError):
    """The worker takes no new requests; place the request on another one."""


class WrongWorker(WorkerError):
    """The request was placed on another worker, which Serve could not reach; place it again."""


class EngineDead(WorkerError):
    """The engine failed or hangs; its worker must be replaced."""


class StepFailed(EngineDead):
    """The engine failed in a step that computed this request, which may be the cause."""


class GrammarRefused(ValueError):
    """The grammar of a request is wrong or beyond the bounds, or left no token to go on with."""


class ClientLost(WorkerError):
    """The client of a request has taken no tokens for a long time."""


class WorkerUnfit(RuntimeError):
    """The worker is to be replaced, though it works."""
