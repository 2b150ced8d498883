"""Choose the weights of a base that can get factors."""
