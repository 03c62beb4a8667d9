"""The only module that writes to the user's model, and that can put everything back.

A swap gives a module a class made on demand from (our stateless donor, its own class). ``isinstance`` still holds, hooks,
parameters, ``state_dict`` keys and the module object itself stay. Such a class is found again when unpickled by its name,
through this module's ``__getattr__``; its qualified name therefore spells out both parts, without a dot.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from oslo_fusion.errors import PlanError
from oslo_fusion.plan import Settings, Swap

if TYPE_CHECKING:
    from typing_extensions import Self

SETTINGS = "_oslo_fusion_settings"
REPORT = "_oslo_fusion_report"
ATTRIBUTES = "_oslo_fusion_attributes"
"""Where an instance keeps the names of the attributes that were put on it."""

INNER = "inner"
"""The setting in which a :class:`Wrapping` keeps what it stands around."""

REPLACED = "_oslo_fusion_replaced"
"""Where it keeps what some of them took the place of, by name."""

_OURS = (SETTINGS, REPORT, ATTRIBUTES, REPLACED)

_CLASSES: dict[str, type[nn.Module]] = {}


def fused_class(donor: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """The class whose instances behave as ``donor`` and are still instances of ``original``.

    Args:
        donor: a stateless ``nn.Module`` subclass that overrides ``forward`` and calls ``super().forward`` to fall back.
        original: the module's own class.
    """
    name = f"{_spell(donor)}+{_spell(original)}"
    if name not in _CLASSES:
        _CLASSES[name] = type(
            f"{donor.__name__}[{original.__name__}]",
            (donor, original),
            {"__module__": __name__, "__qualname__": name, "__doc__": donor.__doc__},
        )
    return _CLASSES[name]


def __getattr__(name: str) -> Any:
    """Find a fused class by its qualified name: this is how ``pickle`` and ``torch.load`` reach it."""
    if "+" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    donor, original = name.split("+")
    return fused_class(_unspell(donor), _unspell(original))


def _spell(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}".replace(".", "/")


def _unspell(text: str) -> Any:
    module, qualname = text.replace("/", ".").split(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def is_fused(module: nn.Module) -> bool:
    """Whether this very module was swapped."""
    return _CLASSES.get(type(module).__qualname__) is type(module)


def swap(module: nn.Module, donor: type[nn.Module], settings: Settings) -> None:
    """Put ``donor`` in front of the module's class and hand it ``settings`` (picklable data, not part of the state)."""
    if is_fused(module):
        raise PlanError(f"{type(module).__name__}: is fused already. Remedy: restore the model first.")
    module.__class__ = fused_class(donor, type(module))
    module.__dict__[SETTINGS] = dict(settings)


def apply(model: nn.Module, swaps: Iterable[Swap]) -> None:
    """Make the swaps in order.

    Raises:
        PlanError: a path is not in this model.
    """
    for change in swaps:
        try:
            module = model.get_submodule(change.path)
        except AttributeError as error:
            raise PlanError(
                f"{change.path}: not in this {type(model).__name__} ({error}). Remedy: plan and apply on the same model."
            ) from None
        if change.attribute:
            put(module, change)
        else:
            swap(module, change.donor, change.settings)


def put(module: nn.Module, change: Swap) -> None:
    """Put an attribute on the instance, where Python finds it before the method of that name, or in place of its own.

    A :class:`Wrapping` donor is put around one of ours that stands there.
    """
    name, where = change.attribute, change.path or type(module).__name__
    standing = module.__dict__.get(name)
    if isinstance(standing, Standing) and issubclass(change.donor, Wrapping):
        module.__dict__[name] = change.donor(module, {**change.settings, INNER: standing})
        return
    if name in module.__dict__.get(ATTRIBUTES, ()):
        raise PlanError(f"{where}: its {name} was put there by a plan. Remedy: restore the model first.")
    if change.replaces and name not in module.__dict__:
        raise PlanError(f"{where}: has no attribute {name} to replace. Remedy: plan and apply on the same model.")
    if not change.replaces and name in module.__dict__:
        raise PlanError(f"{where}: has an attribute {name} of its own. Remedy: restore the model first, or undo that patch.")
    given = change.donor(module, change.settings)
    if change.replaces:
        # A dictionary of its own for every change, as a snapshot holds the earlier one.
        module.__dict__[REPLACED] = {**module.__dict__.get(REPLACED, {}), name: module.__dict__[name]}
    module.__dict__[name] = given
    module.__dict__[ATTRIBUTES] = (*module.__dict__.get(ATTRIBUTES, ()), name)


class Standing:
    """A picklable callable that stands on a module instance under a method's name, and holds the module weakly.

    Copied or pickled with its module, the copy belongs to the copied module.

    Args:
        module: the instance it stands on.
        settings: what the plan decided.
    """

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        self._module = weakref.ref(module)
        self.settings = dict(settings)

    @property
    def module(self) -> Any:
        """The instance.

        Raises:
            RuntimeError: it is gone.
        """
        module = self._module()
        if module is None:
            raise RuntimeError(
                f"{type(self).__name__}: the module that was initialized is gone and this is a shallow copy of it. Remedy: "
                "copy.deepcopy, or call oslo_fusion.initialize on the copy."
            )
        return module

    def look_ahead(self) -> Any:
        """What a call looks at first whatever its arguments are, for :func:`ahead`; None if there is nothing that helps."""
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        module: Any = self._module()
        return type(self)(memo.get(id(module), module), copy.deepcopy(self.settings, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._module(), self.settings)


class Wrapping(Standing):
    """One that stands on ``forward`` and may stand around another: :attr:`inner` is what it calls."""

    @property
    def inner(self) -> Any:
        """The one that stood there before, or the method of the module's class."""
        standing = self.settings.get(INNER)
        return type(self.module).forward.__get__(self.module) if standing is None else standing


_LOCAL = threading.local()


@contextlib.contextmanager
def ahead(standing: Iterable[object]) -> Iterator[None]:
    """Look ahead, then wait for the device in the body and make the call that was looked ahead for.

    What a call looks at before it launches anything is then done while the device still works. Each finding serves one call, in
    this thread, and none after the body.

    Args:
        standing: what that call will reach; what is not :class:`Standing` has nothing to look at.
    """
    outer = getattr(_LOCAL, "found", None)
    _LOCAL.found = {one: found for one in standing if isinstance(one, Standing) and (found := one.look_ahead()) is not None}
    try:
        yield
    finally:
        _LOCAL.found = outer


def found_ahead(one: Standing) -> Any:
    """What it found when it was made to look ahead for this call; None if it was not, or nothing."""
    found = getattr(_LOCAL, "found", None)
    return found.pop(one, None) if found else None


def restore(model: nn.Module) -> None:
    """Give every swapped module its own class and attributes back and forget the report.

    Raises:
        PlanError: a module's class was changed again after ``initialize``, by FSDP say; nothing is changed then.
    """
    modules = list(model.modules())
    for module in modules:
        if SETTINGS in module.__dict__ and not is_fused(module):
            raise PlanError(
                f"restore: a module's class was changed to {type(module).__name__} after initialize. Remedy: undo that "
                "first, or restore before wrapping."
            )
    for module in modules:
        if is_fused(module):
            module.__class__ = type(module).__bases__[1]
        _strip(module)


def attach(model: nn.Module, report: object) -> None:
    """Keep the report on the model, outside its state, so that it survives ``deepcopy`` and pickling."""
    model.__dict__[REPORT] = report


def attached(model: nn.Module) -> object:
    """The report of the first initialized module at or inside ``model``, or None."""
    return next((m.__dict__[REPORT] for m in model.modules() if REPORT in m.__dict__), None)


@contextlib.contextmanager
def transaction(model: nn.Module) -> Iterator[None]:
    """Leave the model exactly as it was if the body raises."""
    saved = _snapshot(model)
    try:
        yield
    except BaseException:
        _put_back(saved)
        raise


@contextlib.contextmanager
def as_restored(model: nn.Module) -> Iterator[None]:
    """Show the model as if it had never been initialized, for the length of the body."""
    saved = _snapshot(model)
    try:
        restore(model)
        yield
    finally:
        _put_back(saved)


_Saved = list[tuple[nn.Module, type[nn.Module], dict[str, Any]]]


def _snapshot(model: nn.Module) -> _Saved:
    return [(m, type(m), {n: m.__dict__[n] for n in _names(m)}) for m in model.modules()]


def _names(module: nn.Module) -> tuple[str, ...]:
    """What of the instance is ours."""
    return tuple(n for n in (*module.__dict__.get(ATTRIBUTES, ()), *_OURS) if n in module.__dict__)


def _strip(module: nn.Module) -> None:
    """Take what is ours off the instance, and give it what that took the place of."""
    replaced = module.__dict__.get(REPLACED, {})
    for name in _names(module):
        del module.__dict__[name]
    module.__dict__.update(replaced)


def _put_back(saved: _Saved) -> None:
    for module, cls, attributes in saved:
        if type(module) is not cls:
            module.__class__ = cls
        _strip(module)
        module.__dict__.update(attributes)
