"""Copies of the data sets that lm-eval's tasks read, of two documents each."""

import json
from pathlib import Path

# {data set: {config: {split: documents}}}
HUB = json.loads((Path(__file__).parent.parent / "fixtures" / "hub.json").read_text())


def write_hub_data(folder: Path) -> None:
    """Write them as the hub has them, a directory for each, with a card that names the files."""
    for name, configs in HUB.items():
        (folder / name).mkdir(parents=True)
        card = ["---", "configs:"]
        for config, splits in configs.items():
            card += [f"- config_name: {config}", "  data_files:"]
            for split, documents in ({"train": next(iter(splits.values()))} | splits).items():
                file = folder / name / f"{config}-{split}.jsonl"
                file.write_text("\n".join(map(json.dumps, documents)))
                card += [f"  - split: {split}", f"    path: {file.name}"]
        (folder / name / "README.md").write_text("\n".join([*card, "---", ""]))
