"""The errors a user can cause, each with its HTTP status."""


class XYServeError(Exception):
    """Base of the errors that are answered to the user; `status` is the HTTP status."""

    status = 500


class ConfigError(XYServeError, ValueError):
    """The config has a key or value that cannot be used."""

    status = 400


class DeviceMissing(ConfigError):
    """No node of the Ray cluster has the device that the config asks for."""


class RequestFailed(XYServeError):
    """A request ended with an error; `status` and the message are the server's."""

    def __init__(self, message: str, status: int = 500) -> None:
        super().__init__(message, status)  # both, or unpickling loses the status
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


class AppNotFound(XYServeError):
    """No such app runs on the Ray cluster."""

    status = 404
