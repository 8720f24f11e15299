"""A step of learning a prompt on `mini` beside another commit's, plain and with compiled blocks.

Each is a process of its own on one thread, runs its folder's code, and takes its steps in turn with the others, so that whatever
else the machine does meets all; counted is the processor's time of forward, backward and Adam on one batch, the one of
`benchmarks.training`. Gradients of all are compared with the other commit's plain ones.
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import relative_rms
from benchmarks.report import ROOT, columns, spread

WARM = 2  # steps that compile, pack weights and time ways
STEPS = """
import json, sys, time
from dataclasses import replace
root, out, precision, compiled, side, batch, warm = sys.argv[1:]
sys.path.insert(0, root)
import ebr_engine
ebr_engine.__path__.append(root)
import torch
torch.set_num_threads(1)
from benchmarks.models import PRECISIONS
from benchmarks.peers import mini_model
from benchmarks.training import learner, problem, stepped
case, _ = mini_model(int(side), torch.device("cpu"), PRECISIONS[precision])
torch.manual_seed(0)
blocks, width = case.config.blocks, case.config.width  # a prompt of a row set a block, the same in all
case = replace(case, prompt=(0.1 * torch.randn(blocks, 64, width), torch.full((blocks,), 0.5)), t0=0.2)
given = problem(case, int(batch))
made = learner(case, case.trunk, **({"compile": True} if compiled == "1" else {}))
for _ in range(int(warm)):
    result = stepped(made, given)
torch.save([one.float() for one in result], out)
print("ready", flush=True)
while sys.stdin.readline() == "go\\n":
    mark = time.process_time()
    stepped(made, given)
    print(json.dumps(time.process_time() - mark), flush=True)
"""


def measure(options: Namespace) -> dict[str, Any]:
    """Processor seconds of a step, of all forms in turns."""
    if not (options.beside / "benchmarks").is_dir():
        options.error(f"{options.beside}: there is no benchmarks in it")
    side, batch, rounds = (32, 2, 1) if options.quick else (128, 4, options.rounds)
    folders = {"before": options.beside.resolve(), "now": ROOT}
    forms = [(state, False) for state in folders]
    if not (options.no_compile or options.quick):
        forms += [(state, True) for state in folders]
    names = {form: form[0] + (", compiled blocks" if form[1] else "") for form in forms}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        running, results = {}, {}
        for state, compiled in forms:
            name, out = names[state, compiled], Path(folder, f"{state}{compiled}.pt")
            words = [folders[state], out, options.precision, int(compiled), side, batch, WARM]
            running[name] = subprocess.Popen(
                [sys.executable, "-c", STEPS, *map(str, words)],
                cwd=folders[state], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            if running[name].stdout.readline() != "ready\n":
                raise SystemExit(f"error: a step failed ({name}); its message stands above")
            results[name] = torch.load(out)
        seconds: dict[str, list[float]] = {name: [] for name in running}
        for _ in range(rounds):
            for name, process in running.items():
                process.stdin.write("go\n")
                process.stdin.flush()
                seconds[name].append(json.loads(process.stdout.readline()))
        for process in running.values():
            process.communicate("end\n")
    found = {name: spread(values) for name, values in seconds.items()}
    rows = [
        {
            "form": name,
            "seconds": found[name],
            "x faster": found["before"]["median"] / found[name]["median"],
            "loss": results[name][0].item(),
            "gradient_difference": max(relative_rms(a, b) for a, b in zip(results[name][1:], results["before"][1:])),
        }
        for name in found
    ]
    fastest = {state: min(found[names[form]]["median"] for form in forms if form[0] == state) for state in folders}
    return {
        **{"beside": revision(folders["before"]), "precision": options.precision, "crops": batch, "side": side, "rounds": rounds},
        **{"forms": rows, "fastest form": fastest["before"] / fastest["now"]},
    }


def revision(folder: Path) -> str:
    """The commit of a folder."""
    command = ["git", "-C", str(folder), "rev-parse", "--short=10", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    rows = [
        [
            form["form"],
            *(f"{x * 1e3:.0f}" for x in (form["seconds"]["median"], *form["seconds"]["quartiles"])),
            f"{form['x faster']:.2f}",
            f"{form['loss']:.5f}",
            f"{form['gradient_difference']:.1e}",
        ]
        for form in result["forms"]
    ]
    case = f"mini, {result['crops']} crops of {result['side']} x {result['side']}, {result['precision']}"
    title = f"{case}, beside {result['beside']}"
    header = ["form", "processor ms a step", "from", "to", "x faster", "loss", "gradients differ"]
    return f"{title}\n\n{columns(header, rows)}\n\nfastest form of each: x{result['fastest form']:.2f}"
