"""Survive a kill: calls that change files, locks, partial outputs, signals, the journal by which a run goes on."""
