"""What is asked of a model: prompts with tokens, spans and roles. No torch."""

from interv.task.facts import Prompt, read_prompts

__all__ = ["Prompt", "read_prompts"]
