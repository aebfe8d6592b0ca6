"""The errors that are answered to a user, each with its HTTP status."""

from http import HTTPStatus

from scheduler.placement import RefusalReason, Refused


class XYServeError(Exception):
    """An error that is answered to the user; `status` is the HTTP status."""

    status = 500


class ConfigError(XYServeError, ValueError):
    """The config has a key or value that cannot be used."""

    status = 400


class DeviceMissing(ConfigError):
    """No node of the Ray cluster has the device that the config asks for."""


class NodeMissing(ConfigError):
    """No node of the Ray cluster has the labels that the config asks for."""


class RequestFailed(XYServeError):
    """A request ended with an error; `status` and the message are the server's."""

    def __init__(self, message: str, status: int = 500) -> None:
        super().__init__(message, status)  # both, or unpickling loses the status
        self.message = message
        self.status = status

    def __str__(self) -> str:
        return self.message


class RequestRefused(RequestFailed):
    """The cluster does not take a request now: status 429 or 503, to be tried again later; 422 if
    it takes no equal one for a while."""

    def __init__(self, refused: Refused) -> None:
        found = f" ({refused.detail})" if refused.detail else ""
        message = f"{refused.reason.text}{found}; retry after {refused.retry_after_s:g} s"
        super().__init__(message, _STATUS_OF_REFUSAL[refused.reason])
        self.args = (refused,)  # what unpickling passes to __init__
        self.retry_after_s = refused.retry_after_s


class EnginesDied(RequestFailed):
    """Engines died or hang under a request, which is not tried again."""

    def __init__(self, num_deaths: int, reason: str) -> None:
        engines = "engines" if num_deaths > 1 else "engine"
        super().__init__(
            f"{num_deaths} {engines} died while they ran this request, so it is not tried again; "
            f"the last one: {reason}"
        )
        self.args = (num_deaths, reason)  # what unpickling passes to __init__


class RequestFailsSteps(RequestFailed):
    """A step that computed this request alone failed, so it is not tried again."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"a step with this request alone failed: {reason}")
        self.args = (reason,)  # what unpickling passes to __init__


_STATUS_OF_REFUSAL = {
    RefusalReason.NO_WORKER: HTTPStatus.SERVICE_UNAVAILABLE,
    RefusalReason.NO_IDLE_WORKER: HTTPStatus.SERVICE_UNAVAILABLE,
    RefusalReason.POISON: HTTPStatus.UNPROCESSABLE_ENTITY,
    RefusalReason.QUEUED: HTTPStatus.TOO_MANY_REQUESTS,
    RefusalReason.OVERLOAD: HTTPStatus.SERVICE_UNAVAILABLE,
    RefusalReason.TOO_LONG: HTTPStatus.SERVICE_UNAVAILABLE,
    RefusalReason.QUOTA: HTTPStatus.TOO_MANY_REQUESTS,
}


class HandleClosed(XYServeError, RuntimeError):
    """The client handle was closed, Ray was shut down, or the handle is another process's."""


class AppNotFound(XYServeError):
    """No such app runs on the Ray cluster."""

    status = 404
