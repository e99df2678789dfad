"""One command for a machine with a GPU: is everything right there, and how fast is it?

    python benchmarks/gpu_check.py [--seconds 3] [--main-job 120] [--out gpu_check.json]

takes about six minutes on one large GPU, needs this repository and its required packages alone, and prints a Markdown
table and writes a JSON file with

- numerics: the kernel's steps are those of its twin on the CPU, bit for bit on NVIDIA and to one unit in the last place
  on AMD; chains from kept graphs are the eager ones; a resumed run is the uninterrupted one;
- the kernel's bytes per second over those of a copy, timed with the queue full, so that no launch waits for the host;
- launches of a training iteration, as PyTorch's operations and as the driver counts them;
- training iterations per second, samples per second and the peak of memory: of the default (score; and teacher-forced
  recovery, the chains of its last tenth) and of the paper's settings, eager and from graphs, float32 and bfloat16, for
  the example's HVAE and for a stand-in of NVAE's shape (30 groups of 20x16x16), beside the published loop restated;
- two processes on the one GPU; and the main job for two minutes, with its closure.

What fails is reported in its row, and the command then fails in the end. `--device cpu --quick` runs the same code in
tiny sizes, which measures nothing: graphs are then functions that run again.
"""

import argparse
import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
# Where the package is not installed.
sys.path.append(str(Path(__file__).parent.parent))
sys.path.append(str(Path(__file__).parent.parent / "adapters"))

from classifier import load_classifier
from fashion_mnist import load_subset
from gpu_kernels import bandwidth, check_bits
from gpu_models import (
    Enough,
    make_jobs,
    make_prior,
    published_rate,
    sampling_rate,
    training_config,
    training_rate,
)
from published import Count

from hvae_ebm_prior import ExecutionConfig
from hvae_ebm_prior.chains.graphs import Captured, Graphs
from hvae_ebm_prior.density import energy_model
from hvae_ebm_prior.evaluation import evaluate

# Of the table: what, and how much.
Rows = list[tuple[str, str]]


def rerun(function: Callable[[], Sequence[Tensor]]) -> Captured:
    """What stands for a graph on the CPU: a replay runs the function again."""
    results = function()

    def replay() -> None:
        for place, value in zip(results, function(), strict=True):
            place.copy_(value)

    return Captured(replay, results)


def driver_launches(function: Callable[[], object]) -> int:
    """What the driver is asked to launch: kernels, graphs, copies."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with torch.profiler.profile(activities=kinds) as profile:
        function()
    return sum("Launch" in event.name or "Memcpy" in event.name for event in profile.events())


def launches(args: argparse.Namespace) -> Rows:
    """Of one training iteration of the example's HVAE, and of sampling."""
    rows: Rows = []
    job = args.jobs[0]
    for (preset, objective), graph in itertools.product(
        (("default", "score"), ("default", "recovery"), ("paper-cifar10", None)), (False, True)
    ):
        prior = make_prior(job, preset, args.execution(graph=graph), args.quick)
        config = dataclasses.replace(training_config(job, preset), iterations=1, objective=objective)
        g = torch.Generator().manual_seed(0)
        u = prior.encode(job.images[: job.batch].to(args.device), generator=g)

        def gradient(prior: Any = prior, config: Any = config, u: Tensor = u, g: Any = g) -> None:
            prior.batch_loss(u, None, g, None, prior.objective(config, 0)).total.mean().backward()

        gradient(), gradient()
        with Count() as counted:
            gradient()
        name = f"{preset}, {objective or 'joint recovery'}, {'graphs' if graph else 'eager'}"
        rows.append(
            (f"operations, driver's launches of a loss: {name}", f"{counted.calls}, {driver_launches(gradient)}")
        )
    return rows


def throughput(args: argparse.Namespace) -> Rows:
    """Training and sampling of every job by every way, as long as there is time."""
    rows: Rows = []
    ways = (("default", "score"), ("default", "recovery"), ("paper-cifar10", None))
    for job in args.jobs:
        value = published_rate(job, args.seconds, args.quick)
        rows.append((f"{job.name}, batch {job.batch}: published loop", f"{value:.2f} it/s"))
    # What there is no time for is of half precision.
    for dtype, job, (preset, objective), graph in itertools.product((None, "bfloat16"), args.jobs, ways, (False, True)):
        if late(args):
            continue
        shown = f"{dtype or 'float32'}, {'graphs' if graph else 'eager'}"
        reset_peak(args.device)
        prior = make_prior(job, preset, args.execution(graph=graph, autocast=dtype), args.quick)
        value = training_rate(prior, job, preset, objective, args.seconds, args.quick)
        name = f"{job.name}, batch {job.batch}: {preset}, {objective or 'joint recovery'}, {shown}"
        rows.append((name, f"{value:.2f} it/s, {peak(args.device):.2f} GiB"))
        if objective != "score" and not late(args):
            value = sampling_rate(prior, job, args.seconds, args.quick)
            rows.append((f"{job.name}, {job.samples} at a time: {preset}, {shown}", f"{value:.1f} samples/s"))
    return rows


def late(args: argparse.Namespace) -> bool:
    """Whether the time for throughput is up; what was left out has no row."""
    return time.monotonic() > args.began + args.budget - args.main_job - 45


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> float:
    """Peak of the device's memory in GiB; 0 on a CPU, where it is not followed."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def same_samples(args: argparse.Namespace) -> Rows:
    """Samples, and gradients of the score, from graphs beside the eager ones."""
    rows: Rows = []
    for job, preset in itertools.product(args.jobs, ("default", "paper-cifar10")):
        samples, gradients = [], []
        for graph in (False, True):
            prior = make_prior(job, preset, args.execution(graph=graph), args.quick)
            for network in prior.energies:
                for name, parameter in network.named_parameters():
                    if "weight" in name:
                        torch.manual_seed(len(name))
                        with torch.no_grad():
                            parameter.add_(0.02 * torch.randn(parameter.shape).to(parameter))
            samples.append([prior.sample_noise(2, generator=torch.Generator().manual_seed(k)) for k in range(3)])
            seeds = range(3) if preset == "default" else ()
            gradients.append([layer for seed in seeds for layer in score_gradients(prior, job, seed)])
        errors = [(a - b).abs().max().item() for a, b in zip(*samples, strict=True)]
        errors += [((a - b).norm() / a.norm()).item() for a, b in zip(*gradients, strict=True)]
        if not all(error <= 1e-3 for error in errors):
            raise AssertionError(f"{job.name}, {preset}: graphs differ from eager ones by {max(errors):.1e}")
        rows.append((f"graphs = eager, {job.name}, {preset}", f"largest difference {max(errors):.0e}"))
    return rows


def score_gradients(prior: Any, job: Any, seed: int) -> list[Tensor]:
    """The gradient of the score loss of a batch in the weights of every layer."""
    generator = torch.Generator().manual_seed(seed)
    u = prior.encode(job.images[: job.batch].to(prior.device), generator=generator)
    objective = prior.objective(dataclasses.replace(training_config(job, "default"), objective="score"), 0)
    prior.zero_grad()
    prior.batch_loss(u, None, generator, None, objective).total.mean().backward()
    layers = [[x.grad.flatten() for x in energy.parameters() if x.grad is not None] for energy in prior.energies]
    return [torch.cat(layer) for layer in layers if layer]


def resumed(args: argparse.Namespace) -> Rows:
    """A run that is broken off and goes on, beside the uninterrupted one."""
    job, weights = args.jobs[0], []
    with tempfile.TemporaryDirectory() as folder:
        for resume in (False, True):
            settings = {"iterations": 6, "batch_size": job.batch, "progress": False}
            prior = make_prior(job, "default", args.execution(), args.quick)
            if resume:

                def stop(_: object, record: Any) -> None:
                    if record.iteration == 4:
                        raise Enough

                try:
                    prior.fit(
                        job.images,
                        **settings,
                        callback=stop,
                        checkpoint_dir=folder,
                        checkpoint_every=3,
                        generator=torch.Generator().manual_seed(0),
                    )
                except Enough:
                    prior = make_prior(job, "default", args.execution(), args.quick)
                settings |= {"checkpoint_dir": folder, "resume": True}
            prior.fit(job.images, **settings, generator=torch.Generator().manual_seed(0))
            weights.append(torch.cat([parameter.detach().flatten() for parameter in prior.parameters()]))
    error = (weights[0] - weights[1]).abs().max().item()
    if not error <= 1e-4:
        raise AssertionError(f"weights of a resumed run are off by {error:.1e}")
    return [("a resumed run = an uninterrupted one", f"largest difference {error:.0e}")]


def two_processes(args: argparse.Namespace) -> Rows:
    """One batch of the example by one process, and divided between two on the same GPU."""
    found = []
    for processes in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, __file__, "--worker", "--device", args.device.type, "--seconds", str(args.seconds)]
        command += ["--quick"] if args.quick else []
        environment = dict(os.environ)
        if processes > 1:
            names = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= names
        running = [
            subprocess.Popen(
                command,
                env=environment | ({"RANK": str(i)} if processes > 1 else {}),
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(processes)
        ]
        outputs = [process.communicate(timeout=120)[0] for process in running]
        if any(process.returncode for process in running):
            raise RuntimeError("a process failed; see above")
        found.append(float(outputs[0].split()[-1]))
    return [("one process, two on one GPU, same batch", f"{found[0]:.2f}, {found[1]:.2f} it/s")]


def worker(args: argparse.Namespace) -> None:
    """A process of `two_processes`: prints iterations per second. All processes take as many iterations."""
    job = args.jobs[0]
    prior = make_prior(job, "default", args.execution(), args.quick)
    iterations = 4 if args.quick else 60
    training = dataclasses.replace(training_config(job, "default"), iterations=iterations, objective="score")
    history = prior.fit(job.images, training=training, progress=False, generator=torch.Generator().manual_seed(0))
    print((iterations - 3) / (history[-1].seconds - history[2].seconds))


def main_job(args: argparse.Namespace) -> Rows:
    """The defaults on the example for so many seconds of training, and how much of the hole that closes."""
    job = args.jobs[0]
    prior = make_prior(job, "default", args.execution(), args.quick)
    speed = training_rate(prior, job, "default", "score", min(args.seconds, 3), args.quick)
    iterations = 2 if args.quick else max(20, int(0.85 * speed * args.main_job))
    prior = make_prior(job, "default", args.execution(), args.quick)
    start = time.monotonic()
    prior.fit(job.images, iterations=iterations, generator=torch.Generator().manual_seed(0), progress=False)
    seconds = time.monotonic() - start
    count = 80 if args.quick else 2000
    test, train = load_subset("test")[0][:count], load_subset("train")[0][: 100 if args.quick else None]
    classifier = load_classifier().to(args.device)
    rows = evaluate(
        prior,
        test,
        train,
        lambda images: classifier.features(images.to(args.device)),
        generator=torch.Generator().manual_seed(0),
    )
    ours = next(row for row in rows if row.name == "ours")
    return [
        ("main job", f"{iterations} iterations in {seconds:.0f} s"),
        ("main job, FD and closure", f"{ours.distance:.2f}, {ours.closure:.3f}"),
    ]


CHECKS = {
    "numerics": check_bits,
    "graphs": same_samples,
    "bandwidth": bandwidth,
    "launches": launches,
    "resume": resumed,
    "processes": two_processes,
    "throughput": throughput,
    "main job": main_job,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all code runs")
    parser.add_argument("--seconds", type=float, default=3.0, help="of every measured way")
    parser.add_argument("--main-job", type=float, default=120.0, help="seconds of training")
    parser.add_argument("--budget", type=float, default=360.0, help="seconds in all; beyond, ways are left out")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.began = time.monotonic()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this check needs a CUDA or ROCm GPU; --device cpu --quick sees whether its code runs")
    if args.device.type == "cpu":
        energy_model.Graphs = partial(Graphs, rerun)  # type: ignore[misc, assignment]
    args.execution = partial(ExecutionConfig, backend="auto" if args.device.type == "cuda" else "naive")
    args.jobs = make_jobs(args.device, args.quick)
    torch.backends.cudnn.deterministic = True
    # A graph that is not used must not pass for one.
    warnings.filterwarnings("error", message="a CUDA graph")
    if args.worker:
        worker(args)
        return
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "quick": args.quick, "checks": {}}
    print(f"{name}, torch {torch.__version__}\n\n| | |\n|---|---|")
    failed = False
    for check in args.only:
        start = time.monotonic()
        try:
            rows = CHECKS[check](args)
        except Exception as error:  # whatever one check meets, the others are worth their time
            traceback.print_exc()
            rows, failed = [(check, f"FAILED: {type(error).__name__}: {error}".splitlines()[0])], True
        report["checks"][check] = {"seconds": time.monotonic() - start, "rows": rows}
        for row in rows:
            print(f"| {row[0]} | {row[1]} |", flush=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
