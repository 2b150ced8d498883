"""Find the rows of the base that each update changes, from names and shapes only."""
