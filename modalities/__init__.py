"""What people send and get (chat, vision, speech), turned into positions and back. `load` is the offline face of it."""

from ar_core.request import SamplingParams
from modalities.offline import LanguageModel, load
from modalities.text import Text

__all__ = ["LanguageModel", "SamplingParams", "Text", "load"]
