"""Clipping inside of the training loop: in each step of an optimizer, or with a loss scale.

- `attach` reads the arguments of `fastclip.attach`.
- `attachment` has the class that it returns: hooks that torch calls in each step and for each state dict.
- `members` finds the optimizer's parameters, their names and their groups.
- `step` makes changes for one step, and undoes them after it.
- `folding` checks whether the optimizer itself can scale the gradients.
- `optimizers` recognises torch's optimizers, and steps of them that are running.
- `amp` stands alone: it removes the loss scale of mixed precision and clips in the same passes.

In ``optimizer.step()`` torch first calls the attachment's hook. The hook finds the members, applies the rule to their
gradients and tells the monitor. If there is a closure, it does so each time that the closure returns. It may change
something for this step only: the gradients (copies, or None to skip the step), ``grad_scale`` (folding) or
``found_inf`` (to skip the step). Then the optimizer updates the parameters, and a second hook undoes these changes.
"""
