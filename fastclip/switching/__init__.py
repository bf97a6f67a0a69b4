"""Switching fastclip on: patch torch in a program, run a script patched, check what this machine uses.

The files in reading order:

- `patching`: `patch`, `unpatch` and `patched`, which replace torch's functions and put them back.
- `at_import`: the same as soon as a program imports torch, in its child processes too.
- `calls`: counts the calls that arrive, for a report at exit.
- `running`: `python -m fastclip run`, which runs a script as Python does, with `at_import` switched on before.
- `environment`: `info`, which names the backend of each device, and `warm_up`, which compiles ahead of the first step.
- `check`: `python -m fastclip check`, which compares fastclip with torch and with fp64 on this machine.

`at_import`, `calls` and `running` do not import torch, because the script has to import it first.
"""
