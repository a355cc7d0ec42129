"""Mergers: (g_comp, correction, age) -> g, elementwise on flat fp32 gradients, the same on every rank.

Pure tensor methods: torch itself is not imported, so that a config can look a merger up in no time.
"""

from merger.delta import Delta
from merger.none import NoMerger
from merger.signed_ema import SignedEMA

MERGERS = {"none": NoMerger, "signed_ema": SignedEMA, "delta": Delta}
