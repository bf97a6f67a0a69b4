"""What everything else stands on: arguments and warnings, and what torch, its devices and its memory are like."""
