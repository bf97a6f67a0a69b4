"""Switching fastclip on: torch's functions replaced, scripts run so, and what serves this machine."""
