"""The options of ``lit-tricks fit``, ``validate`` and ``test``, with their descriptions for ``--help``."""

from __future__ import annotations

from lit_tricks.cli.pages import Option

__all__ = ["EVALUATION", "FIT", "TRAINER"]

SWITCH = "{true,false}"

_HELP = Option("-h, --help", "Show this help.")
_SETTINGS = (
    _HELP,
    Option(
        "-c, --config NAME",
        "Configuration: a file, or a name that `lit-tricks list configs` prints. Several are merged in their order. "
        "Flags win over them.",
    ),
    Option("--print_config", "Print the merged configuration, and do nothing else."),
    Option("--seed_everything INT", "Seed of all random numbers; true draws a seed. (default: 0)"),
)
_PARTS = (
    Option(
        "--model CLASS",
        "Classifier, Segmenter, Detector, or the import path of a LightningModule. (default: Classifier)",
    ),
    Option("--model.NAME VALUE", "Argument of the model. `--model.help Classifier` explains its arguments."),
    Option("--data CLASS", "Data module; `lit-tricks list data` prints their names."),
    Option("--data.NAME VALUE", "Argument of the data. `--data.help ImageFolder` explains its arguments."),
)
_WEIGHTS_ONLY = Option(
    f"--weights_only {SWITCH}", "Read the checkpoint without running code that it may contain. (default: true)"
)
_TRICKS = (
    Option(
        "--trainer.callbacks+=NAME", "Add a trick, or another callback; `lit-tricks list tricks` prints the tricks."
    ),
    Option("--trainer.callbacks-=NAME", "Take a trick out of the configuration."),
    Option("--trainer.callbacks.NAME.ARGUMENT VALUE", "Change an argument of a trick."),
    Option("--trainer.callbacks.help NAME", "Explain the arguments of a trick."),
)

LENGTH = {
    "max_epochs INT": "Epochs to train; -1 for no limit. (default: 1000)",
    "min_epochs INT": "Epochs to train at least.",
    "max_steps INT": "Optimizer steps to train; -1 for no limit. (default: -1)",
    "min_steps INT": "Optimizer steps to train at least.",
    "max_time TIME": "Stop after this time, given as DD:HH:MM:SS.",
    "accumulate_grad_batches INT": "Batches per optimizer step. (default: 1)",
    "gradient_clip_val FLOAT": "Clip gradients to this norm or value.",
    "gradient_clip_algorithm NAME": "norm or value. (default: norm)",
    "fast_dev_run N": "Try N batches of each split, and save nothing; true is 1. (default: false)",
    "overfit_batches N": "Train on N batches, or a share from 0.0 to 1.0, again and again. (default: 0.0)",
    "limit_train_batches N": "Train on N batches, or a share from 0.0 to 1.0, per epoch. (default: 1.0)",
    "reload_dataloaders_every_n_epochs INT": "Epochs until loaders are made anew; 0: never. (default: 0)",
}
VALIDATION = {
    "val_check_interval N": "Validate after N batches, or a share of the epoch from 0.0 to 1.0. (default: 1.0)",
    "check_val_every_n_epoch INT": "Epochs between two validations. (default: 1)",
    "num_sanity_val_steps INT": "Validation batches to try before training; -1 for all. (default: 2)",
    "limit_predict_batches N": "Predict N batches, or a share. (default: 1.0)",
}
LIMITS = {
    "limit_val_batches N": "Validate N batches, or a share from 0.0 to 1.0. (default: 1.0)",
    "limit_test_batches N": "Test N batches, or a share from 0.0 to 1.0. (default: 1.0)",
    "inference_mode {true,false}": "Evaluate in torch.inference_mode, else in torch.no_grad. (default: true)",
}
HARDWARE = {
    "accelerator NAME": "cpu, gpu, mps, tpu or auto. (default: auto)",
    "devices N": "Number of devices, -1 for all, or indices such as [0,2]. (default: auto)",
    "num_nodes INT": "Machines that train together. (default: 1)",
    "strategy NAME": "auto, ddp, fsdp, or another way to use several devices. (default: auto)",
    "precision NAME": "32-true, 16-mixed, bf16-mixed, 16-true, bf16-true or 64-true. (default: 32-true)",
    "use_distributed_sampler {true,false}": "Divide the data among processes. (default: true)",
    "plugins CLASS": "Plugins of Lightning for precision, clusters and checkpoints.",
    "deterministic NAME": "true allows deterministic operations only; warn warns of others. (default: false)",
    "benchmark {true,false}": "Let cuDNN time its algorithms first.",
}
TRAINING_HARDWARE = {
    "sync_batchnorm {true,false}": "BatchNorm statistics over all devices. (default: false)",
    "detect_anomaly {true,false}": "Find the operation that gives NaN gradients; slow. (default: false)",
}
OUTPUT = {
    "logger CLASS": "WandbLogger, TensorBoardLogger or another, in addition to metrics.csv.",
    "enable_progress_bar {true,false}": "Show a progress bar. (default: true)",
    "profiler NAME": "simple, advanced or pytorch. By default the run measures the parts of a step.",
}
TRAINING_OUTPUT = {
    "default_root_dir DIR": "Folder of all runs. (default: runs)",
    "log_every_n_steps INT": "Steps between two rows of metrics. (default: 50; fewer in runs of below 2500 steps)",
    "enable_checkpointing {true,false}": "Save best.ckpt and last.ckpt. (default: true)",
    "enable_model_summary {true,false}": "Print a table of the layers. (default: true)",
    "enable_autolog_hparams {true,false}": "Log hyperparameters at the start. (default: true)",
    "model_registry NAME": "Name of the model in Lightning's registry.",
    "barebones {true,false}": "Time training without logs and checkpoints. (default: false)",
}
TRAINER = LENGTH | VALIDATION | LIMITS | HARDWARE | TRAINING_HARDWARE | OUTPUT | TRAINING_OUTPUT


def _trainer(options: dict[str, str]) -> tuple[Option, ...]:
    return tuple(Option(f"--trainer.{flag}", text) for flag, text in options.items())


FIT = {
    "options": (
        *_SETTINGS,
        Option("--name TEXT", "Name of the run's folder, runs/NAME/vN. By default the first configuration's name."),
        Option(
            "--ckpt_path PATH",
            "Checkpoint or run folder to resume. Without a configuration, its settings are used too.",
        ),
        _WEIGHTS_ONLY,
        Option("--on_nan {warn,stop}", "Warn of the first loss that is not finite, or stop there. (default: warn)"),
        Option("--watch NAME", "Send histograms of gradients, parameters or all to Weights & Biases."),
    ),
    "model and data": _PARTS,
    "tricks": _TRICKS,
    "length of the training": _trainer(LENGTH),
    "validation and test": _trainer(VALIDATION | LIMITS),
    "hardware": _trainer(HARDWARE | TRAINING_HARDWARE),
    "output": _trainer(TRAINING_OUTPUT | OUTPUT),
}
EVALUATION = {
    "options": (
        Option(
            "--ckpt_path PATH",
            "Checkpoint or run folder, of which the best checkpoint is taken. It brings the model and the data along.",
        ),
        Option("--out DIR", "Folder to write results.json and predictions.npz to."),
        *_SETTINGS,
        _WEIGHTS_ONLY,
        Option(f"--verbose {SWITCH}", "Print Lightning's table as well. (default: false)"),
    ),
    "model and data": _PARTS,
    "callbacks": _TRICKS,
    "evaluation": _trainer(LIMITS | HARDWARE | OUTPUT),
}
