"""Weighted sums."""

from __future__ import annotations

from modelfuse.methods.expressions import total
from modelfuse.methods.parameters import NORMALIZE
from modelfuse.methods.spec import Combination, Method

LINEAR = Combination(
    name="linear",
    summary="The weighted sum of the models, or of their deltas to the base (task arithmetic).",
    formula="Σ wᵢ·xᵢ",
    paper=(
        "Wortsman et al. 2022, Model soups, arXiv:2203.05482; Ilharco et al. 2022, Editing models with task "
        "arithmetic, arXiv:2212.04089"
    ),
    measured="With a base and λ chosen, the one to beat; on ordinary checkpoints of LLMs none does reliably.",
    parameters=(NORMALIZE,),
    combine=lambda each: total(each.x * each.weight),
)

METHODS = (Method("linear", LINEAR), Method("task_arithmetic", LINEAR, base="required"))
