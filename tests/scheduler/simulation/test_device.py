import json
from pathlib import Path

import pytest

from scheduler.simulation.device import DeviceProfile, device_names, read_device


@pytest.mark.parametrize("name", device_names())
def test_each_profile_of_the_package_can_be_read_and_written(name: str) -> None:
    device = read_device(name)

    assert device.name == name
    assert device.source
    assert device.num_kv_tokens > 4096
    assert DeviceProfile.from_dict(json.loads(json.dumps(device.to_dict()))).to_dict() == (
        device.to_dict()
    )


def test_the_measured_profile_is_that_of_the_cpu() -> None:
    device = read_device("cpu-avx512-smollm2-135m")

    assert not device.modelled
    assert 0.005 < device.cost_model.predict(device.cost_model.shape().plus(1, 100, 1)) < 0.05


def test_a_profile_outside_the_package_is_read_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(read_device("h200-llama-3-8b").to_dict() | {"name": "mine"}))

    assert read_device(path).name == read_device(str(path)).name == "mine"


def test_an_unknown_profile_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no device profile 'h100'; use one of a800-llama-3-8b"):
        read_device("h100")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"name": 1, "source": "", "modelled": 1}'])
def test_a_damaged_profile_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)

    with pytest.raises(ValueError, match=r"mine\.json is not a device profile"):
        read_device(path)
