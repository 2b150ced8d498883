"""Run commands, jobs and servers."""
