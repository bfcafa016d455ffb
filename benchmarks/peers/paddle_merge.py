"""One merge by PaddleFormers, run by an interpreter that has it: ``paddle_merge.py SETTINGS_JSON``."""

from __future__ import annotations

import json
import sys

from paddleformers.mergekit import MergeConfig, MergeModel

if __name__ == "__main__":
    MergeModel(MergeConfig(**json.loads(sys.argv[1]))).merge_model()
