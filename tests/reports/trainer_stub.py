"""Stands in for train.py in tests of sweeps.

It ends as its words say, and writes what a finished run leaves.
"""

import json
import sys
import time
from pathlib import Path

import yaml

words = dict(word.split("=", 1) for word in sys.argv[1:])
run = Path(words["output_dir"]) / words["name"]
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
with open(run / "launches", "a") as file:
    file.write("x")
time.sleep(float(words.get("sleep", 0)))
if int(words.get("stub.fail", words.get("fail", 0))) >= len((run / "launches").read_text()):
    print(f"pdn[E-{words.get('tag', 'STUB')}] told to fail")
    if "left" in words:
        left = {"state": "failed", "time": time.time(), "exit_code": int(words["left"])}
        (run / "status.json").write_text(json.dumps(left))
        print("torch.distributed.elastic.multiprocessing.errors.ChildFailedError:")
    sys.exit(int(words.get("code", 70)))
lr, seed = float(words["optim.lr"]), int(words["seed"])
if lr > float(words.get("stub.diverges_above", "inf")):
    sys.exit("pdn[E-NONFINITE] told to diverge")
# Best at 2e-3; the arm "other" is 0.1 better, and a seed counts a hundredth.
loss = (
    3
    + abs(lr - 2e-3) * 100
    + 0.01 * seed
    - 0.1 * (words["model"] == "pgdn_tiny") * (1 + 0.01 * (seed % 3))
)
order = words.get("data.seed", "0") + words.get("order", "")
config = {
    "branch_from": words.get("branch_from"),
    "seed": seed,
    "optim": {"lr": lr},
    "data": {"seed": int(words.get("data.seed", 0)), "seq_len": 8},
    "model": json.loads(Path(words["model_json"]).read_text()),
}
(run / "config.yaml").write_text(yaml.safe_dump(config))
records = [
    {"step": s, "tokens": 8 * s, "loss": 5 - s, "grad_norm": 1.0, "skipped": 0, "step_seconds": 0.5}
    for s in (1, 2)
]
records.append({"step": 2, "validation/loss": loss})
if "by_position" in words:  # with one state later positions are easier, for a branch even more so
    key, branch = "evaluation/positions/", "branch_from" in words
    gains = {"": 0, "@4": 0.02 * branch, "@16": 0.1 + 0.4 * branch}
    found = {f"{key}loss{at}": loss - gain for at, gain in gains.items()}
    found |= {f"{key}reset_loss{at}": loss + 0.1 for at in gains}
    records.append({"step": 2} | found)
(run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
(run / "ledger.jsonl").write_text(json.dumps({"step": 2, "hash": order}) + "\n")
(run / "status.json").write_text(json.dumps({"state": "finished"}))
# Sequences differ more from each other than models do; that of a model differs by its seed.
names = [f"{i:016x}" for i in range(20)]
kept = {
    "id": names,
    "loss": [8 * (loss + 0.2 * (i - 9.5) + 0.001 * ((i * 7 + seed) % 5 - 2)) for i in range(20)],
    "tokens": [8] * 20,
}
sets = {} if "no.sequences" in words else {"validation": kept}
(run / "validation.json").write_text(json.dumps({"step": 2, "sets": sets}))
