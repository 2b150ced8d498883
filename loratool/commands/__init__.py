"""The commands, a file or a folder for each, and what they share.

Each command plans, validates, executes, and returns a report. `cli` prints it.
"""
