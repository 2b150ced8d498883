"""Help the tests: nothing here is one."""
