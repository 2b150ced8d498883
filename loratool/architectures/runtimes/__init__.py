"""List what runtimes load of an adapter and apply: one row each in `table.RUNTIMES`, facts that are long in a file each."""
