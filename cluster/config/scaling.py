"""How the numbers of workers and draft workers are scaled, as configured.

`autoscaling` is Serve's own `autoscaling_config`, with one key of ours.
"""

from collections.abc import Mapping
from typing import Any

from scheduler.scaling import ScalingSettings

TARGET_ATTAINMENT = "target_attainment"
"""Our own key: the share of the requests with targets that should meet them."""
OF_SERVES_POLICY = ("policy", "target_ongoing_requests")
"""Keys with which Serve's own policy, or one of the user's, decides."""

_KEYS = {
    "min_replicas": "min_workers",
    "max_replicas": "max_workers",
    "downscale_delay_s": "hold_s",
    TARGET_ATTAINMENT: "target_attainment",
}
"""Keys of `autoscaling` that our policy follows, by its setting."""


def scaling_settings(autoscaling: Mapping[str, Any] | None) -> ScalingSettings | None:
    """The settings of our policy; None where it does not decide. ValueError names a wrong key."""
    if autoscaling is None or any(key in autoscaling for key in OF_SERVES_POLICY):
        if TARGET_ATTAINMENT in (autoscaling or {}):
            raise ValueError(
                f"{TARGET_ATTAINMENT} is for our policy, and {' and '.join(OF_SERVES_POLICY)} "
                "choose another one: leave one of them out"
            )
        return None
    found = {_KEYS[key]: value for key, value in autoscaling.items() if key in _KEYS}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            key = next(key for key, setting in _KEYS.items() if setting == name)
            raise ValueError(f"{key} ({value!r}) must be a number")
    try:
        return ScalingSettings(**found)
    except ValueError as error:
        text = str(error)
        for key, setting in _KEYS.items():
            text = text.replace(setting, key)
        raise ValueError(text) from None


def autoscaling_of_serve(autoscaling: Mapping[str, Any], policy: str) -> dict[str, Any]:
    """Serve's `autoscaling_config` under which it follows our policy, at this import path.

    Our policy waits by itself before it takes workers away.
    """
    own = {key: value for key, value in autoscaling.items() if key != TARGET_ATTAINMENT}
    delays = {"upscale_delay_s": 0.0} | own | {"downscale_delay_s": 0.0}
    return delays | {"policy": {"policy_function": policy}}
