"""What is measured on this machine, as the command line shows it, and measuring it again."""

import multiprocessing
import os
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from scheduler.policy import StepPolicy
from workers.config import WorkerConfig
from workers.cpus import claim_cpus
from workers.kernels import calibration, native, tile_table, tiles
from workers.profiling.engine_profile import (
    EngineProfile,
    Progress,
    load_profile,
    profile_key,
    profile_path,
    save_profile,
)

ENGINE_ENV = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True, slots=True)
class Calibration:
    """The costs of row tiles in use on this machine."""

    cpu: str
    isa: str
    path: Path
    """File of measured costs, whether or not it exists yet."""
    is_measured: bool
    """False for the built-in costs."""
    tile_costs: dict[str, tuple[float, ...]]
    """By what products make of their inputs (float32, bf16, int8): the time of one row tile by its
    height (index 0 is height 1), in any unit."""

    def row_tiles(self, inputs: str, num_rows: int) -> tuple[int, ...]:
        """Heights of the tiles that `num_rows` rows are cut into."""
        return tiles.row_tiles(num_rows, tiles.TileCosts(self.tile_costs[inputs]))


def current_calibration() -> Calibration:
    """The costs from which workers on this machine choose row tiles."""
    return Calibration(
        tile_table.cpu(),
        native.isa(),
        tile_table.path(),
        tile_table.is_measured(),
        {inputs: tile_table.tile_costs(inputs).of_height for inputs in tile_table.Inputs},
    )


def rounds_to(weight_format: str, activation_format: str) -> str | None:
    """What these formats of `WorkerConfig` round activations to on this machine; None: nothing."""
    inputs = tile_table.inputs_of(weight_format, activation_format)
    return None if inputs is tile_table.Inputs.FLOAT32 else str(inputs)


def calibrate(progress: Progress) -> Calibration:
    """Measure and save the costs, reporting the fraction done; OSError if they cannot be saved."""
    tile_table.save(calibration.measure(progress))
    return current_calibration()


class EngineNotMeasured(RuntimeError):
    """The engine did not start, or failed while it was measured."""


def current_profile(model: str, config: WorkerConfig) -> tuple[EngineProfile | None, Path]:
    """The profile that workers of `config` on this machine predict with, if any, and its file."""
    key = profile_key(model, config)
    return load_profile(key), profile_path(key)


def calibrate_engine(model: str, config: WorkerConfig, progress: Progress) -> EngineProfile:
    """Measure a full profile of an engine and save it; takes minutes.

    EngineNotMeasured if it fails; OSError: the profile cannot be saved.
    """
    profile = measure_engine(model, config, progress)
    save_profile(profile_key(model, config), profile)
    return profile


def measure_engine(model: str, config: WorkerConfig, progress: Progress) -> EngineProfile:
    """Measure the steps of an engine in a process with the environment and cores of a worker.

    EngineNotMeasured if it fails.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure_engine, args=(theirs, model, config), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process ends the pipe
    try:
        while not isinstance(message := ours.recv(), EngineProfile):
            if isinstance(message, Exception):
                raise EngineNotMeasured(str(message)) from message
            progress(message)
    except EOFError:
        process.join()
        raise EngineNotMeasured(f"its process ended with {process.exitcode}") from None
    finally:
        process.kill()  # vLLM holds nothing that needs an orderly end
        process.join()
    return message


def _measure_engine(pipe: Connection, model: str, config: WorkerConfig) -> None:
    os.environ.update(config.env | ENGINE_ENV)
    try:
        if config.runs_on_cpu:
            claim = claim_cpus(config.cpus)  # held until the process ends
            claim.pin_process()
        # Torch and vLLM read the environment when they are imported.
        from workers.engine.vllm_engine import VllmEngine
        from workers.profiling.vllm_profile import measure

        own_scheduler = replace(
            config, calibrate_at_start=False, step_policy=StepPolicy(), record=None
        )
        engine = VllmEngine(model, own_scheduler)
        pipe.send(measure(engine.core, "full", pipe.send))
    except Exception as error:
        pipe.send(EngineNotMeasured(f"{type(error).__name__}: {error}"))
