"""What Prefect flows share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vaeflow.errors import VaeflowError

if TYPE_CHECKING:
    from prefect.states import State


def without_traceback(function: Callable) -> Callable:
    """End a run that a user's mistake stopped as failed, with that message; bugs are raised."""
    from prefect.states import Failed

    # Prefect would look for the names in them here, where the wrapper is.
    function.__annotations__ = inspect.get_annotations(function, eval_str=True)

    @functools.wraps(function)
    def guarded(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except VaeflowError as error:
            return Failed(message=str(error), data=error)

    return guarded


def done(state: State) -> Any:
    """The value of a task that was called for its state; what stopped it is raised.

    The flow's own state then has the sentence. A task that ends with a failed state of its own
    would otherwise return as if it had a value, and Prefect would only count the failed states.
    """
    return state.result()
