"""Time and memory of the line that opens a checkpoint: this network's, by remote code, beside transformers' own ViT.

    python -m benchmarks.load --variants S/16 B/16

Every load is a cold process without this package, that imports one Auto class, opens the checkpoint and ends; the sides
take turns. Code and weights are on the disk already, as after the first load. Time is from launch to the network in
memory, memory that of the process at its peak.
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

from benchmarks.measure import RESULTS, machine, spread, told, write_report
from benchmarks.peers import build
from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification

CODE = """
import json, sys, time
from transformers import AutoModelForImageClassification
imported = time.time()
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
done = time.time()
assert "vit_simple" not in sys.modules
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss has the parent's in it
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
    print(told(report))
    for variant in arguments.variants:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            torch.manual_seed(0)
            ours = ViTSimpleForImageClassification(ViTSimpleConfig.from_variant(variant, num_labels=1000))
            sides = {"vit_simple": folder / "ours", "transformers": folder / "theirs"}
            ours.save_pretrained(sides["vit_simple"])
            build("transformers", ours).save_pretrained(sides["transformers"])
            found = {side: [] for side in sides}
            for number in range(arguments.rounds + 1):
                for side in list(sides)[:: 1 if number % 2 else -1]:
                    found[side].append(load(sides[side], folder))
        found = {side: loads[1:] for side, loads in found.items()}  # the first fills the machine's caches
        report["loads"][variant] = found
        print(f"{variant}:")
        for what, unit, scale in (("seconds", "s", 1), ("from_pretrained", "s", 1), ("peak_memory", "MiB", 2**20)):
            values = {side: [load[what] for load in loads] for side, loads in found.items()}
            ratio = median(values["vit_simple"]) / median(values["transformers"])
            cells = [f"{side} {median(v) / scale:,.2f} {unit} (+-{spread(v):.1%})" for side, v in values.items()]
            print(f"  {what:<16} {', '.join(cells)}: {ratio:.3f} times transformers'")
    write_report(report, RESULTS / "load.json")


if __name__ == "__main__":
    main()
