"""Methods that combine several adapters' changes of one matrix into one."""
