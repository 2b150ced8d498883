"""List what runtimes load of an adapter and apply: a row each in `table.RUNTIMES`, long facts in files of their own."""
