"""Pretrained captioners in the form of Hugging Face's transformers.

:mod:`.families` says what captioner knows of each kind of model, :mod:`.hub` finds a model's files,
:mod:`.loading` reads them, :mod:`.captioner` captions. Importing any but the last two needs neither
torch nor transformers.
"""
