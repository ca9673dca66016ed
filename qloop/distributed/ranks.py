"""Calls that all ranks make together: if one fails, all end, and none waits for another."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from qloop.errors import QloopError

T = TypeVar("T")


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Calls a function on the main rank; every rank returns its result or raises its error."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except QloopError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    result, refusal = outcome
    if refusal:
        raise refusal
    return result  # type: ignore[no-any-return]


def on_all(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Calls a function on every rank; returns its own result, or all raise the error of one."""
    result, refusal = None, None
    try:
        result = function()
    except QloopError as error:
        refusal = error
    for found in gather_object([refusal]):
        if found:
            raise found
    return result  # type: ignore[return-value]
