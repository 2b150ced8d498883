"""Find the rows of the base that each update changes; pure functions of names and shapes."""
