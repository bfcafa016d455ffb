"""Draw where the demo's models differ, and what a merge kept of them: ``python -m demo.differences``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import modelfuse
from demo.recipes import DOMAIN_MERGES, EXPERTS, MODELS

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"


def main() -> None:
    """Write both pictures; it takes modelfuse[report]."""
    paths = {name: HERE / "models" / name for name in MODELS}
    tuned = [paths[name] for name in MODELS if name != "base"]
    found = modelfuse.diff(*tuned, base=paths["base"])
    modelfuse.draw(found, DOCS / "demo-differences.svg")
    merge = next(each for each in DOMAIN_MERGES if each.name == "ties")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / merge.name
        modelfuse.merge(
            model_path_list=[paths[name] for name in EXPERTS],
            base_model_path=paths["base"],
            output_path=output,
            **merge.settings,
        )
        modelfuse.draw(modelfuse.report(output), DOCS / "demo-kept.svg")


if __name__ == "__main__":
    main()
