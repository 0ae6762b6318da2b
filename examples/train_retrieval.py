"""``python -m examples.train_retrieval``: trains embeddings for image retrieval on real images.

Some classes are trained on; the scores are of searches among images of other classes. Writes a JSON log, the
network's weights and three pictures. Start here for a training of your own: the whole loop is in ``train``
below.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from benchmarks.machine import describe
from dml_cuda import SoftTripleLoss
from dml_cuda.distributed import DistributedLoss

from .criteria import LOSSES, MINERS, make_head, make_loss
from .data import DataError
from .meters import PeakMemory, StepTimer
from .networks import NetworkError, make_network
from .options import CLASS_RATE, JOINT_WEIGHT, parse
from .plots import draw_curves, draw_neighbours, draw_similarities
from .retrieval import embed, scores
from .several import is_first, normalise_whole_batches, own_rows, start, stop
from .splits import Split, check_batch, images_in_order, open_split, training_batches

MERGED = 0.3  # centres of a class nearer than that count as one

console = Console(highlight=False, soft_wrap=True)


class TrainingError(Exception):
    """A training that cannot go on."""


def embed_test(network: nn.Module, split: Split, arguments: argparse.Namespace) -> tuple[Tensor, ...]:
    """Embeddings of the test images and, where there is one, of the gallery."""
    parts = [part for part in (split.test, split.gallery) if part is not None]
    return tuple(embed(network, images_in_order(part, arguments.workers), arguments.device) for part in parts)


def judge(embeddings: tuple[Tensor, ...], split: Split) -> dict[str, float]:
    gallery = (embeddings[1], split.gallery.labels) if split.gallery else ()
    return scores(embeddings[0], split.test.labels, *gallery)


def train(network: nn.Module, split: Split, arguments: argparse.Namespace, log: dict) -> tuple[Tensor, ...]:
    """Train ``network`` in place; what happens goes into ``log`` as it happens.

    Returns the embeddings of the test images at the end.
    """
    device = torch.device(arguments.device)
    classes = split.train.labels.unique().to(device)  # sorted, so that searchsorted numbers them
    loss_fn = make_loss(
        arguments.loss,
        arguments.miner,
        arguments.epsilon,
        arguments.gamma,
        arguments.embedding_size,
        len(classes),
        arguments.memory,
        arguments.distributed,
    )
    head = make_head(arguments.joint, len(classes), arguments.embedding_size) if arguments.joint else None
    criteria = nn.ModuleList([loss_fn, *([head] if head else [])])
    criteria.to(device, torch.float64 if arguments.float64 else torch.float32)
    triples = [module for module in criteria.modules() if isinstance(module, SoftTripleLoss)]
    weights = {"params": list(criteria.parameters()), "lr": CLASS_RATE * arguments.lr}
    optimizer = torch.optim.Adam([{"params": network.parameters()}, weights], arguments.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    scaler = torch.amp.GradScaler(device.type, enabled=arguments.amp == "fp16")
    amp_dtype = torch.float16 if arguments.amp == "fp16" else torch.bfloat16
    forward = network
    if arguments.distributed:
        forward = DistributedDataParallel(network)
        if head:
            head = DistributedDataParallel(DistributedLoss(head))
        if any(True for _ in loss_fn.parameters()):
            loss_fn = DistributedDataParallel(loss_fn)
    if arguments.compile:
        forward = torch.compile(forward)
    timer, memory = StepTimer(device), PeakMemory(device)

    batches = training_batches(
        split.train, arguments.batch_size, arguments.per_class, arguments.steps, arguments.workers
    )
    network.train()
    memory.start()
    quiet = not is_first()
    progress = tqdm(batches, desc="training", unit="step", total=arguments.steps, disable=quiet)
    for step, (images, labels) in enumerate(progress, start=1):
        images, labels = (x.to(device) for x in own_rows(images, labels))
        timer.start()
        with torch.autocast(device.type, amp_dtype, enabled=arguments.amp is not None):
            embeddings = forward(images)
        if not arguments.float64:
            embeddings = embeddings.float()  # losses are sums of exponentials: in float32
        timer.embedded(embeddings)
        labels = torch.searchsorted(classes, labels)
        loss = loss_fn(embeddings, labels)
        if head:
            loss = JOINT_WEIGHT * loss + head(embeddings, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        step_seconds, loss_seconds = timer.stop()

        log["loss"].append(loss.item())
        log["step_seconds"].append(step_seconds)
        log["loss_seconds"].append(loss_seconds)
        progress.set_postfix(loss=f"{log['loss'][-1]:.3f}", refresh=False)
        if not np.isfinite(log["loss"][-1]):
            raise TrainingError(f"the loss is {log['loss'][-1]} at step {step}: a smaller --lr may help")
        if step % arguments.eval_every == 0 or step == arguments.steps:
            memory.stop()
            log["peak_memory_bytes"], log["peak_memory_of"] = memory.bytes, memory.of
            if is_first():  # the others wait for it at the next step
                found = embed_test(network, split, arguments)
                log["evaluations"].append({"step": step} | judge(found, split))
            network.train()
            memory.start()
    if triples:
        log["centers_left"] = triples[-1].merged_centers(MERGED).float().mean().item()
    return found if is_first() else ()


def _print_scores(evaluations: list[dict[str, float]]) -> None:
    table = Table("classes never trained on", "before", "after", box=box.SIMPLE_HEAD)
    first, last = evaluations[0], evaluations[-1]
    for name in first:
        if name != "step":
            table.add_row(name, f"{first[name]:.1%}", f"[bold]{last[name]:.1%}")
    console.print(table)


def _title(arguments: argparse.Namespace) -> str:
    extras = {
        MINERS[arguments.miner][1].format(epsilon=arguments.epsilon)
        if arguments.miner
        else "": arguments.miner,
        f"memory of {arguments.memory}": arguments.memory,
        "several processes": arguments.distributed,
        f"joint with {arguments.joint}": arguments.joint,
    }
    return ", ".join([LOSSES[arguments.loss], *(text for text, there in extras.items() if there)])


def _write(log: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(log, indent=1) + "\n")


def run(arguments: argparse.Namespace) -> dict:
    """The whole training; returns the log, which is also written to ``--out``."""
    if arguments.distributed:
        arguments.device = str(start(arguments.device))
    console.quiet = not is_first()
    torch.manual_seed(arguments.seed)
    np.random.seed(arguments.seed)  # pytorch-metric-learning's sampler draws from it
    split = open_split(arguments.data, arguments.image_size)
    check_batch(split.train.labels, arguments.batch_size, arguments.per_class)
    network = make_network(arguments.network, split.channels, arguments.embedding_size).to(arguments.device)
    if arguments.distributed:
        normalise_whole_batches(network)
    if arguments.float64:
        network.double().register_forward_pre_hook(lambda _, images: images[0].double())
    log = {
        "title": _title(arguments),
        "arguments": vars(arguments) | {"out": str(arguments.out)},
        "machine": describe(arguments.device),
        "data": split.describe(),
        "interrupted": False,
        "peak_memory_bytes": None,
        "peak_memory_of": None,
        "evaluations": [],
        "loss": [],
        "step_seconds": [],
        "loss_seconds": [],
    }
    parts = ", ".join(
        f"{part} {count['images']} images of {count['classes']} classes"
        for part, count in log["data"].items()
        if part != "title"
    )
    console.print(f"{split.title}: {parts}")
    console.print(f"{log['title']}; on {arguments.device}")

    log_path = arguments.out / "log.json"
    try:
        before = embed_test(network, split, arguments)  # by all: they leave it alike
        log["evaluations"].append({"step": 0} | judge(before, split))
        after = train(network, split, arguments, log)
    except (KeyboardInterrupt, TrainingError) as error:
        log["interrupted"] = True
        if is_first():
            _write(log, log_path)
        console.print(f"\nstopped after {len(log['loss'])} steps; the log so far is {log_path}")
        raise error
    if not is_first():
        return log
    _write(log, log_path)
    weights = arguments.out / "network.pt"
    torch.save(network.state_dict(), weights)
    written = [log_path, weights]
    if arguments.pictures:
        curves, found, pairs = (
            arguments.out / f"{name}.png" for name in ("curves", "neighbours", "similarities")
        )
        draw_curves(curves, log)
        draw_neighbours(found, split, before, after)
        draw_similarities(pairs, split.test.labels, before[0], after[0])
        written += [curves, found, pairs]
    _print_scores(log["evaluations"])
    console.print(f"wrote {', '.join(str(path) for path in written)}")
    return log


def main(options: list[str] | None = None) -> None:
    try:
        run(parse(options))
    except KeyboardInterrupt:
        sys.exit(130)
    except (DataError, NetworkError, TrainingError) as error:
        # A process that loads images puts its traceback before the message.
        sys.exit(f"train_retrieval: {str(error).rsplit('DataError: ', 1)[-1].strip()}")
    finally:
        stop()


if __name__ == "__main__":
    main()
