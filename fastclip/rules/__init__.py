"""Clipping by any rule: group gradients, take the groups' norms, turn norms into coefficients.

The files in reading order:

- `groups`: which parameters form a group, and the norms of groups from the norms of parameters.
- `bounds`: the bounds of a rule: one number, one for each group, or a mapping from labels to numbers.
- `formulas`: the rules themselves, each a formula from norms to coefficients.
- `checkpoint`: a rule as plain data in a state dict, and back.
- `apply`: the engine that every in-place function calls: norms, then coefficients or limits, then the write.
- `clip_by`: the public in-place functions, `clip_grads_` first of all, and `measure_grads`.
- `out_of_place`: `clip_by_global_norm`, which returns new gradients and is differentiable; it uses no other file here.
"""
