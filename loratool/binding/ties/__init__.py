"""Find the matrices that a base uses several times, and resolve their updates."""
