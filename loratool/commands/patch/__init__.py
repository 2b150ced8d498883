"""Write the difference of two models as a patch."""
