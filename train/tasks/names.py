"""Tasks and methods by name, apart from their code so that help comes at once."""

from __future__ import annotations

TASKS = {
    "passkey": "a number hidden in text, by length and depth",
    "document_retrieval": "the number of the document that answers a query, by count of documents",
    "perplexity_by_length": "perplexity of the last 100 tokens, by length of the context",
    "longbench": "HotpotQA, Qasper, SAMSum and VCSUM of LongBench, from its files",
    "prefill_scaling": "time and memory of reading one long prompt in chunks, by position",
}

_THRESHOLDS = ("1e-20", "1e-25", "1e-30", "1e-35", "1e-40")

METHODS = {
    "vanilla": "the model as trained",
    "longmamba": "LongMamba, g of the whole length",
    "longmamba_streaming": "LongMamba, g of the position",
    "longmamba_rescaled": "longmamba with as many steps as in training, scaled to their mean",
    "longmamba_streaming_rescaled": "longmamba_streaming with the same",
    "decimamba": "DeciMamba: later layers see few tokens",
    "scaled": "every delta times training length / length",
    "local": "LongMamba on local channels",
    "random": "LongMamba on as many random channels",
    "layers_4": "LongMamba in the 4 layers that forget least",
    "layers_8": "LongMamba in the 8 layers that forget least",
    **{f"threshold_{th}": f"LongMamba, channels that keep more than {th} are global" for th in _THRESHOLDS},
}

ABLATIONS = ("local", "random", "layers_4", "layers_8", *(f"threshold_{th}" for th in _THRESHOLDS))
"""Section 6.3 of LongMamba: which channels, how many layers, which threshold."""
