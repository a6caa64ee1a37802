"""Trains the demo's classifier in several JAX processes: the batch is shared out, and so are the diagonal blocks.

    python examples/many_processes.py --processes 4             # on this machine, over loopback
    python examples/many_processes.py --processes 4 --compare   # beside one process, and beside a dense model
    python examples/many_processes.py --processes 4 --kill-at 25  # one process dies in step 25; then start again

The program starts its own workers. On real machines start one worker on each instead, with the same options and
`--worker NUMBER --address HOST:PORT` of the first. Every few steps all write one checkpoint, with Orbax. If a process
dies, the others end within `PATIENCE` seconds; started again, with as many processes or with another number, training
goes on from the last checkpoint and sees the same batches.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from _data import Split, load
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from train_classifier import LEARNING_RATE, MLP, NUM_BLOCKS, loss_of

from jaxsparse import BlockDiagDense

PATIENCE = 20  # seconds from the death of one process to the end of all: JAX's heartbeats need 10
KILLED = -signal.SIGKILL


def models(width: int) -> dict[str, MLP]:
    """The dense model is shared out over the batch alone; of the other, each process has some of the blocks, too."""
    init = nn.initializers
    layer = functools.partial(
        BlockDiagDense,
        num_blocks=NUM_BLOCKS,
        kernel_init=nn.with_partitioning(init.lecun_normal(), ("blocks", None, None)),
        bias_init=nn.with_partitioning(init.zeros_init(), ("blocks",)),
    )
    return {"dense": MLP(width, nn.Dense), "block-diagonal": MLP(width, layer)}


def make_mesh() -> jax.sharding.Mesh:
    """Half of the devices' factor two goes to the blocks, the rest to the batch."""
    blocks = 2 if jax.device_count() % 2 == 0 else 1
    shape = (jax.device_count() // blocks, blocks)
    return jax.make_mesh(shape, ("batch", "blocks"), axis_types=(AxisType.Auto,) * 2)


class Run:
    """One model, its optimizer's state, and the program of a step, on a mesh of all processes."""

    def __init__(self, model: MLP, mesh: jax.sharding.Mesh, sample: Split, seed: int):
        optimizer = optax.adam(LEARNING_RATE)

        def create(key):
            params = model.init(key, sample.images)["params"]
            return {"params": params, "opt_state": optimizer.init(params)}

        def step(state, batch):
            loss, grads = jax.value_and_grad(loss_of)(state["params"], {}, model, batch)
            updates, opt_state = optimizer.update(grads, state["opt_state"])
            return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, loss

        key = jax.random.key(seed)
        shapes = jax.eval_shape(create, key)
        shardings = nn.get_sharding(shapes, mesh)  # moments lie where their parameters do
        self.target = jax.tree.map(_placed, nn.unbox(shapes), shardings)
        self.state = jax.jit(lambda key: nn.unbox(create(key)), out_shardings=shardings)(key)
        self.step = jax.jit(step, out_shardings=(shardings, NamedSharding(mesh, P())), donate_argnums=0)
        self.losses: dict[int, float] = {}


def _placed(shape: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def batch_of(data: Split, step: int, args: argparse.Namespace, mesh: jax.sharding.Mesh) -> Split:
    """The batch of a step, which depends on nothing else; each process makes the rows that it needs."""
    pick = np.random.default_rng([args.seed, step]).choice(len(data.labels), args.batch, replace=False)
    rows = NamedSharding(mesh, P("batch"))
    return Split(*(jax.make_array_from_callback(a[pick].shape, rows, lambda at, a=a: a[pick][at]) for a in data))


# ---- a worker ------------------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    if args.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(args.address, args.processes, args.worker, heartbeat_timeout_seconds=10)
    mesh, (data, _) = make_mesh(), load(None, args.seed)
    if args.batch % mesh.shape["batch"]:
        raise SystemExit(f"--batch {args.batch} is no multiple of the {mesh.shape['batch']} processes that share it.")
    sample = Split(*(a[:1] for a in data))
    runs = {name: Run(model, mesh, sample, args.seed) for name, model in models(args.width).items()}
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(args.folder.absolute() / "checkpoints", options=options) as manager:
        first = restore(runs, manager)
        if args.worker == 0:
            print(f"{args.processes} processes, mesh {dict(mesh.shape)}: training from step {first}", flush=True)
        for step in range(first, args.steps):
            advance(
                runs, batch_of(data, step, args, mesh), step, dies=step == args.kill_at and args.worker == args.victim
            )
            if (step + 1) % args.save_every == 0:
                states = {name: run.state for name, run in runs.items()}
                manager.save(step + 1, args=ocp.args.StandardSave(states))
    if args.worker == 0:
        curves = {name: run.losses for name, run in runs.items()}
        (args.folder / "losses.json").write_text(json.dumps(curves))
        for name, losses in curves.items():
            print(f"{name:15} loss {losses[first]:.4f} -> {losses[args.steps - 1]:.4f}", flush=True)


def restore(runs: dict[str, Run], manager: ocp.CheckpointManager) -> int:
    """The step to go on with: that of the last whole checkpoint, which any number of processes may have written."""
    latest = manager.latest_step()
    if latest is None:
        return 0
    states = manager.restore(latest, args=ocp.args.StandardRestore({name: run.target for name, run in runs.items()}))
    for name, run in runs.items():
        run.state = states[name]
    return latest


def advance(runs: dict[str, Run], batch: Split, step: int, dies: bool) -> None:
    started = {}
    for name, run in runs.items():
        run.state, started[name] = run.step(run.state, batch)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)  # the step is on its way, in this process and in the others
    for name, run in runs.items():
        run.losses[step] = float(started[name])


# ---- the parent ------------------------------------------------------------------------------------------


def launch(args: argparse.Namespace, processes: int, folder: Path) -> dict[str, list[float]]:
    """Starts the workers and waits. If one dies, the others get `PATIENCE` seconds, and SystemExit says what to do."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    passed = ["width", "batch", "steps", "save_every", "seed", "kill_at", "victim"]
    command = [sys.executable, __file__, "--processes", str(processes), "--address", address, "--folder", str(folder)]
    command += [part for name in passed for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    workers, logs = [], [(folder / f"worker_{k}.log").open("w") for k in range(processes)]
    for k, log in enumerate(logs):
        out = None if k == 0 else log
        workers.append(subprocess.Popen([*command, "--worker", str(k)], stdout=out, stderr=log))
    try:
        watch(workers, folder)
    finally:
        for worker in workers:
            worker.kill()  # of no effect on what has ended
        for log in logs:
            log.close()
    curves = json.loads((folder / "losses.json").read_text())
    return {name: [losses[step] for step in sorted(losses, key=int)] for name, losses in curves.items()}


def watch(workers: list[subprocess.Popen], folder: Path) -> None:
    while not any(worker.poll() for worker in workers):
        if all(worker.poll() == 0 for worker in workers):
            return
        time.sleep(0.05)
    begin = time.monotonic()
    while any(worker.poll() is None for worker in workers) and time.monotonic() - begin < PATIENCE:
        time.sleep(0.05)
    seconds = time.monotonic() - begin
    ends = [f"process {k}: {_end(worker.poll())}" for k, worker in enumerate(workers)]
    raise SystemExit(
        f"training stopped, and all ended within {seconds:.1f} of {PATIENCE} s; {', '.join(ends)}. What each said: "
        f"{folder}/worker_*.log. Start again, with any number of processes: training goes on from the last checkpoint."
    )


def _end(code: int | None) -> str:
    if code is None:
        return "was still waiting, and is stopped now"
    return "was killed" if code == KILLED else f"ended with code {code}"


def compare(args: argparse.Namespace) -> None:
    """One process and several: the loss curves differ as those of a dense model do, by the order of sums."""
    many = launch(args, args.processes, args.folder / "many")
    one = launch(args, 1, args.folder / "one")
    for name in many:
        differences = np.abs(np.array(many[name]) - np.array(one[name]))
        print(f"{name:15} largest difference to one process {differences.max():.2e}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("out/many_processes"), help="for checkpoints and logs")
    parser.add_argument("--compare", action="store_true", help="train in one process, too")
    parser.add_argument("--width", type=int, default=640, help=f"hidden features, a multiple of {NUM_BLOCKS}")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-at", type=int, default=-1, help="the step in which a process kills itself")
    parser.add_argument("--victim", type=int, default=1, help="which process that is")
    parser.add_argument("--worker", type=int, help="the number of this process; without it, all are started here")
    parser.add_argument("--address", default="", help="HOST:PORT of process 0")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    if arguments.worker is not None:
        work(arguments)
    elif arguments.compare:
        compare(arguments)
    else:
        launch(arguments, arguments.processes, arguments.folder)
