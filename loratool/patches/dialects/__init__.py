"""Weight patches of other programs, a file for each dialect; `table` has their rows."""
