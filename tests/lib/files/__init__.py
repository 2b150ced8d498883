"""Write the bytes of files."""
