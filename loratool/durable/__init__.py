"""What survives a kill: calls that change files, locks, partial outputs, signals, and the journal of a resumed run."""
