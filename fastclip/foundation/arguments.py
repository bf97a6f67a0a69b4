"""Numbers and dtypes that a caller passed: taken as floats, or refused by the argument's name."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def as_float(name: str, value: object) -> float:
    """Return a number that the caller passed by this name, as torch takes it.

    Raises:
        TypeError: It is not a number.
        ValueError: It is a string that is not a number, or a tensor of several.
    """
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]  # as torch does
    except (TypeError, ValueError) as error:
        raise type(error)(f"`{name}` must be a real number, not {value!r}") from None


def check_norm_dtype(dtype: torch.dtype | None, name: str = "norm_dtype") -> None:
    """Refuse what a norm cannot be of, and the caller passed by this name.

    Raises:
        TypeError: It is no floating-point dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"`{name}` must be a floating-point dtype such as torch.float32, not {dtype!r}")


def positive(name: str, value: object) -> float:
    """Return a finite number above 0.

    Raises:
        TypeError: `value` is not a number.
        ValueError: It is not above 0, or not finite.
    """
    number = real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"`{name}` must be above 0 and finite, not {value}")
    return number


def real(name: str, value: object) -> float:
    """Return a number as a float.

    Raises:
        TypeError: `value` is not a number.
        ValueError: It is beyond the range of floats.
    """
    try:
        # float() takes text and booleans too, which are mistakes here.
        return float(None if isinstance(value, (str, bytes, bool)) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must be a real number, or one for each group, not {value!r}") from None
    except OverflowError:
        raise ValueError(f"`{name}` must be within the range of floats") from None


def check_real(name: str, value: object) -> None:
    """Refuse what is no real number.

    Raises:
        TypeError: It is text, a boolean, complex or something else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"`{name}` must be a real number, not {value!r}")


def check_count(name: str, value: object) -> None:
    """Refuse what is no whole number from 1 on.

    Raises:
        TypeError: It is not a whole number.
        ValueError: It is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, not {value}")
