"""Pools, drafters, acceptance, the speculative step and the device graphs that replay it."""
