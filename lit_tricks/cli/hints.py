"""Names of options in other tools, and their names here."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lit_tricks
from lit_tricks._compat import option_action
from lit_tricks.tasks import TASKS
from lit_tricks.utils.config_files import class_in, given, model_in

__all__ = ["require_known_names"]

# By the name without hyphens, underscores and dots, in lower case: what to write instead, before the value.
HINTS = {
    name: flag
    for flag, names in {
        "--model.optimizer.lr": "lr learningrate baselr initiallr modellr modellearningrate optimizerlr trainerlr",
        "--model.optimizer.weight_decay": "wd weightdecay modelweightdecay modelwd optimizerweightdecay l2",
        "--model.optimizer.momentum": "momentum modelmomentum optimizermomentum",
        "--model.optimizer": "optimizer optim opt trainoptimizer traineroptimizer",
        "--model.model": "arch architecture modelname modelarch backbone network net",
        "--model.weights": "weights pretrained pretrainedweights modelpretrained initialcheckpoint modelckpt",
        "--model.freeze": "freeze freezelayers",
        "--model.layer_decay": "layerdecay",
        "--model.model_args.drop_rate": "dropout droprate",
        "--trainer.max_epochs": "epochs epoch maxepochs numepochs nepochs trainerepochs",
        "--trainer.max_steps": "steps maxsteps numsteps",
        "--trainer.devices": "device devices gpus gpu numgpus ngpus ngpu trainergpus trainerdevice cuda",
        "--trainer.accelerator": "accelerator",
        "--trainer.strategy": "strategy ddp fsdp",
        "--trainer.num_nodes": "nodes numnodes nnodes",
        "--trainer.precision": "precision",
        "--trainer.precision 16-mixed": "amp fp16 half mixedprecision usefp16 trainerfp16 traineramp",
        "--trainer.precision bf16-mixed": "bf16 trainerbf16",
        "--trainer.accumulate_grad_batches": "gradaccum gradientaccumulationsteps gradaccumsteps",
        "--trainer.gradient_clip_val": "clipgrad gradclip clip maxgradnorm",
        "--trainer.log_every_n_steps": "loginterval logevery",
        "--trainer.fast_dev_run": "dryrun fastdevrun smoketest",
        "--trainer.default_root_dir": "outputdir outdir savedir logdir workdir",
        "--trainer.callbacks+=": "tricks trick callbacks callback addtrick",
        "--data.batch_size": "batchsize bs b batch trainerbatchsize modelbatchsize trainbatchsize",
        "--data.num_workers": "workers numworkers j nworkers",
        "--data.root": "dataroot datadir datapath root datasetpath imagefolder",
        "--data": "dataset datasetname",
        "--data.image_size": "imagesize imgsize inputsize resolution",
        "--data.eval_size": "valsize testsize evalsize",
        "--seed_everything": "seed randomseed trainerseed",
        "--ckpt_path": "checkpoint ckpt resume resumefrom resumefromcheckpoint load modelcheckpoint",
        "--name": "runname experiment expname",
        "--config": "conf cfg configfile configs configuration recipe yaml",
        "--config loggers/wandb": "wandb usewandb logtowandb",
        "--config loggers/tensorboard": "tensorboard tb",
        "--config tricks/ema": "ema modelema",
        "--config tricks/mixup": "mixup mixupalpha",
        "--config tricks/cutmix": "cutmix cutmixalpha",
        "--config tricks/label_smoothing": "labelsmoothing smoothing",
        "--config tricks/warmup_cosine": "warmup warmupepochs scheduler lrscheduler sched cosine",
        "--config tricks/channels_last": "channelslast",
        "--config tricks/compile": "compile torchcompile",
    }.items()
    for name in names.split()
}
OTHER_COMMANDS = {"topk": "`lit-tricks predict --top-k`", "images": "`lit-tricks predict`"}


def require_known_names(parser: Any, words: Sequence[str]) -> None:
    """Raise an error that names the right option for an option of other tools.

    Args:
        parser: of the command.
        words: of the command line, configurations as paths.

    Raises:
        argparse.ArgumentError: for an option that the parser does not have, and for a network or a folder of images in
            place of a class.
    """
    words = list(words)
    for word in words:
        flag = word.partition("=")[0]
        key = flag.lower().translate(str.maketrans("", "", "-_.+"))
        if not flag.startswith("-") or option_action(parser, flag) is not None or _may_be_of_class(flag, words):
            continue
        if key in HINTS:
            raise argparse.ArgumentError(None, f"there is no argument {flag!r}; did you mean {HINTS[key]}?")
        if key in OTHER_COMMANDS:
            raise argparse.ArgumentError(None, f"there is no argument {flag!r} here; see {OTHER_COMMANDS[key]}.")
    _require_class(words)


def _may_be_of_class(flag: str, words: list[str]) -> bool:
    """Return whether a flag is an argument of the data or the model, which may be of any class of the user."""
    if not flag.startswith("--model."):
        return flag.startswith("--data.")
    name = model_in(words)
    if name and name not in TASKS:
        return True
    return flag.split(".")[1] in inspect.signature(getattr(lit_tricks, name or "Classifier")).parameters


def _require_class(words: list[str]) -> None:
    """Raise an error for ``--model resnet50`` and ``--data photos``, which take a class, and for a missing class."""
    model, data = given(words, "--model"), given(words, "--data")
    argument = next((word for word in words if word.startswith("--data.")), "")
    if argument and not class_in(words, "data"):
        flag = argument.partition("=")[0]
        raise argparse.ArgumentError(
            None, f"{flag} is an argument of a data module. Give its class too, such as --data ImageFolder."
        )
    if model and "." not in model and _is_network(model):
        raise argparse.ArgumentError(None, f"--model: {model!r} is a network; did you mean --model.model {model}?")
    if data and Path(data).is_dir():
        raise argparse.ArgumentError(
            None, f"--data: {data!r} is a folder; did you mean --data ImageFolder --data.root {data}?"
        )
    if data and Path(data).is_file():
        raise argparse.ArgumentError(
            None, f"--data: {data!r} is a file; did you mean --data ImageTable --data.table {data}?"
        )


def _is_network(name: str) -> bool:
    import timm

    from lit_tricks.models.factory import NETWORKS

    return name in NETWORKS or timm.is_model(name)
