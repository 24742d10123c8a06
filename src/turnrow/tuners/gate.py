"""A gate in front of a model: calls of the model run side by side, a swap of its adapter runs alone."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from turnrow.errors import UserError

__all__ = ["SwapGate"]

Module = TypeVar("Module", bound=nn.Module)


class SwapGate:
    """Lets any number of threads run a model, and one thread change it while nobody runs it (a readers-writer lock).

    Made by `turnrow.swap_gate`. A thread that waits to change the model goes before threads that have not begun to run it, so
    it waits for running calls only. A thread that runs the model already may call it again, whoever waits.

    A call of the model must not wait for another thread that calls the model: with a swap waiting between the two, neither
    would go on.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: dict[int, int] = {}
        """Depth of the calls of each thread that runs the model."""
        self._waiting = 0
        """How many threads wait to be alone."""
        self._alone: int | None = None
        """The thread that is."""

    def __reduce__(self) -> tuple[type[SwapGate], tuple]:
        return SwapGate, ()  # a copy of a model is run and changed on its own

    @contextmanager
    def running(self) -> Iterator[None]:
        """In this block the model keeps its adapters: hold it around calls that belong together.

        Calls of a PeftModel, of its `generate` (a whole generation) and of what is under `guard` hold it by themselves.
        """
        thread = threading.get_ident()
        depth = self._running.get(thread, 0)
        try:
            self._begin(thread)
            yield
        finally:
            self._return_to(depth, thread)  # also where Ctrl-C came in the middle of beginning

    @contextmanager
    def alone(self) -> Iterator[None]:
        """In this block no other thread runs the model: for changes that are not to meet a running forward.

        `turnrow.hotswap_adapter` takes it by itself. It serves as well around other changes, such as `set_adapter`.

        Raises:
            UserError: this thread is running the model, so it would wait for itself.
        """
        thread = threading.get_ident()
        if self._alone == thread:
            yield
            return
        try:
            self._wait_to_be_alone(thread)
            yield
        finally:
            with self._changed:
                if self._alone == thread:
                    self._alone = None
                    self._changed.notify_all()

    def guard(self, module: Module) -> Module:
        """Put one more way into the model under the gate: what was compiled, where no lock can be held from inside.

        Args:
            module: what `torch.compile(module)` returned, or a module after `module.compile()`.

        Returns:
            The same module; each of its calls runs in `running` from now on.

        Raises:
            UserError: the module is not compiled.
        """
        if not self._guard(module):
            raise UserError(
                f"guard() is for compiled modules, and this {type(module).__name__} is not compiled: a call of the PeftModel itself "
                "is under the gate as it is; around anything else use `with gate.running():`"
            )
        return module

    def guards(self, module: nn.Module) -> bool:
        """Whether a call of `module` is held by this gate, as far as the module is compiled."""
        return all(getattr(call, "gate", None) is self for call in _compiled_calls(module).values())

    def _guard(self, module: nn.Module) -> bool:
        calls = _compiled_calls(module)
        for name, call in calls.items():
            if getattr(call, "gate", None) is not self:
                # Not setattr(), which torch.compile's module hands on to the module inside.
                module.__dict__[name] = self._held_around(call)
        return bool(calls)

    def _held_around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def held(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                return call(*args, **kwargs)

        held.gate = self  # type: ignore[attr-defined]
        return held

    def _begin(self, thread: int) -> None:
        with self._changed:
            if thread not in self._running and self._alone != thread:
                self._changed.wait_for(lambda: self._alone is None and not self._waiting)
            self._running[thread] = self._running.get(thread, 0) + 1

    def _return_to(self, depth: int, thread: int) -> None:
        with self._changed:
            if depth:
                self._running[thread] = depth
            elif self._running.pop(thread, 0):
                self._changed.notify_all()

    def _wait_to_be_alone(self, thread: int) -> None:
        with self._changed:
            if thread in self._running:
                raise UserError(
                    "the model is to be changed by a thread that is running it, which would wait for itself: leave the forward, or "
                    "the `with gate.running()`, before"
                )
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: self._alone is None and not self._running)
                self._alone = thread
            finally:
                self._waiting -= 1
                self._changed.notify_all()  # who waited for this one, should it give up


def _compiled_calls(module: nn.Module) -> dict[str, Callable[..., Any]]:
    """What runs compiled code when `module` is called, by the attribute it is under.

    A hook would do for most calls, but torch runs none of them after a KeyboardInterrupt.
    """
    if hasattr(module, "_orig_mod"):  # as torch.compile returns it; asked so, because importing its class takes seconds
        return {"forward": module.forward}
    in_place = module.__dict__.get("_compiled_call_impl")
    return {} if in_place is None else {"_compiled_call_impl": in_place}
