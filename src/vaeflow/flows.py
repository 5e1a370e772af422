"""What Prefect flows share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from vaeflow.errors import VaeflowError


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
