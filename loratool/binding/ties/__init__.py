"""Find the matrices that a base uses more than once, and resolve updates of them."""
