"""Clipping as torch does it: collect gradients, prepare them, reduce them to a norm, scale or clamp them.

In reading order: clipping.py has torch's four functions. collect.py lists what the caller passed (owners.py) and
collects its gradients (gradients.py). prepare.py finds alike gradients of an earlier call (cache.py); the first time,
first_time.py checks them (checks.py), dispatches them to backends and has plans made. The result can be reduced, scaled
and clamped (prepared.py): planned.py does it by the plans of one process, and `sharding` by several processes together,
for DTensors (dtensors.py). nonfinite.py words the error for a norm that is not finite.
"""
