"""What a server gets where nothing is said."""

import pytest
import torch

from flora.cli.machine import available_memory_bytes, gpus, num_cores
from flora.cli.serving import read_keys
from flora.cli.sizing import default_pool_bytes, host_cache_bytes, resolve_device, weights_bytes
from flora.errors import UsageError


def test_auto_is_what_the_machine_has():
    expected = ("cuda", "bfloat16") if gpus() else ("cpu", "float32")

    assert resolve_device("auto", "auto") == expected
    assert resolve_device("cpu", "auto") == ("cpu", "float32")
    assert resolve_device("cuda:1", "float16") == ("cuda:1", "float16")


def test_the_driver_shows_as_many_gpus_as_torch():
    assert len(gpus()) == torch.cuda.device_count()


def test_weights_count_in_the_dtype_that_they_are_served_in(base):
    stored = num_weights(base)

    assert weights_bytes(base, "float32") == 4 * stored
    assert weights_bytes(base, "bfloat16") == 2 * stored


def num_weights(folder):
    from safetensors.torch import load_file

    return sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


def test_the_pool_leaves_memory_for_the_rest():
    pool_bytes = default_pool_bytes("cpu", weights_bytes=1 << 20)

    assert 0 < pool_bytes <= available_memory_bytes() / 3
    assert 0 < host_cache_bytes(None, is_page_locked=False) <= available_memory_bytes() / 4


def test_a_base_that_fills_the_machine_is_refused():
    with pytest.raises(UsageError, match="too much"):
        default_pool_bytes("cpu", weights_bytes=1 << 60)


def test_cores_are_those_that_this_process_may_use():
    assert 1 <= num_cores() <= 4096


def test_a_key_file_has_one_key_a_line(tmp_path):
    (tmp_path / "keys").write_text("# ours\none\n\n  two  \n")
    (tmp_path / "empty").write_text("# nothing\n")

    assert read_keys(tmp_path / "keys") == ("one", "two")
    with pytest.raises(UsageError, match="no key"):
        read_keys(tmp_path / "empty")


def test_a_host_cache_that_is_page_locked_must_fit_into_what_is_free():
    too_much = 1 << 60

    assert host_cache_bytes(1 << 20, is_page_locked=True) == 1 << 20
    assert host_cache_bytes(too_much, is_page_locked=False) == too_much, "a limit, taken as it fills"
    with pytest.raises(UsageError, match=r"a host cache of 1073741824\.0 GiB does not fit"):
        host_cache_bytes(too_much, is_page_locked=True)


def test_loader_processes_without_a_host_cache_are_refused_and_a_thread_is_not():
    with pytest.raises(UsageError, match="--host-cache 0 leaves 1 loader process no memory") as refused:
        host_cache_bytes(0, is_page_locked=False, num_loaders=1)
    assert "--loaders 0" in refused.value.fix

    assert host_cache_bytes(0, is_page_locked=False, num_loaders=0) == 0
