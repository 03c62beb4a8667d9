"""The compiled extension: it loads, or says why not; a failure is kept and raised at first use with its remedy."""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from oslo_fusion import extension
from oslo_fusion.errors import ExtensionError, OsloFusionError

INFO_KEYS = {"compiler", "cpp_standard", "torch", "openmp", "vector_extension", "cuda"}


@pytest.fixture
def forget() -> Iterator[None]:
    """Each test makes its own attempt, and leaves none of it to the next."""
    extension._attempt.cache_clear()
    yield
    extension._attempt.cache_clear()


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, forget: None) -> Callable[[ModuleType | Exception], list[str]]:
    """Put an outcome in the place of importing the extension; gives the list of the imports that were tried."""

    def put(outcome: ModuleType | Exception) -> list[str]:
        tried: list[str] = []

        def import_module(name: str, package: str | None = None) -> ModuleType:
            tried.append(name)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(importlib, "import_module", import_module)
        return tried

    return put


def fake_module(torch_version: str) -> ModuleType:
    module = ModuleType("oslo_fusion._C")
    module.build_info = lambda: dict.fromkeys(INFO_KEYS, "no") | {"torch": torch_version}
    return module


@pytest.mark.usefixtures("forget")
def test_loads_here_or_reports_a_reason() -> None:
    reason = extension.failure()
    if reason is None:
        info = extension.build_info()
        assert set(info) == INFO_KEYS
        assert all(isinstance(value, str) and value for value in info.values())
        assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
        assert int(info["cpp_standard"]) >= 17
        assert extension.load() is extension.load()
    else:
        assert reason
        with pytest.raises(ExtensionError):
            extension.load()


def test_failure_is_kept_and_raised_at_every_use(pretend: Callable[[ModuleType | Exception], list[str]]) -> None:
    cause = ImportError("undefined symbol: _ZN3c106detail")
    tried = pretend(cause)
    assert tried == []
    assert extension.failure() == "undefined symbol: _ZN3c106detail"
    for use in (extension.load, extension.build_info, extension.load):
        with pytest.raises(ExtensionError, match="undefined symbol: _ZN3c106detail") as caught:
            use()
        assert caught.value.__cause__ is cause
    assert tried == ["oslo_fusion._C"], "one attempt, however often it is asked for"


def test_message_holds_the_remedy(pretend: Callable[[ModuleType | Exception], list[str]]) -> None:
    pretend(ModuleNotFoundError("No module named 'oslo_fusion._C'", name="oslo_fusion._C"))
    assert extension.failure() == "it was not built when oslo_fusion was installed"
    with pytest.raises(ExtensionError) as caught:
        extension.load()
    assert "it was not built" in str(caught.value)
    assert "OSLO_FUSION_EXTENSION=1 pip install --no-build-isolation" in str(caught.value)
    assert isinstance(caught.value, OsloFusionError)
    assert isinstance(caught.value, ImportError)


def test_a_failure_without_words_still_has_a_reason(pretend: Callable[[ModuleType | Exception], list[str]]) -> None:
    pretend(OSError())
    assert extension.failure() == "OSError"


@pytest.mark.parametrize("compiled", ["1.13.1", "2.2.0"])
def test_another_torch_is_refused(pretend: Callable[[ModuleType | Exception], list[str]], compiled: str) -> None:
    pretend(fake_module(compiled))
    reason = extension.failure()
    assert reason is not None
    assert compiled in reason
    assert torch.__version__ in reason


def test_another_patch_version_of_torch_is_accepted(pretend: Callable[[ModuleType | Exception], list[str]]) -> None:
    major, minor = torch.__version__.split(".")[:2]
    module = fake_module(f"{major}.{minor}.99")
    pretend(module)
    assert extension.failure() is None
    assert extension.load() is module


def test_importing_the_module_loads_nothing() -> None:
    code = "import sys, oslo_fusion.extension; sys.exit('oslo_fusion._C' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
