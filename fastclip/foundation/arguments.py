"""Checks of numbers and dtypes that a caller passed; errors name the argument."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def as_float(name: str, value: object) -> float:
    """Return a number as a float. Like torch, accept anything that `float` accepts.

    Raises:
        TypeError: `value` is not a number.
        ValueError: It is a string that is not a number, or a tensor of several elements.
    """
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]  # as torch does
    except (TypeError, ValueError) as error:
        raise type(error)(f"`{name}` must be a real number, not {value!r}") from None


def check_norm_dtype(dtype: torch.dtype | None, name: str = "norm_dtype") -> None:
    """Raise unless a dtype is one that a norm can have; None is accepted.

    Raises:
        TypeError: `dtype` is not a floating-point dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"`{name}` must be a floating-point dtype such as torch.float32, not {dtype!r}")


def positive(name: str, value: object) -> float:
    """Return a finite number above 0 as a float.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is not above 0, or not finite.
    """
    number = real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"`{name}` must be above 0 and finite, not {value}")
    return number


def real(name: str, value: object) -> float:
    """Return a number as a float. Strings and booleans are refused.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is beyond the range of floats.
    """
    try:
        return float(None if isinstance(value, (str, bytes, bool)) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must be a real number, or one for each group, not {value!r}") from None
    except OverflowError:
        raise ValueError(f"`{name}` must be within the range of floats") from None


def check_real(name: str, value: object) -> None:
    """Raise unless a value is a real number.

    Raises:
        TypeError: `value` is a string, a boolean, complex or something else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"`{name}` must be a real number, not {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise unless a value is True or False.

    Raises:
        TypeError: `value` is something else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be True or False, not {value!r}")


def check_count(name: str, value: object) -> None:
    """Raise unless a value is a positive integer.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, not {value}")
