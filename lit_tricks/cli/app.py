"""The commands that need torch: ``lit-tricks fit`` and the like by LightningCLI, and the functions in ``commands``."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar, Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

# The parser finds the short names of the classes that are imported.
import lit_tricks.callbacks
import lit_tricks.data
import lit_tricks.tasks.classification
import lit_tricks.tasks.detection  # noqa: F401
from lit_tricks import LinearScaling, TemperatureScaling, __version__, commands
from lit_tricks._compat import callbacks_of, drop_anonymous_setting, overrides
from lit_tricks.cli.commands import find_command, own_arguments, run_command
from lit_tricks.cli.errors import explain
from lit_tricks.cli.hints import require_known_names
from lit_tricks.cli.trick_actions import add_trick_flags
from lit_tricks.commands.checkpoints import (
    checkpoint_at,
    read_checkpoint,
    require_finite,
    resumed_settings,
    run_settings,
)
from lit_tricks.data.image_folder import ImageFolder
from lit_tricks.run.checkpoint_io import use_whole_checkpoints
from lit_tricks.run.cpu_timer import CPUTimer
from lit_tricks.run.evidence.callback import Evidence
from lit_tricks.run.finite_loss import FiniteLoss
from lit_tricks.run.folder import RunFolder
from lit_tricks.run.log_interval import LogInterval, LogRates
from lit_tricks.run.memory import PeakMemory
from lit_tricks.run.pictures import send_predictions
from lit_tricks.run.preview import PreviewLogger
from lit_tricks.run.profiler import TimeSplit
from lit_tricks.run.progress_bar import OneLineBar
from lit_tricks.run.report.evaluation import PREDICTIONS, prepare_folder, report_evaluation
from lit_tricks.run.report.fit import report_fit
from lit_tricks.run.resuming import BestSoFar
from lit_tricks.run.saving import BestCheckpoint, LastCheckpoint, SaveConfig
from lit_tricks.run.tricks_in_force import TricksInForce
from lit_tricks.run.wandb_run import own_wandb_run, prepare_wandb
from lit_tricks.tasks import TASKS
from lit_tricks.tasks.base import Task
from lit_tricks.utils.config_files import given, model_in, resolve_configs, strings_in
from lit_tricks.utils.log import show_lines
from lit_tricks.utils.trick_flags import behind_configs

__all__ = ["TricksCLI", "run"]

# Lightning's own use of torch, a loader of images in memory, callbacks that only training needs (`BestSoFar` names
# those that a resumed run lacks), the logging interval that `LogInterval` sets: nobody needs to act on these warnings.
NO_ADVICE = (
    ".*LeafSpec.*is deprecated",
    ".*does not have many workers",
    ".*callbacks used to create the checkpoint",
    ".*smaller than the logging interval",
)
DEFAULT_OPTIMIZER = ("torch.optim.SGD", 0.1)  # class and learning rate, for 256 images in a step
EVALUATIONS = {"validate": "val", "test": "test"}  # split, by command
LINKS = {"num_classes": "num_classes", "classes": "class_names", "input_size": "input_size"}  # data: model


class TricksCLI(LightningCLI):
    """LightningCLI with a folder for each run, a report at its end, and checkpoints that bring their settings along."""

    def __init__(self, args: list[str], run: RunFolder) -> None:
        self.run = run
        self.wanted: str | None = next((arg for arg in args if arg in self.subcommands()), None)
        self.parsers: dict[str, LightningArgumentParser] = {}  # of the subcommands
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            # errors are raised: `run` prints them as one line
            parser_kwargs={name: {"exit_on_error": False} for name in self.subcommands()}
            | {"exit_on_error": False, "prog": "lit-tricks", "version": __version__},
            trainer_defaults={"default_root_dir": "runs"},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=args,
        )

    @overrides(LightningCLI)
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self.wanted not in (None, subcommand):  # a full parser takes time to make
            return LightningArgumentParser(**kwargs)
        parser = self.parsers[subcommand] = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults(
            {"model": {"class_path": "lit_tricks.tasks.classification.Classifier"}, "weights_only": True}
        )
        if subcommand == "fit":
            parser.add_argument("--name", type=str)
            parser.add_argument("--watch", type=Literal["gradients", "parameters", "all", None])
            parser.add_argument("--on_nan", type=Literal["warn", "stop"], default="warn")
        if subcommand in EVALUATIONS:
            parser.add_argument("--out", type=str)
            parser.set_defaults({"verbose": False})  # the table at the end is ours
        if subcommand != "predict":  # a checkpoint brings its class names; the data it was trained on need not be there
            for source, target in LINKS.items():
                parser.link_arguments(f"data.{source}", f"model.init_args.{target}", apply_on="instantiate")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Put the settings of a checkpoint below the ones that are given.

        A resumed run takes over all settings of the run before, unless a configuration gives its own.
        """
        assert isinstance(args, list)  # __init__ takes nothing else
        subcommand = self.wanted
        args, path = _with_checkpoint_file(args, prefer="last" if subcommand == "fit" else "best")
        settings: dict[str, Any] = {}
        if path:
            # where the data is at hand, what it gives the model comes from it
            links, trusted = () if subcommand == "predict" else LINKS.values(), strings_in(args)
            settings = run_settings(path, subcommand or "fit", links, trusted)
            if subcommand == "fit":
                settings = {} if _has_config(args) else resumed_settings(path, settings, trusted)
        if subcommand is None:
            settings = {}
        with tempfile.TemporaryDirectory() as folder:
            if settings:
                file = Path(folder, "settings.yaml")
                file.write_text(yaml.safe_dump(settings))
                at = args.index(str(subcommand)) + 1
                args = [*args[:at], f"--config={file}", *args[at:]]
            named = model_in(args)  # of arguments in common it would take the values of the default class
            if subcommand:
                args = behind_configs(args)
                add_trick_flags(self.parsers[subcommand], args)
                require_known_names(self.parsers[subcommand], args)
            if subcommand and named in TASKS:
                default = {"class_path": f"{TASKS[named]}.{named}"}
                self.parsers[subcommand].set_defaults({"model": default})
            self.config = parser.parse_args(args)

    @overrides(LightningCLI)
    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let a checkpoint's settings win over the flags here."""

    def before_instantiate_classes(self) -> None:
        """Choose the run folder, and set it in the loggers."""
        config = self.config[self.subcommand]
        if self.subcommand == "fit" and not config.trainer.fast_dev_run:
            config.name = config.name or self.run.name
            self.run.create(config.trainer.default_root_dir or "runs", config.name)
            self.logger_config: Any = copy.deepcopy(config.trainer.logger)
            prepare_wandb(config.trainer.logger, self.run, config.ckpt_path, config.watch)
            self.memory: PeakMemory = PeakMemory()
            return
        self.save_config_callback: None = None
        if config.get("out"):
            prepare_folder(Path(config.out))
        warnings.filterwarnings("ignore", message="The dirpath has changed from")  # of what is not trained here
        if config.trainer.logger in (None, True):
            config.trainer.logger = False

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what every run has: CSV metrics, the best and the last checkpoint, the file of predictions.

        Raises:
            ValueError: for an argument of the model that contradicts the data; it would be ignored.
        """
        self._check_links()
        config = self.config_init[self.subcommand].trainer
        callbacks = config.callbacks = list(config.callbacks or [])
        if config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(OneLineBar())
        if self.subcommand == "fit":
            callbacks.append(FiniteLoss(self.config_init.fit.on_nan))
            if self._has_small_batches() and not any(isinstance(c, LinearScaling) for c in callbacks):
                callbacks.append(LinearScaling())
            if config.log_every_n_steps is None and not config.barebones:
                callbacks.append(LogInterval())
        if self.run.path or self.config_init[self.subcommand].get("out"):
            self.evidence: Evidence = Evidence()
            callbacks.append(self.evidence)
        if self.run.path:
            self.timer: Timer = Timer()
            self.cpu_timer: CPUTimer = CPUTimer()
            callbacks += [self.timer, self.cpu_timer, TricksInForce(self.run.path), BestSoFar(), LogRates()]
            if config.profiler is None:
                kwargs["profiler"] = TimeSplit()
            kwargs["logger"] = self._loggers(config.logger)
            if any(isinstance(logger, WandbLogger) for logger in kwargs["logger"]):
                callbacks.append(PreviewLogger())
            if config.enable_checkpointing is not False and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
                scored = isinstance(self.model, Task) and config.limit_val_batches != 0
                monitor = f"val/{self.model.score}" if scored else None
                callbacks.append(BestCheckpoint(filename="best", monitor=monitor, mode="max"))
                callbacks.append(LastCheckpoint(filename="last"))  # save_last would save only together with the best
        trainer = super().instantiate_trainer(**kwargs)
        use_whole_checkpoints(trainer)
        return trainer

    def _has_small_batches(self) -> bool:
        """Return whether the data makes smaller batches than the learning rate is for, and nobody chose that rate."""
        optimizer = self.config.fit.model.init_args.get("optimizer")
        is_default = optimizer is None or (optimizer.class_path, optimizer.init_args.lr) == DEFAULT_OPTIMIZER
        data = self.datamodule
        return is_default and isinstance(data, ImageFolder) and data.fits_small_batch()

    def _loggers(self, wanted: Any) -> list[Any]:
        """Return the loggers of a run: ``metrics.csv``, and the configured ones."""
        # saved as requested, since repeating the configuration should start another W&B run
        self.config[self.subcommand].trainer.logger = self.logger_config
        csv = CSVLogger(self.run.root, self.run.name, self.run.version)
        _ = csv.experiment  # while the folder is empty: it warns of files, and other loggers write some there
        given = wanted if isinstance(wanted, list) else [wanted]
        others = [each for each in given if not isinstance(each, bool | None)]
        for logger in others:
            if isinstance(logger, WandbLogger):
                drop_anonymous_setting(logger)
        return [csv, *others]

    def _require_finite_checkpoint(self) -> None:
        """Raise if the checkpoint to resume or to evaluate has weights that are not finite."""
        path = str(self.config_init[self.subcommand].ckpt_path or "")
        if Path(path).is_file():
            require_finite(Path(path), read_checkpoint(Path(path))["state_dict"], self.model)

    before_fit = before_validate = before_test = _require_finite_checkpoint

    def after_validate(self) -> None:
        """Print the metrics, and write them with the predictions if a folder is given."""
        assert self.subcommand is not None
        config, trainer = self.config_init[self.subcommand], self.trainer
        folder = Path(config.out) if config.out else None
        if folder is not None:
            self.evidence.save(folder / PREDICTIONS, trainer, self._class_names(), weights="given")
        if trainer.is_global_zero:
            split = EVALUATIONS[self.subcommand]
            report_evaluation(split, trainer.callback_metrics, str(config.ckpt_path or ""), folder)

    after_test = after_validate

    def _class_names(self) -> list[str] | None:
        return getattr(self.model, "class_names", None) or getattr(self.datamodule, "classes", None)

    def _check_links(self) -> None:
        arguments = self.config[self.subcommand].model.get("init_args", {})
        known = inspect.signature(type(self.model)).parameters
        for source, target in LINKS.items():
            if self.subcommand == "predict" or target not in known or target not in arguments:
                continue
            found = getattr(self.datamodule, source)
            if arguments[target] not in (found, known[target].default):
                raise ValueError(
                    f"--model.{target}={arguments[target]} disagrees with the data, which has {found}. Leave it out: "
                    "the value is taken from the data."
                )

    def after_fit(self) -> None:
        """Test the best checkpoint and leave a report in the run's folder."""
        trainer = self.trainer
        if self.run.path is None:
            return
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        # before the test, whose checkpoint would put the timers forward
        seconds, cpu = self.timer.time_elapsed("train"), self.cpu_timer.seconds
        best = best if Path(best).is_file() else ""  # the old run's, if a resumed run had no steps left
        scaled = (each.checkpoint for each in callbacks_of(trainer) if isinstance(each, TemperatureScaling))
        best = next(scaled, "") or best
        if best and _has_test_data(self.model, self.datamodule):
            trainer.test(self.model, self.datamodule, ckpt_path=best, verbose=False, weights_only=True)
        self.evidence.save(self.run.path / PREDICTIONS, trainer, self._class_names())
        if trainer.is_global_zero:
            profiler = trainer.profiler  # type: ignore[attr-defined]
            split = profiler.result() if isinstance(profiler, TimeSplit) else None
            report_fit(self.run.path, best, seconds, split, self.memory.read(), cpu)
            send_predictions(self.run.path, trainer.loggers)


class _Unrun(TricksCLI):
    """The objects of a command, built and not run: on one device, without loggers, in no folder."""

    def before_instantiate_classes(self) -> None:
        """Leave out what writes."""
        config = self.config[self.subcommand]
        trainer = config.trainer
        self.save_config_callback = None
        trainer.logger = trainer.enable_progress_bar = trainer.enable_model_summary = False
        trainer.num_sanity_val_steps = 0
        trainer.num_nodes, trainer.strategy = 1, "auto"
        if self.subcommand == "fit":
            trainer.devices = 1
        else:
            config.data.init_args.predict_dir = tempfile.gettempdir()  # so that the training images need not be there

    @overrides(LightningCLI)
    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing."""


def _parts_of(subcommand: str, words: list[str]) -> dict[str, Any]:
    """Return data, model and Trainer of a subcommand, for a command that makes something else of them."""
    built = _Unrun([subcommand, *words], RunFolder())
    trainer = built.trainer
    trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, Checkpoint)]  # type: ignore[attr-defined]
    return {"data": built.datamodule, "model": built.model, "trainer": trainer}


def run(words: list[str], debug: bool) -> None:
    """Run a command.

    Args:
        words: the words after ``lit-tricks``.
        debug: raise errors instead of printing one line.

    Raises:
        SystemExit: see ``lit_tricks.cli.main``.
    """
    show_lines()
    folder = RunFolder()
    command = None
    try:
        words = import_modules(words)
        command, name = find_command(commands, words)
        words, configs = resolve_configs(words)
        folder.name = configs[0].stem if configs else folder.name
        with own_wandb_run(), warnings.catch_warnings():
            for message in NO_ADVICE:
                warnings.filterwarnings("ignore", message=message)
            if command:
                run_command(command, words[len(name.split()) :], name, _parts_of)
            else:
                TricksCLI(words, folder)
    except KeyboardInterrupt:
        folder.discard_if_empty()
        print("lit-tricks: interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except Exception as error:
        folder.discard_if_empty()
        if debug:
            raise
        message, code = explain(error, own_arguments(command) if command else ())
        print(f"lit-tricks: error: {message}", file=sys.stderr)  # noqa: T201
        sys.exit(code)


def _with_checkpoint_file(args: list[str], prefer: Literal["best", "last"]) -> tuple[list[str], Path | None]:
    """Return the arguments with a file instead of a run folder in --ckpt_path, and the file if there is one."""
    flag = "--ckpt_path"
    path = given(args, flag)
    if not path or "://" in path or path in ("best", "last", "hpc", "null"):
        return args, None
    file = checkpoint_at(path, flag, prefer)
    return [*args, f"{flag}={file}"], file


def _has_config(words: list[str]) -> bool:
    return any(word.partition("=")[0] in ("-c", "--config") for word in words)


def import_modules(words: list[str]) -> list[str]:
    """Import what ``--import`` names, for checkpoints of classes in these modules, and return the other words.

    Raises:
        ValueError: for a module that cannot be imported.
    """
    rest: list[str] = []
    names: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if before == "--import" or word.startswith("--import="):
            names.append(word.removeprefix("--import="))
        elif word != "--import":
            rest.append(word)
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"--import {name}: {error}. Give the name of a module that Python finds.") from error
    return rest


def _has_test_data(model: LightningModule, data: LightningDataModule | None) -> bool:
    has_loader = data is not None and is_overridden("test_dataloader", data)
    return is_overridden("test_step", model) and has_loader and getattr(data, "has_test", True)
