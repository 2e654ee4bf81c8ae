"""Pipelines as data: tables of actions, builders, a simulator, pictures, and one interpreter."""
