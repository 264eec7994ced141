"""``lit-tricks calibrate``: probabilities that equal the share of right predictions.

One caveat: calibrate on images that neither trained the network nor chose the checkpoint. Otherwise new images are
calibrated less well than in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

import lit_tricks.data  # noqa: F401  # the parser finds the short names of the classes that are imported
from lit_tricks.callbacks import TestTimeAugment
from lit_tricks.callbacks.calibration.calibrate import Calibration, calibrate_network, scaled_logits
from lit_tricks.callbacks.calibration.checkpoint import RESULT, calibrated
from lit_tricks.callbacks.calibration.head import Scaling
from lit_tricks.callbacks.calibration.recorder import Recorder, record
from lit_tricks.commands.checkpoint_average import CHOSEN_BY
from lit_tricks.commands.checkpoints import checkpoint_at, data_of, fill, module_of, read_checkpoint
from lit_tricks.commands.progress import progress
from lit_tricks.run.report.calibration import report_calibration
from lit_tricks.utils.bounded import read_yaml
from lit_tricks.utils.checkpoint_files import write_checkpoint
from lit_tricks.utils.class_names import require_same_classes
from lit_tricks.utils.log import log

__all__ = ["calibrate"]

WHO = "calibrate"
LOADING = {
    "augmentation", "balance", "batch_size", "cache", "decode", "images_on", "num_workers", "on_bad_image",
    "predict_dir", "random_erasing", "repeats", "workers",
}  # fmt: skip
"""Arguments of data modules that do not decide which images validate."""


def calibrate(
    *,
    ckpt: str,
    output: str,
    kind: Literal["temperature", "vector"] = "temperature",
    classifier: str | None = None,
    data: LightningDataModule | None = None,
    module: LightningModule | None = None,
    test_time_augment: TestTimeAugment | Literal["run", "none"] = "run",
    overwrite: bool = False,
) -> Path:
    """Calibrate the probabilities of a checkpoint by a temperature, which becomes part of its weights.

    This is temperature scaling ([Guo et al., 2017](https://arxiv.org/abs/1706.04599)). The temperature maximizes the
    likelihood of the labels of the validation images. Weight and bias of the last linear layer are divided by it, so
    every export and plain torch code has calibrated probabilities. A network without such a layer gets a buffer, if it
    is a Classifier's or ends with lit_tricks.models.LogitScaling. The most probable class of every image stays the
    same. A table shows calibration error (ECE), negative log-likelihood (NLL) and Brier score before and after, and a
    reliability diagram is written next to ``output``. The weights are the checkpoint's ``state_dict``, which has the
    averaged weights for a run with EMA or SWA. The state of a run, such as its optimizer, is left out.

    Args:
        ckpt: a checkpoint, or a run folder (its best checkpoint).
        output: checkpoint to write. It loads like any other checkpoint. A .png and a .json file of the same name have
            the diagram and the table.
        kind: "temperature": one temperature. "vector": a temperature and an offset per class, which may change the most
            probable class.
        classifier: name of the layer that gives the logits, such as model.fc. By default it is searched for.
        data: the images, of its validation split; by default the data of the checkpoint.
        module: module that the weights belong to; by default from the checkpoint.
        test_time_augment: views of an image whose mean is the prediction, such as TestTimeAugment. The temperature is
            then the best one for the mean, which is no longer the best for one view. "run" uses the TestTimeAugment in
            the configuration of the checkpoint's run, if there is one. "none" calibrates single images.
        overwrite: replace ``output`` if it exists.

    Returns:
        The path of the new checkpoint.

    Raises:
        FileNotFoundError: if the checkpoint, or the folder of ``output``, does not exist.
        FileExistsError: if ``output`` exists, without ``overwrite``.
        ValueError: for a checkpoint without its module or data, and for images that determine no temperature.
        RuntimeError: if validation gives no logits for one label per image, or no layer scales
            them.
    """
    path = _check(ckpt, output, overwrite)
    content = read_checkpoint(path)
    if RESULT in content:
        log.warning("%s is calibrated already: the temperature is fitted to its scaled logits", path)
    is_own = data is None or _has_same_images(data, content.get("datamodule_hyper_parameters", {}))
    data = data_of(path) if data is None else data
    if data is None:
        raise ValueError(
            f"{path} does not name its data: set --data, such as --data ImageFolder --data.root FOLDER, or the "
            "--config of a run."
        )
    if module is None:
        module = module_of(path)
    else:
        fill(module, path)
    require_same_classes(module, data, "the checkpoint", "the data", f"Give --data with the classes of {ckpt}.")
    if test_time_augment == "run":
        views = _views_of_run(path)
        if views:
            log.info(
                "for the mean over %d views, as in the run: --test_time_augment none is for one view", views.number
            )
    else:
        views = None if isinstance(test_time_augment, str) else test_time_augment
    found, logits, labels = _calibrate(module, data, classifier, kind, views)
    result = found.plain()
    write_checkpoint(calibrated(content, result, path), output)
    before, after = Scaling((1.0,)).predicted(logits), found.scaling.predicted(logits)
    report_calibration(Path(output), before, after, labels, result, f"{ckpt}, validation")
    if is_own and (metric := _chosen_by(content, path)):
        log.warning(
            "%s of the same images chose %s, so new images are calibrated less well than here: give --data with other "
            "images", metric, path,
        )  # fmt: skip
    log.info("%s: calibrated on %d samples of the validation split", output, found.samples)
    return Path(output)


class _Record(Callback):
    """Records a validation, and calibrates the module at its end."""

    def __init__(self, classifier: str | None, kind: str, advance: Callable[[int], None]) -> None:
        self.classifier, self.kind, self.advance = classifier, kind, advance
        self.recorder: Recorder | None = None
        self.found: Calibration | None = None
        self.logits = self.labels = torch.zeros(0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.recorder = record(trainer, pl_module, self.classifier, WHO)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *place: int
    ) -> None:
        if self.recorder and not any(place):
            self.recorder.begin()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *place: int
    ) -> None:
        if self.recorder and not any(place):
            self.recorder.add(batch)
            self.advance(1)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.recorder and self.recorder.logits:
            self.found = calibrate_network(self.recorder, trainer, self.classifier, self.kind)
            self.logits, self.labels = scaled_logits(self.recorder, trainer, self.found.head)
            self.recorder.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.recorder:
            self.recorder.close()


def _calibrate(
    module: LightningModule, data: LightningDataModule, classifier: str | None, kind: str, views: TestTimeAugment | None
) -> tuple[Calibration, Tensor, Tensor]:
    """Validate a module. Return its calibration, and the logits and labels of the images."""
    data.prepare_data()
    data.setup("validate")
    with progress("validation", _batches(data)) as advance:
        recording = _Record(classifier, kind, advance)
        trainer = Trainer(
            devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
            callbacks=[recording, *([views] if views else [])],
        )  # fmt: skip
        trainer.validate(module, datamodule=data, verbose=False)
    if recording.found is None:
        raise ValueError(f"{type(data).__name__} has no validation images: give --data with some.")
    return recording.found, recording.logits, recording.labels


def _views_of_run(path: Path) -> TestTimeAugment | None:
    """Return the TestTimeAugment in the configuration of the run of a checkpoint, if there is one."""
    file = path.parent.parent / "config.yaml"
    config = read_yaml(file) if path.parent.name == "checkpoints" and file.is_file() else {}
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if str(callback.get("class_path", "")).rpartition(".")[2] == TestTimeAugment.__name__:
            return TestTimeAugment(**callback.get("init_args") or {})
    return None


def _batches(data: LightningDataModule) -> int:
    try:
        return len(data.val_dataloader())
    except TypeError:  # several loaders, or a stream
        return 1


def _has_same_images(data: LightningDataModule, own: Mapping[str, Any]) -> bool:
    """Return whether data validates on the images of the run, by the arguments in the run's checkpoint."""
    chosen = {name: value for name, value in data.hparams.items() if name not in LOADING}
    return bool(chosen) and all(name in own and own[name] == value for name, value in chosen.items())


def _chosen_by(content: Mapping[str, Any], path: Path) -> str:
    """Return the metric of the validation by which this checkpoint or average was chosen as the best one, or ""."""
    if CHOSEN_BY in content:
        return str(content[CHOSEN_BY])
    for state in content.get("callbacks", {}).values():
        chosen = str(state.get("best_model_path", "")) if isinstance(state, Mapping) else ""
        if chosen and Path(chosen).name == path.name and state.get("monitor"):
            return str(state["monitor"])
    return ""


def _check(ckpt: str, output: str, overwrite: bool) -> Path:
    path = checkpoint_at(ckpt, "--ckpt")
    files = [Path(output), *(Path(output).with_suffix(suffix) for suffix in (".png", ".json"))]
    if Path(output).suffix in (".png", ".json"):
        raise ValueError(f"--output {output} is a checkpoint: end its name with .ckpt.")
    if exists := next((file for file in files if file.exists()), None):
        if not overwrite:
            raise FileExistsError(f"--output {output}: {exists} exists. Choose another name, or give --overwrite.")
        if exists.samefile(path):
            raise ValueError(f"--output {output} is the checkpoint to calibrate: choose another name.")
    if not Path(output).resolve().parent.is_dir():
        raise FileNotFoundError(f"--output {output} lies in a folder that does not exist: make it first.")
    return path
