"""Plan, merge and verify from Python, on the models of ``modelfuse demo``: ``python examples/merge.py``."""

import sys

import modelfuse

settings = {
    "merge_method": "ties",
    "base_model_path": "models/base",
    "model_path_list": ["models/code", "models/prose", "models/arithmetic"],
    "weight_list": [1.0, 0.8, 0.8],
}

try:
    plan = modelfuse.check(**settings)
    print(plan)
    result = modelfuse.merge(**settings, output_path="models/from-python", overwrite=True)
    print(result)
except modelfuse.ModelfuseError as error:
    sys.exit(f"{error.message}\n{error.hint or ''}")

found = modelfuse.verify(result.output_path)
print(found)
sys.exit(0 if found.holds else "\n".join(problem.message for problem in found.problems))
