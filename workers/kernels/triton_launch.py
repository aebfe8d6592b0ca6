"""How a Triton kernel is launched: by Triton on the device, or by what stands in for one."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Launcher = Callable[[Any, int, tuple[Any, ...], Mapping[str, Any]], None]
"""Launches a kernel on so many programs, with its arguments and its constants."""


def by_triton(
    kernel: Any, num_programs: int, args: tuple[Any, ...], constants: Mapping[str, Any]
) -> None:
    """Launch on the device on which the arguments are."""
    kernel[(num_programs,)](*args, **constants)


_launchers: list[Launcher] = [by_triton]


def launch(kernel: Any, num_programs: int, *args: Any, **constants: Any) -> None:
    """Launch a kernel of a list of tasks; `constants` may have Triton's own options too."""
    _launchers[-1](kernel, num_programs, args, constants)


def launch_by(launcher: Launcher) -> None:
    """Have another launcher from now on."""
    _launchers.append(launcher)


@contextmanager
def launching(launcher: Launcher) -> Iterator[None]:
    """Have another launcher for a while."""
    _launchers.append(launcher)
    try:
        yield
    finally:
        _launchers.pop()
