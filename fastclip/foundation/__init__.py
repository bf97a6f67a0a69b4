"""What everything else stands on: argument checks, warnings; torch's tracing, devices and memory.

arguments.py and warn.py face the caller: checks of numbers, and warnings at the caller's line. The others face torch:
devices.py (precision, streams, copies), memory.py (addresses, overlaps, pieces), arithmetic.py (norms that do not
overflow), tracing.py (whether operations are recorded) and originals.py (torch's own clipping functions).
"""
