"""Time and memory of `from_pretrained`: for this model, with remote code, and for transformers' own ViT.

    python -m benchmarks.load --variants S/16 B/16

Each load is a new process without this package that imports one Auto class and loads the checkpoint. The models are
loaded in turn. Code and weights are on the disk already, as after the first load. The time is from launch to the model
in memory; the memory is the peak of the process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import RESULTS, describe, machine, spread, write_report
from benchmarks.peers import build
from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification

CODE = """
import json, sys, time
from transformers import AutoModelForImageClassification
imported = time.time()
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
done = time.time()
assert "vit_simple" not in sys.modules
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss includes the parent's
print(json.dumps([imported, done, int(peak.split()[1]) * 1024]))
"""


def load(checkpoint: Path, folder: Path) -> dict[str, float]:
    """Seconds and bytes of one load."""
    blocked = folder / "vit_simple.py"  # this package may be installed where the benchmark runs
    blocked.write_text("raise ImportError\n")
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": str(folder)}
    start = time.time()
    output = subprocess.run(
        [sys.executable, "-c", CODE, checkpoint],
        env=environment,
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    imported, done, peak = json.loads(output.splitlines()[-1])
    return {"seconds": done - start, "from_pretrained": done - imported, "peak_memory": peak}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["S/16", "B/16"])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    report = {**machine(), "loads": {}}
    print(describe(report))
    for variant in arguments.variants:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            torch.manual_seed(0)
            ours = ViTSimpleForImageClassification(ViTSimpleConfig.from_variant(variant, num_labels=1000))
            checkpoints = {"vit_simple": folder / "ours", "transformers": folder / "theirs"}
            ours.save_pretrained(checkpoints["vit_simple"])
            build("transformers", ours).save_pretrained(checkpoints["transformers"])
            results = {model: [] for model in checkpoints}
            for number in range(arguments.rounds + 1):
                for model in list(checkpoints)[:: 1 if number % 2 else -1]:
                    results[model].append(load(checkpoints[model], folder))
        results = {model: loads[1:] for model, loads in results.items()}  # the first load fills the machine's caches
        report["loads"][variant] = results
        print(f"{variant}:")
        for quantity, unit, scale in (("seconds", "s", 1), ("from_pretrained", "s", 1), ("peak_memory", "MiB", 2**20)):
            values = {model: [load[quantity] for load in loads] for model, loads in results.items()}
            ratio = median(values["vit_simple"]) / median(values["transformers"])
            cells = [f"{model} {median(v) / scale:,.2f} {unit} (+-{spread(v):.1%})" for model, v in values.items()]
            print(f"  {quantity:<16} {', '.join(cells)}: {ratio:.3f} times transformers'")
    write_report(report, RESULTS / "load.json")


if __name__ == "__main__":
    main()
