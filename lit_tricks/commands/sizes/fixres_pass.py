"""``lit-tricks fixres``: fit a trained network to larger test images in one pass over its training images.

One caveat: the affine parameters of the last BatchNorm stay as they are; the callback FixRes can train them too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

import lit_tricks.data  # noqa: F401  # the parser finds the short names of the classes that are imported
from lit_tricks._compat import CLASS_PATH_KEY, dump_weights
from lit_tricks.callbacks.batchnorm.statistics import estimate
from lit_tricks.commands.checkpoints import RUN, read_checkpoint
from lit_tricks.commands.progress import progress
from lit_tricks.commands.sizes.features import FeatureFile, digest_of_data, digest_of_weights, input_of
from lit_tricks.commands.sizes.logistic import Classified, Linear, choose_weight_decay, evaluate, fit, moments
from lit_tricks.commands.sizes.size_range import macs
from lit_tricks.commands.sizes.subject import Subject, subject_of
from lit_tricks.utils.checkpoint_files import write_checkpoint
from lit_tricks.utils.log import log
from lit_tricks.utils.modules import find_heads, find_norms
from lit_tricks.utils.rng import isolated_random_state

__all__ = ["fixres"]


WEIGHT_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
HELD_OUT = 0.1


def fixres(
    *,
    ckpt: str | None = None,
    test_size: int,
    output: str,
    crop_ratio: float | None = None,
    train_bn: Literal["last", "all", "none"] = "last",
    classifier: str | None = None,
    batch_norm: str | None = None,
    num_samples: int = 8192,
    weight_decay: float | None = None,
    data: LightningDataModule | None = None,
    module: LightningModule | None = None,
    weights: str | None = None,
    model_args: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Fit the classifier of a network to another size of the test images.

    This is the fine-tuning of [Touvron et al., 2019](https://arxiv.org/abs/1906.06423) in one pass. The test transform
    always returns the same images, so the features of the network do not change either. The pass estimates the
    statistics of the last BatchNorm at the new size, and stores the features of the classifier in a file. The
    classifier is then trained on them to convergence, which is a convex problem. The weight decay is chosen on a tenth
    of the training images. An interrupted pass continues when you repeat the command.

    Args:
        ckpt: a checkpoint, a run folder (its best checkpoint), or the name of a pretrained timm model.
        test_size: side of the test images in pixels, at least 1.
        output: checkpoint to write. It loads like any other checkpoint, and is tested at the new size.
        crop_ratio: size divided by the short side before the center crop, in (0, 1]; by default the data's.
        train_bn: the BatchNorm layers whose statistics are estimated at the new size: "last", "all", or "none".
        classifier: name of the linear layer that gives the logits, if it is not the last one.
        batch_norm: name of the last BatchNorm of the trunk, if it is not the one defined last.
        num_samples: training images for these statistics, 1 or more.
        weight_decay: weight decay of the classifier, above 0; by default the best value on held-out training images.
        data: the images; by default the data of the checkpoint.
        module: module that the weights belong to; by default from the checkpoint.
        weights: a file of weights for a timm model.
        model_args: arguments of the model in addition to the checkpoint's, such as {dynamic_img_size: true}.
        overwrite: replace ``output`` if it exists.

    Returns:
        The path of the new checkpoint.

    Raises:
        FileNotFoundError: if the checkpoint, or the folder of ``output``, does not exist.
        FileExistsError: if ``output`` exists, without ``overwrite``.
        ValueError: for arguments that exclude each other, and networks without such a classifier or BatchNorm.
    """
    _check(test_size, output, crop_ratio, num_samples, weight_decay, overwrite)
    subject = subject_of(ckpt, data, module, weights, model_args)
    macs(
        subject, test_size, (getattr(subject.data, "input_size", None) or (3,))[0]
    )  # raises for a size without support
    name, head = _classifier(subject.module, classifier)
    norms = _norms(subject.module, train_bn, batch_norm)
    crop_ratio = _settled(subject, crop_ratio)
    dataset, like = subject.dataset("train", subject.transform_at(test_size, crop_ratio))
    with isolated_random_state(subject.device, [like]):
        features = _features(subject, dataset, like, norms, head, num_samples, Path(f"{output}.features"))
    _solve(head, features, weight_decay, subject.device, name)
    _write(subject, Path(output), test_size, crop_ratio)
    features.remove()
    return Path(output)


def _features(
    subject: Subject, dataset: Any, like: Any, norms: dict[str, Any], head: nn.Linear, num_samples: int, folder: Path
) -> FeatureFile:
    """Write the features of the classifier to a file, with BatchNorm statistics of the new size."""
    batch_size = like.batch_size or 64

    def batches(indices: Any) -> Any:
        for images, labels in subject.loader(dataset, like, batch_size, indices):
            yield subject.on_device(images, labels)

    key = digest_of_weights(subject.module) + digest_of_data(dataset, batches) + f" {sorted(norms)} {num_samples}"
    file = FeatureFile(folder, key, len(dataset))
    if norms and "statistics" not in file.state:
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:num_samples].tolist()
        with progress("BatchNorm", len(chosen)) as advance:

            def sampled() -> Any:
                for batch, _ in batches(chosen):
                    yield batch
                    advance(len(batch))

            found = estimate(subject.module, norms, sampled(), subject.logits)
        file.remember(statistics={layer: [value.tolist() for value in pair] for layer, pair in found.items()})
    for layer, pair in file.state.get("statistics", {}).items():
        for buffer, values in zip((norms[layer].running_mean, norms[layer].running_var), pair, strict=True):
            buffer.copy_(torch.tensor(values, dtype=torch.float64))
    if file.done:
        log.info("%s: continues after %d of %d images", folder, file.done, file.samples)
    with torch.no_grad(), input_of(head) as seen, progress("features", file.samples, file.done) as advance:
        for images, labels in batches(range(file.done, file.samples)):
            subject.logits(images)
            file.append(seen[0], labels)
            advance(len(labels))
    return file


def _solve(head: nn.Linear, file: FeatureFile, weight_decay: float | None, device: torch.device, name: str) -> None:
    """Train the classifier to convergence."""
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    features, labels = file.read()
    if device.type == "cuda" and features.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        features, labels = features.to(device), labels.to(device)
    everything = Classified(features, labels, device)
    start = Linear(head.weight.detach().float(), None if head.bias is None else head.bias.detach().float())
    spread = moments(everything)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)
    held_out, rest = everything[order[: (count := max(1, round(HELD_OUT * len(labels))))]], everything[order[count:]]
    before = evaluate(start, held_out)
    if weight_decay is None:
        weight_decay, part = choose_weight_decay(start, rest, held_out, WEIGHT_DECAYS, spread)
    else:
        part = fit(start, rest, weight_decay, spread)
    after = evaluate(part, held_out)
    found = fit(part, everything, weight_decay, spread)
    with torch.no_grad():
        head.weight.copy_(found.weight)
        if head.bias is not None and found.bias is not None:
            head.bias.copy_(found.bias)
    log.info(
        "FixRes: classifier %s, %d features of %d images, weight decay %g; on held-out training images cross entropy "
        "%.4f -> %.4f, top-1 %.2f -> %.2f %%",
        name, features.shape[1], len(labels), weight_decay, before[0], after[0], 100 * before[1], 100 * after[1],
    )  # fmt: skip


def _write(subject: Subject, path: Path, test_size: int, crop_ratio: float | None) -> None:
    """Write a checkpoint of the network, with the new size among the settings of its data."""
    trainer, data = subject.trainer, subject.data
    subject.module.cpu().train()  # adapters that merge for evaluation are saved unmerged
    if subject.checkpoint:
        content = {key: value for key, value in read_checkpoint(subject.checkpoint).items() if key not in RUN}
        content |= {"state_dict": subject.module.state_dict()}
    else:
        trainer.strategy.connect(subject.module)
        content = dump_weights(trainer)
    settings = dict(data.hparams) if data.hparams else {}
    if "eval_size" in settings:
        settings["eval_size"] = test_size
    else:
        log.warning("%s has no argument eval_size: test at %d pixels yourself", type(data).__name__, test_size)
    if crop_ratio and "resize_size" in settings:
        settings["resize_size"] = round(settings["image_size"] / crop_ratio)
    if settings:
        settings.setdefault(CLASS_PATH_KEY, f"{type(data).__module__}.{type(data).__qualname__}")
        content[type(data).CHECKPOINT_HYPER_PARAMS_KEY] = settings
    write_checkpoint(content, path)
    log.info("%s: for test images of %d pixels", path, test_size)


def _settled(subject: Subject, crop_ratio: float | None) -> float | None:
    """Return the crop ratio as the settings of the data can hold it: by a size to resize to, in whole pixels."""
    settings = subject.data.hparams
    ratio = crop_ratio or subject.crop_ratio
    if ratio and "eval_size" in settings:
        if "resize_size" not in settings:
            name = type(subject.data).__name__
            raise ValueError(f"--crop_ratio {ratio:g}: {name} does not support it. Leave it out.")
        size = settings["image_size"]
        ratio = size / round(size / ratio)
    return ratio


def _classifier(module: LightningModule, name: str | None) -> tuple[str, nn.Linear]:
    try:
        found = find_heads(module, name)
    except RuntimeError:
        found = {}
    linear = [(key, layer) for key, layer in found.items() if isinstance(layer, nn.Linear)]
    if len(linear) != 1 or len(found) != 1:
        what = " and ".join(f"{key} ({type(layer).__name__})" for key, layer in found.items()) or "none"
        wanted = f" for {name!r}" if name else ""
        raise ValueError(
            f"the classifier of {type(module).__name__} must be one linear layer, got {what}{wanted}: name it "
            "with --classifier, or fine-tune with the callback FixRes."
        )
    return linear[0]


def _norms(module: LightningModule, which: str, name: str | None) -> dict[str, Any]:
    try:
        return find_norms(module, which, name)
    except RuntimeError:
        what = f"BatchNorm {name!r}" if name else "BatchNorm"
        raise ValueError(
            f"{type(module).__name__} has no {what} with running statistics: give --train_bn none, which fits "
            "only the classifier."
        ) from None


def _check(
    test_size: int, output: str, crop_ratio: float | None, num_samples: int, weight_decay: float | None, overwrite: bool
) -> None:
    if test_size < 1:
        raise ValueError(f"--test_size={test_size} is below 1: it is the side of the images in pixels.")
    if crop_ratio is not None and not 0 < crop_ratio <= 1:
        raise ValueError(f"--crop_ratio {crop_ratio:g} is not above 0 and at most 1: 0.875 is 224 of 256 pixels.")
    if num_samples < 1:
        raise ValueError(f"--num_samples={num_samples} is below 1; 1,000 to 10,000 do.")
    if weight_decay is not None and not weight_decay > 0:
        raise ValueError(f"--weight_decay={weight_decay} must be above 0: 1e-4 is usual.")
    if Path(output).exists() and not overwrite:
        raise FileExistsError(f"--output {output} exists: choose another name, or give --overwrite to replace it.")
    if not Path(output).resolve().parent.is_dir():
        raise FileNotFoundError(f"--output {output} lies in a folder that does not exist: make it first.")
