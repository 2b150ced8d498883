"""Turn an adapter into another one, step by step, without writing it."""
