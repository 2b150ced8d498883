"""Calls that change files, locks, partial outputs, signals, and the journal of a resumed run: what survives a kill."""
