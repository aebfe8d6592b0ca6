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


class EngineStalled(EngineDead):
    """The engine's step takes much longer than any before and than was predicted."""


class PoisonFound(WorkerError):
    """A step that computed nothing but this request failed, so the request is the cause."""


class WorkerSilent(WorkerError):
    """The worker is not heard of, or knows nothing of the request."""


class OutputsLost(WorkerError):
    """The request has ended on its worker, whose last outputs did not arrive."""


class GrammarRefused(ValueError):
    """The grammar of a request is wrong or beyond the bounds, or left no token to go on with."""


class ClientLost(WorkerError):
    """The client of a request has taken no tokens for a long time."""


class WorkerUnfit(RuntimeError):
    """The worker is to be replaced, though it works."""
