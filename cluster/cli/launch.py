"""What `xyserve up` does: start Ray and the app, show one answer, serve until a signal comes."""

import logging
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import openai
import ray
from openai.types.chat import ChatCompletionChunk
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatus
from rich.console import Console
from rich.markup import escape

import cluster
from cluster.cli.checks import Finding
from cluster.cli.doctor import print_findings
from cluster.cli.model import show_fetch
from cluster.cli.probes import examine
from cluster.client import XYServe
from cluster.config.app_config import AppConfig
from cluster.config.serve_file import ServeFile, read_serve_file
from cluster.errors import ConfigError, RequestFailed, XYServeError
from cluster.ingress.proxy import CALLBACK
from cluster.models.model import resolve_model

POLL_INTERVAL_S = 0.5
"""Time between two looks at the state of the app, well below its start-up time."""
DEMO_QUESTION = "What is the capital of France?"
RAY_COMMANDS = "  Ray's CLI    export RAY_AUTH_MODE=token      before `serve status` etc.\n"
"""Without it they do not send the token that Ray asks for and keeps in ~/.ray/auth_token."""


class StartFailed(XYServeError):
    """The app did not start; the message says why."""


class Phases:
    """Shows what is being done, and prints the duration of each phase when it is over."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began_s = time.monotonic()

    @contextmanager
    def phase(self, doing: str, done: str) -> Iterator[None]:
        """Run one phase; `done` is printed when it is over."""
        began_s = time.monotonic()
        with self._console.status(doing) as self._status:
            yield
        self._console.print(f"[green]✓[/] {done} [dim]{time.monotonic() - began_s:.1f} s[/]")

    def show(self, doing: str) -> None:
        """Change the text of the running phase."""
        self._status.update(doing)

    def total_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began_s


def launch(path: Path, *, demo: bool, temp_dir: Path | None, console: Console) -> None:
    """Serve the app of the config file at `path` until SIGINT or SIGTERM; leaves no process.

    Raises ConfigError before anything starts, StartFailed if the app does not start.
    """
    phases = Phases(console)
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)  # the phases show what matters
    with ExitStack() as stack:
        stack.enter_context(_signals_interrupt())
        with phases.phase("Checking config and machine", "Config and machine"):
            file = read_serve_file(path)
            _check_folder()
            findings = examine(file)
        if failures := [finding for finding in findings if finding.level == "fail"]:
            print_findings(failures, console)
            raise ConfigError(
                f"this machine cannot serve {path}; run `xyserve doctor {path}` for details"
            )
        with show_fetch() as progress:
            resolve_model(file.config.model, progress)
        token_mode_is_set = "RAY_AUTH_MODE" in os.environ  # if not, Ray sets it, in this process
        for name, value in CALLBACK.items():
            os.environ.setdefault(name, value)  # for Serve's proxies, which inherit it
        with phases.phase("Starting Ray", "Ray"):
            context = ray.init(
                address="local",
                num_cpus=_num_cpus(findings),
                include_dashboard=True,
                dashboard_host="127.0.0.1",  # it takes jobs, which run any code
                log_to_driver=False,
                logging_level="error",
                _temp_dir=str(temp_dir) if temp_dir else None,
            )
            stack.callback(ray.shutdown)
            # Again: Ray has installed its own handlers, which exit without a clean-up.
            stack.enter_context(_signals_interrupt())
        with phases.phase("Starting the app", "App"):
            stack.callback(serve.shutdown)
            _deploy(file, f"http://{context.dashboard_url}", phases)
        if demo:
            try:
                _show_answer(file, phases, console)
            except (openai.BadRequestError, RequestFailed) as error:  # no model for chats, perhaps
                console.print(f"\n[dim]no sample answer: {escape(str(error))}[/]")
        _say_who_may_call(file.config, console)
        console.print(
            f"\nReady after {phases.total_s():.0f} s.\n"
            f"  OpenAI API   {file.url}/v1      model {file.config.model_name}\n"
            f"  API docs     {file.url}/docs\n"
            f"  Metrics      {file.url}/metrics\n"
            f"  Dashboard    http://{context.dashboard_url}\n"
            f"  Ray address  {context.address_info['gcs_address']}\n"
            f"{'' if token_mode_is_set else RAY_COMMANDS}"
            "Ctrl-C stops it.",
            highlight=False,
        )
        try:
            while True:
                signal.pause()
        except KeyboardInterrupt:
            console.print("Stopping.")


def _check_folder() -> None:
    """ConfigError if Ray's processes would find another `cluster` here, where they look first."""
    found = PathFinder.find_spec("cluster", [str(Path.cwd())])
    if found and found.origin and not Path(found.origin).samefile(cluster.__file__):
        raise ConfigError(
            f"{found.origin} shadows XY-Serve's package in the processes of Ray that start here: "
            "rename it, or start in another folder"
        )


def _num_cpus(findings: list[Finding]) -> int | None:
    """CPUs for Ray to count: each core twice, once for the app and once for tasks of its users.

    Workers claim their cores by themselves. Of one CPU per core they would take all that there are
    for Ray, and a user's task would wait for ever. None, Ray's own count, if the app wants more
    cores than there are.
    """
    if any(finding.check == "cores" and finding.level != "ok" for finding in findings):
        return None
    return 2 * len(os.sched_getaffinity(0))


def _deploy(file: ServeFile, dashboard_url: str, phases: Phases) -> None:
    """Do what `serve deploy` does, and wait until the app is running, showing its replicas."""
    ServeSubmissionClient(dashboard_url).deploy_applications(file.raw)
    while True:
        status = serve.status().applications.get(file.app_name)
        phases.show(f"Starting the app: {_replicas(status)}")
        if status is not None and status.status == ApplicationStatus.RUNNING:
            return
        if status is not None and status.status == ApplicationStatus.DEPLOY_FAILED:
            raise StartFailed(_reasons(status))
        time.sleep(POLL_INTERVAL_S)


def _replicas(status: ApplicationStatusOverview | None) -> str:
    """Replicas of each deployment that are running, e.g. `Worker 1 of 2`."""
    if status is None:
        return "building"
    counts = []
    for name, deployment in status.deployments.items():
        num_running = deployment.replica_states.get("RUNNING", 0)
        counts.append(f"{name} {num_running} of {sum(deployment.replica_states.values())}")
    return ", ".join(counts)


def _reasons(status: ApplicationStatusOverview) -> str:
    """Why it failed: the last line of each error that the app's builder or its replicas raised."""
    messages = {
        name: deployment.message
        for name, deployment in status.deployments.items()
        if deployment.status == DeploymentStatus.DEPLOY_FAILED
    }
    return "\n".join(
        f"{name}: {message.strip().splitlines()[-1]}"
        for name, message in (messages or {"app": status.message}).items()
        if message.strip()
    )


def _say_who_may_call(config: AppConfig, console: Console) -> None:
    """Say who may call the app if it is not only those with keys."""
    if rights := config.auth.anonymous:
        console.print(f"[yellow]Everybody may call it without a key: {', '.join(rights)}.[/]")
    elif not config.auth.keys_file:
        console.print("[dim]It has no API keys: only programs on this machine may call it.[/]")


def _show_answer(file: ServeFile, phases: Phases, console: Console) -> None:
    """Ask one question, and print the answer as it arrives.

    With OpenAI's client; where that would need a key, with the Python handle, which needs none.
    """
    began_s = time.monotonic()
    question: Any = {
        "messages": [{"role": "user", "content": DEMO_QUESTION}],
        "max_tokens": 64,
        "temperature": 0,
    }
    stream: Iterable[ChatCompletionChunk]
    if file.config.auth.keys_file:
        handle = XYServe.connect(app=file.app_name)
        stream = handle.stream(question.pop("messages"), **question)
    else:
        client = openai.OpenAI(base_url=f"{file.url}/v1", api_key="none")
        stream = client.chat.completions.create(
            model=file.config.model_name, stream=True, **question
        )
    console.print(f"\n[bold]{DEMO_QUESTION}[/]")
    num_chunks, first_s = 0, 0.0
    for chunk in stream:
        if chunk.choices and (text := chunk.choices[0].delta.content):
            if not num_chunks:
                first_s = time.monotonic() - began_s
            num_chunks += 1
            console.print(text, end="", markup=False, highlight=False)
    took_s = time.monotonic() - began_s
    rate = (num_chunks - 1) / (took_s - first_s) if num_chunks > 1 else 0.0
    console.print(
        f"\n[dim]first token after {first_s * 1000:.0f} ms, then {rate:.1f} tokens/s; start to "
        f"first token {phases.total_s() - took_s + first_s:.0f} s[/]"
    )


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
