"""What a model is, read from its files without torch: shape, components, tokens."""

from interv.models.config import ModelFacts
from interv.models.locate import DEFAULT_MODEL, ModelFiles, locate
from interv.models.tokenizer import PromptTokenizer, Tokens

__all__ = ["DEFAULT_MODEL", "ModelFacts", "ModelFiles", "PromptTokenizer", "Tokens", "locate"]
