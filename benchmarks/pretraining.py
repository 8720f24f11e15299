"""`python -m benchmarks.pretraining`: crops a second and core of pre-training `mini`, beside an earlier state of it.

The earlier state is taken out of the repository. Each is a process of its own on one thread and takes its steps, a few at a
time, in turn with the other, so that whatever else the machine does meets both; counted is the processor time of a whole step
(crops, forward, backward, both optimizers, average), not what passes. `--isa AVX2` keeps oneDNN from instructions beyond, as a
CPU without bf16 has none.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.report import ROOT, Benchmark, columns, spread

BEFORE = "dac4cc3e02"  # torch's Muon, bf16 whatever the CPU
STATES = ("before", "now")
WARM = 2  # steps that compile
TURN = 4  # steps that a state takes before it is the other's turn, whose first meets the caches as the other has left them
STEPS = """
import json, sys, time
from pathlib import Path
root, out, crops, side = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
sys.path.insert(0, root)
import ebr_engine
ebr_engine.__path__.append(root)
if __name__ == "__main__":
    import torch
    torch.set_num_threads(1)
    from ebr_engine.training import pretrain
    warm, turn = int(sys.argv[5]), int(sys.argv[6])
    make, mark, done = pretrain.batch, [None], [0]
    def batch(*arguments):
        if done[0] >= warm and (done[0] - warm) % turn == 0:
            print(json.dumps((time.process_time() - mark[0]) / turn) if done[0] > warm else "ready", flush=True)
            if sys.stdin.readline() != "go\\n":
                raise SystemExit
            mark[0] = time.process_time()
        done[0] += 1
        return make(*arguments)
    pretrain.batch = batch
    settings = dict(sizes=(side,), size_odds=(1.0,), batch=crops, pool=4, scenes_per_second=0.1)
    pretrain.pretrain(out / "mini.safetensors", pretrain.PretrainConfig(minutes=1e6, save_every=1e6, **settings))
"""


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT", help="the state to compare with")
    parser.add_argument("--isa", help="what oneDNN may use at most, such as AVX2")
    parser.add_argument("--crops", type=int, default=24, help="a step")
    parser.add_argument("--side", type=int, default=128, help="of a crop, in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each state, of some steps each")


def measure(options: Namespace) -> dict[str, Any]:
    """Processor seconds of a step of pre-training, of both states in turns."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"ONEDNN_MAX_CPU_ISA": options.isa} if options.isa else {})
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", options.before, "ebr_engine", "kernels"], cwd=ROOT, check=True, stdout=subprocess.PIPE
        )
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
            files.extractall(Path(folder) / "before", filter="data")
        (Path(folder) / "steps.py").write_text(STEPS)
        roots = {"before": Path(folder) / "before", "now": ROOT}
        running = {}
        for state in STATES:
            (out := Path(folder) / f"{state} out").mkdir()
            words = [roots[state], out, options.crops, options.side, WARM, TURN]
            command = [sys.executable, str(Path(folder) / "steps.py"), *map(str, words)]
            running[state] = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            if running[state].stdout.readline() != "ready\n":
                raise SystemExit(f"error: pre-training failed ({state}); its message stands above")
        seconds: dict[str, list[float]] = {state: [] for state in STATES}
        for _ in range(options.rounds):
            for state in STATES:
                seconds[state].append(turn(running[state]))
        for process in running.values():
            process.communicate("end\n")
    found = {state: spread(values) for state, values in seconds.items()}
    rates = {state: options.crops / value["median"] for state, value in found.items()}
    return vars_of(options) | {"seconds": found, "crops a second": rates, "ratio": rates["now"] / rates["before"]}


def turn(process: subprocess.Popen[str]) -> float:
    """Processor seconds of a step, in the mean over a turn."""
    process.stdin.write("go\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def vars_of(options: Namespace) -> dict[str, Any]:
    """The settings that matter to the numbers."""
    return {name: getattr(options, name) for name in ("before", "isa", "crops", "side", "rounds")}


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    rows = [(state, f"{result['seconds'][state]['median']:.2f} s", f"{result['crops a second'][state]:.1f}") for state in STATES]
    text = columns(
        (f"{result['crops']} crops of {result['side']} pixels", "processor time a step", "crops a second and core"), rows
    )
    return f"{text}\n\n{result['ratio']:.1f} times as many" + (f"; oneDNN up to {result['isa']}" if result["isa"] else "")


def main(arguments: Sequence[str] | None = None) -> None:
    report.main("pretraining", __doc__, Benchmark(options, measure, table), arguments)


if __name__ == "__main__":
    main()
