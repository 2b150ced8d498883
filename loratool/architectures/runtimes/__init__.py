"""The parts of an adapter that runtimes load and apply: rows of `table.RUNTIMES`, long lists in separate files."""
