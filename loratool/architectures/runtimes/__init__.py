"""What runtimes load of an adapter and apply: a row each in `table.RUNTIMES`, long lists in separate files."""
