import json
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler.simulation.device import PROFILES, DeviceProfile
from scheduler.simulation.roofline import (
    ACCELERATORS,
    MODELS,
    modelled_profiles,
    roofline,
    write_profiles,
)


def decode_s(device: DeviceProfile, batch: int, context: int = 1000) -> float:
    shape = device.cost_model.shape()
    for _ in range(batch):
        shape.add(1, context, 1)
    return device.cost_model.predict(shape)


def prefill_s(device: DeviceProfile, num_tokens: int) -> float:
    shape = device.cost_model.shape()
    shape.add(num_tokens, num_tokens, 1)
    return device.cost_model.predict(shape)


def h200() -> DeviceProfile:
    return roofline(ACCELERATORS["h200"], MODELS["llama-3-8b"], name="h200-llama-3-8b")


def test_the_packages_profiles_from_data_sheets_are_what_the_roofline_writes(
    tmp_path: Path,
) -> None:
    write_profiles(tmp_path)

    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in PROFILES.glob("*.json")}
    assert written == {
        name: text
        for name, text in kept.items()
        if json.loads(text)["source"].startswith("Roofline")
    }


def test_a_modelled_profile_says_that_it_was_not_measured() -> None:
    assert all(
        device.modelled and "Not measured" in device.source for device in modelled_profiles()
    )


def test_a_model_that_does_not_fit_into_the_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Qwen2\.5-32B does not fit into the memory of Ascend"):
        roofline(ACCELERATORS["ascend-910b"], MODELS["qwen2.5-32b"], name="too-large")


def test_a_small_step_is_bound_by_reading_the_weights() -> None:
    accelerator, device = ACCELERATORS["h200"], h200()
    weights_s = (8.03e9 - 128256 * 4096) * 2 / (accelerator.bandwidth * 0.75)

    # The embedding is looked up, not multiplied with.
    alone_s = decode_s(device, 1, context=1)
    assert alone_s == pytest.approx(weights_s + accelerator.launch_s, rel=0.01)
    assert decode_s(device, 16, context=1) == pytest.approx(alone_s, rel=0.01)


def test_a_large_step_is_bound_by_arithmetic() -> None:
    accelerator, device = ACCELERATORS["h200"], h200()
    body = MODELS["llama-3-8b"].num_body_parameters
    arithmetic_s = 2 * body * 4096 / (accelerator.flops * 0.55)
    pairs_s = 4 * 4096 * 32 * (4096 * 4097 / 2) / (accelerator.flops * 0.55)

    assert prefill_s(device, 4096) == pytest.approx(arithmetic_s + pairs_s, rel=0.2)


def test_context_costs_the_reading_of_its_keys_and_values() -> None:
    device = h200()
    extra_s = decode_s(device, 64, context=8000) - decode_s(device, 64, context=1)

    assert extra_s == pytest.approx(64 * 7999 * 131072 / (4.8e12 * 0.75), rel=0.1)


def test_the_cache_fills_what_the_weights_leave() -> None:
    device = h200()

    assert device.num_kv_tokens * 131072 == pytest.approx(141e9 * 0.9 - 2 * 8.03e9, rel=0.001)


def test_a_tied_embedding_is_counted_once() -> None:
    model = MODELS["llama-3-8b"]

    tied = replace(model, ties_embedding=True)

    assert tied.num_body_parameters - model.num_body_parameters == 128256 * 4096
