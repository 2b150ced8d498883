"""Make small models and adapters of many families."""
