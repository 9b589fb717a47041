"""Projector and frozen LLM: the model that phase two trains."""
