import json
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler.simulation.device import (
    ACCELERATORS,
    MODELS,
    PROFILES,
    DeviceProfile,
    device_names,
    read_device,
    roofline,
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


@pytest.mark.parametrize("name", device_names())
def test_each_profile_of_the_package_can_be_read_and_written(name: str) -> None:
    device = read_device(name)

    assert device.name == name
    assert device.source
    assert device.num_kv_tokens > 4096
    assert DeviceProfile.from_dict(json.loads(json.dumps(device.to_dict()))).to_dict() == (
        device.to_dict()
    )


@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize("model", MODELS)
def test_the_modelled_profiles_are_what_the_roofline_gives(accelerator: str, model: str) -> None:
    name = f"{accelerator}-{model}"
    if name not in device_names():
        with pytest.raises(ValueError, match="does not fit into the memory"):
            roofline(ACCELERATORS[accelerator], MODELS[model], name=name)
        return

    device = roofline(ACCELERATORS[accelerator], MODELS[model], name=name)

    assert read_device(name).to_dict() == device.to_dict()
    assert device.modelled
    assert "Not measured" in device.source


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


def test_the_measured_profile_is_that_of_the_cpu() -> None:
    device = read_device("cpu-avx512-smollm2-135m")

    assert not device.modelled
    assert 0.005 < decode_s(device, 1, context=100) < 0.05


def test_ones_own_profile_is_read_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(h200().to_dict() | {"name": "mine"}))

    assert read_device(path).name == read_device(str(path)).name == "mine"


def test_an_unknown_profile_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no device profile 'h100'; use one of a800-llama-3-8b"):
        read_device("h100")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"name": 1, "source": "", "modelled": 1}'])
def test_a_damaged_profile_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)

    with pytest.raises(ValueError, match=r"mine\.json is no device profile"):
        read_device(path)


def test_profiles_are_in_the_package() -> None:
    assert {path.stem for path in PROFILES.glob("*.json")} == set(device_names())
