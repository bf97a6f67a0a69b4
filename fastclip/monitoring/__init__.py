"""Noticing exploding gradients: record each step, fire triggers, write logs, draw pictures.

`Monitor` (monitor.py) ties the other files together. In each step it packs the loss and the result of clipping into one
vector of numbers on the device (steps.py). The judge (judge.py) compares loss and norm with their running averages
(averages.py), and decides which triggers fire (interface.py, triggers.py). If a trigger skips steps, the judge works in
the step, on the device. Otherwise it works on the host, when the monitor syncs. A sync transfers the vectors of all
steps since the last sync. The steps then go into the record (record.py), and from there to the sinks (logs.py,
sinks.py). The reactions warn, raise or call functions for the triggers that fired (reactions.py). `Monitor.read`
returns the record as a `History` (history.py), and `Monitor.plot` draws it (picture.py).
"""
