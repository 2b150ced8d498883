"""Make what is made to break things."""
