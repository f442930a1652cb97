"""The precision of recurrent products follows TorchRL's rules, in every order of precedence."""

from __future__ import annotations

import itertools
import threading
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchrl.modules
from torchrl.modules.tensordict_module import _rnn_precision as theirs

import rnnkeys
from rnnkeys import precision as ours
from tests.support import recurrent

USER_MODES = ("auto", "fast", "high-prec", "ieee", "tf32", "tf32x3")
TORCH_MODES = ("highest", "high", "medium")
VARIABLE = "TORCHRL_RNN_PRECISION"
# Compute capability of the current GPU; None: there is no GPU.
GPUS: dict[str, tuple[int, int] | None] = {
    "no GPU": None,
    "Turing": (7, 5),
    "Ampere": (8, 0),
    "Hopper": (9, 0),
}
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    torch_mode, override = torch.get_float32_matmul_precision(), theirs._GLOBAL_OVERRIDE
    yield
    torch.set_float32_matmul_precision(torch_mode)
    theirs._GLOBAL_OVERRIDE = override
    theirs._is_tensor_core_capable.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Let torch believe in a GPU, or in none."""
    capability = GPUS[request.param]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    theirs._is_tensor_core_capable.cache_clear()


on_every_gpu = pytest.mark.parametrize("gpu", GPUS, indirect=True)


def test_precision_names_are_those_of_torchrl():
    for name in ("RecurrentMatmulPrecision", "RecurrentMatmulPrecisionUserMode"):
        assert typing.get_origin(getattr(ours, name)) is typing.Literal
        assert getattr(rnnkeys.precision, name) == getattr(theirs, name)
    assert typing.get_args(ours.RecurrentMatmulPrecisionUserMode) == USER_MODES


@on_every_gpu
@pytest.mark.usefixtures("gpu")
def test_precision_of_any_order_of_settings_resolves_as_in_torchrl(monkeypatch):
    """Argument, setter, environment, torch: all that can be said, by either library's setter."""
    seen = set()
    for variable, torch_mode in itertools.product((None, *USER_MODES), TORCH_MODES):
        torch.set_float32_matmul_precision(torch_mode)
        if variable is None:
            monkeypatch.delenv(VARIABLE, raising=False)
        else:
            monkeypatch.setenv(VARIABLE, variable)
        for setter, argument in itertools.product((None, *USER_MODES), (None, *USER_MODES)):
            theirs.set_recurrent_matmul_precision(setter)
            expected = theirs._resolve_precision(argument), theirs.get_recurrent_matmul_precision()
            theirs._GLOBAL_OVERRIDE = "ieee" if expected[1] != "ieee" else "tf32"
            ours.set_recurrent_matmul_precision(setter)
            assert (ours.resolve(argument), ours.get_recurrent_matmul_precision()) == expected
            seen.add(expected[0])
    assert seen == {"ieee", "tf32", "tf32x3"}


@on_every_gpu
@pytest.mark.usefixtures("gpu")
def test_precision_presets_follow_the_device_of_the_call(request):
    has_tf32 = request.node.callspec.params["gpu"] in ("Ampere", "Hopper")
    for preset, concrete in (("fast", "tf32"), ("high-prec", "tf32x3")):
        assert ours.resolve(preset, CUDA) == (concrete if has_tf32 else "ieee")
        assert ours.resolve(preset, torch.device("cpu")) == "ieee"
    for concrete in ("ieee", "tf32", "tf32x3"):
        assert ours.resolve(concrete, torch.device("cpu")) == concrete


def test_precision_of_the_environment_is_read_when_the_setter_is_cleared(monkeypatch):
    monkeypatch.setenv(VARIABLE, " TF32X3 ")
    for clear in (None, "auto"):
        ours.set_recurrent_matmul_precision("tf32")
        ours.set_recurrent_matmul_precision(clear)
        assert ours.get_recurrent_matmul_precision() == "tf32x3"
    monkeypatch.setenv(VARIABLE, "bf16")
    with pytest.raises(ValueError, match=f"{VARIABLE}='bf16'"):
        ours.set_recurrent_matmul_precision(None)


def test_precision_block_restores_the_setting_even_after_an_error():
    ours.set_recurrent_matmul_precision("tf32")
    with pytest.raises(ZeroDivisionError), ours.set_recurrent_matmul_precision("ieee"):
        assert ours.get_recurrent_matmul_precision() == "ieee"
        with ours.set_recurrent_matmul_precision("tf32x3"):
            assert theirs.get_recurrent_matmul_precision() == "tf32x3"
        assert ours.get_recurrent_matmul_precision() == "ieee"
        raise ZeroDivisionError
    assert ours.get_recurrent_matmul_precision() == "tf32"


def test_precision_object_serves_nested_and_repeated_blocks():
    ours.set_recurrent_matmul_precision("tf32")
    block = ours.set_recurrent_matmul_precision("ieee")
    for _ in range(2):
        with block, block:
            assert ours.get_recurrent_matmul_precision() == "ieee"
        assert ours.get_recurrent_matmul_precision() == "tf32"


def test_precision_call_without_a_block_holds_in_all_threads():
    ours.set_recurrent_matmul_precision("tf32x3")
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(ours.get_recurrent_matmul_precision()))
    thread.start()
    thread.join()
    assert found == ["tf32x3"]


@pytest.mark.parametrize("mode", ["bf16", "TF32", "", 32, ("tf32",)])
def test_precision_unknown_mode_raises_with_the_known_ones(mode: Any):
    message = f"mode={mode!r} is not a recurrent matmul precision; expected one of 'auto', 'fast'"
    with pytest.raises(ValueError) as error:
        ours.set_recurrent_matmul_precision(mode)
    assert message in str(error.value)
    with pytest.raises(ValueError, match="^recurrent_matmul_precision="):
        ours.resolve(mode)
    with pytest.raises(ValueError, match="^recurrent_matmul_precision="):
        recurrent.make("gru", recurrent_matmul_precision=mode)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_constructors_keep_the_mode_as_torchrls_do(kind):
    for mode in USER_MODES:
        module = recurrent.make(kind, recurrent_matmul_precision=mode)
        assert module.recurrent_matmul_precision == mode
        their_module = recurrent.make_theirs(kind, recurrent_matmul_precision=mode)
        assert their_module.recurrent_matmul_precision == mode
    assert recurrent.make(kind).recurrent_matmul_precision == "auto"
    assert torchrl.modules.set_recurrent_matmul_precision is theirs.set_recurrent_matmul_precision


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("backend", ["loop", "pad", "scan"])
def test_precision_on_a_cpu_changes_no_number(kind, backend):
    results = []
    for mode in USER_MODES:
        torch.manual_seed(0)
        arguments = {"recurrent_backend": backend, "recurrent_matmul_precision": mode}
        module = recurrent.make(kind, **arguments)
        results.append(recurrent.recurrently(module, recurrent.batch(module))["embed"])
    assert all(torch.equal(result, results[0]) for result in results)


def _library() -> str:
    return str(torch.backends.cuda.matmul.fp32_precision)


@pytest.mark.parametrize("torch_mode", TORCH_MODES)
def test_cublas_runs_at_the_mode_and_is_restored(torch_mode):
    torch.set_float32_matmul_precision(torch_mode)
    before = _library()
    for mode, wanted in (("tf32", "tf32"), ("tf32x3", "ieee"), ("ieee", "ieee")):
        with pytest.raises(ZeroDivisionError), ours.library_matmuls(mode):
            assert _library() == wanted
            raise ZeroDivisionError
        assert _library() == before
    assert torch.get_float32_matmul_precision() == torch_mode


def test_cublas_threads_that_need_different_modes_take_turns():
    before, wrong, meet = _library(), [], threading.Barrier(2)

    def work(mode: str, wanted: str) -> None:
        meet.wait()
        for _ in range(200):
            with ours.library_matmuls(mode):
                wrong.extend([mode] * (_library() != wanted))
                with ours.library_matmuls(mode):
                    wrong.extend([mode] * (_library() != wanted))

    threads = [threading.Thread(target=work, args=a) for a in (("tf32", "tf32"), ("ieee", "ieee"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and _library() == before


@pytest.mark.parametrize("gpu", ["Hopper"], indirect=True)
@pytest.mark.usefixtures("gpu")
def test_precision_where_torchs_flags_contradict_is_read():
    """Torch itself raises where the new flag allows what the old one forbids."""
    torch.set_float32_matmul_precision("highest")
    before = _library()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            torch.get_float32_matmul_precision()
        assert ours.get_recurrent_matmul_precision() == "tf32x3"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_cublas_products_of_another_thread_leave_torchs_setting():
    torch.set_float32_matmul_precision("highest")
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(ours._torch_precision()))
    with ours.library_matmuls("tf32"):
        reader.start()
        reader.join(0.2)
    reader.join()
    assert found == ["highest"]
