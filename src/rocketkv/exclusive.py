"""One thread at a time: a second thread that calls an object meanwhile is refused."""

import sys
from collections.abc import Callable
from functools import wraps
from threading import get_ident
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from rocketkv.errors import InputError


class OneAtATime(Protocol):
    """An object whose `exclusive` methods only one thread may run at a time.

    Attributes:
        user: the thread that is running such a method, or an empty dict.
    """

    user: dict[str, int]


Self = TypeVar("Self", bound=OneAtATime)
Args = ParamSpec("Args")
Result = TypeVar("Result")


def exclusive(method: Callable[Concatenate[Self, Args], Result]) -> Callable[Concatenate[Self, Args], Result]:
    """Make `method` raise an InputError while another thread is inside an exclusive method of the same object.

    Such a method may call another one of the same object, and the object stays reserved until the outer call ends. If
    an interrupt ends a call before `user` is cleared, the object stays reserved for that call's thread, and the next
    call of that thread frees the object.
    """

    @wraps(method)
    def alone(self: Self, /, *args: Args.args, **kwargs: Args.kwargs) -> Result:
        thread = get_ident()
        is_inner = bool(self.user) and _is_inside(self)
        if self.user.setdefault("thread", thread) != thread:  # setdefault is atomic and cheaper than a lock
            raise InputError(
                f"{method.__name__}: another thread is using this cache; use a cache in one thread at a time, "
                "or give each thread its copy()."
            )
        try:
            return method(self, *args, **kwargs)
        finally:
            if not is_inner:
                self.user.clear()

    return alone


def _is_inside(user: object) -> bool:
    """Return whether the wrapper that calls this function was itself called from within one of the same object."""
    own = sys._getframe(1)
    frame = own.f_back
    while frame is not None and not (frame.f_code is own.f_code and frame.f_locals["self"] is user):
        frame = frame.f_back
    return frame is not None
