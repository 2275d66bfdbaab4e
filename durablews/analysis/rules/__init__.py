"""The rules, by the part of a configuration that they judge. `catalogue` lists them all."""
