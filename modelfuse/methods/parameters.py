"""Settings that several methods share."""

from __future__ import annotations

from modelfuse.methods.spec import Parameter

RESERVE_P = Parameter(
    "reserve_p", 0.7, "The share of elements to keep (density).", bounds={"gt": 0, "le": 1}, per_model=True,
    aliases=("density",),
)  # fmt: skip
RESCALE = Parameter("rescale", True, "Scale up what is kept, to compensate for what is dropped.")
NORMALIZE = Parameter("normalize", False, "Divide the weights by their sum (false by default when weights are given).")

#: Arcee's methods rescale to the sum of magnitudes there was where neither it nor the new one is below this.
MIN_L1 = 1e-7
