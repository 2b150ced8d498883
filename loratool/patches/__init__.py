"""Write and apply patches: what makes the bytes of one model of another's."""
