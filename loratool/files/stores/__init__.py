"""Read models and adapters from object stores and web servers by ranges, without a copy here."""
