"""`--plan`: what a training command would do and need, before the LLM is loaded."""
